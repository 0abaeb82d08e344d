"""The feature maps that a walk recovered, as rows of a report, as JSON and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradleak.calculus.record import PeeledMap

_CHANNELS, _SHEET_HEIGHT = 16, 48
# A residual of so many roundings of float32 shows noise or a coarser precision.
_NOISY = 1e-5


def map_rows(maps: Sequence[PeeledMap], barriers: Sequence[str]) -> list[tuple[str, str]]:
    """Return one row a map, what stopped the walk, and a warning where the gradient is noisy."""
    rows = [(f"input of {found.names[0]}", _line(found)) for found in maps if found.names]
    return rows + _ends(maps, barriers)


def map_summary(maps: Sequence[PeeledMap], barriers: Sequence[str]) -> list[tuple[str, str]]:
    """Return the same with one row for all maps."""
    if not maps:
        return _ends(maps, barriers)
    worst, condition = max(m.residual for m in maps), max(m.condition for m in maps)
    lowest = maps[-1].names[0] if maps[-1].names else "the network"
    text = f"{len(maps)} recovered, the last one the input of {lowest}; "
    text += f"residuals up to {worst:.2g}, condition numbers up to {condition:.2g}"
    return [("maps", text), *_ends(maps, barriers)]


def _ends(maps: Sequence[PeeledMap], barriers: Sequence[str]) -> list[tuple[str, str]]:
    """Return what stopped the walk, and a warning where the gradient is noisy."""
    rows = [("stopped at", barrier) for barrier in barriers]
    worst = max((found.residual for found in maps), default=0.0)
    if worst > _NOISY:
        text = f"residuals of {worst:.0e} show noise on the gradient or a low precision of it: "
        rows.append(("precision", text + "no exact image can be expected"))
    return rows


def map_data(maps: Sequence[PeeledMap]) -> list[dict[str, object]]:
    """Return what JSON says of each map."""
    return [
        {
            "layers": list(found.names),
            "shape": list(found.estimate.value.shape),
            "equations": found.equations,
            "unknowns": found.unknowns,
            "condition": found.condition,
            "residual": found.residual,
            "settled": found.changed,
        }
        for found in maps
    ]


def save_map_sheet(path: str, maps: Sequence[PeeledMap]) -> None:
    """Write the first channels of each map and sample as a contact sheet, head first."""
    from gradleak.images import channel_strip, contact_sheet, save_sheet

    rows = []
    for found in maps:
        value = found.estimate.value
        if value.dim() != 4:
            continue
        size = " x ".join(map(str, value.shape[1:]))
        caption = f"{found.names[0]}: {size}, residual {found.residual:.0e}"
        scale = max(1, _SHEET_HEIGHT // value.shape[-2])
        strips = [channel_strip(sample, _CHANNELS, scale) for sample in value]
        rows.append([(caption if n == 0 else f"sample {n}", s) for n, s in enumerate(strips)])
    if rows:
        save_sheet(path, contact_sheet(rows, scale=1))


def _line(found: PeeledMap) -> str:
    shape = "×".join(map(str, found.estimate.value.shape))
    settled = f", {found.changed} units settled" if found.changed else ""
    return (
        f"{shape}, {found.equations} equations for {found.unknowns} unknowns a channel, "
        f"condition {found.condition:.2g}, residual {found.residual:.2g}{settled}"
    )
