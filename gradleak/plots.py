"""Pictures of a label search, drawn with matplotlib, which comes with the extra ``plot``."""

from __future__ import annotations

import math
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradleak.errors import UsageError
from gradleak.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradleak.labels.curves import Curve, Curves, Root
    from gradleak.labels.verdict import LabelResult, SampleLabel

SUFFIXES = (".png", ".pdf", ".svg")
_SIZE, _DPI = (12.0, 6.6), 110
# Residuals below this are rounding, above this far from any root.
_FLOOR, _CEILING = 1e-16, 1e3
_COLOURS = {
    "hard": "#8a8a8a",
    "smooth": "#0b6fb8",
    "mixup": "#d1620a",
    "mixup+smooth": "#7a3fa0",
    "mixup3": "#9a7b00",
    "mixup3+smooth": "#a3195b",
}
_ANSWER, _OTHER, _VALID = "#12803c", "#c02222", "#12803c"
_ROWS, _WRAP, _VISIBLE = 12, 150, 2e-3


def check_plot(path: str) -> None:
    """Raise :class:`UsageError` unless a picture can be drawn under this name."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--plot {path} is no kind of picture that is drawn", f"name it {', '.join(SUFFIXES)}"
        )
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", "pip install 'gradleak[plot]'"
        )


def save_label_plot(path: Path | str, curves: Curves, result: LabelResult, title: str) -> None:
    """Draw the scale search and the recovered label into a PNG, PDF or SVG, whole or not at all.

    Above ρ(s), below the paper's loss, negative scales left and positive ones right, every root
    marked; beside them the label. Raises :class:`UsageError` as ``check_plot`` does, ``OSError`` as
    the file system does.
    """
    check_plot(str(path))
    figure = label_figure(curves, result, title)
    kind = Path(path).suffix.lower()[1:]
    # Without the date the same gradient gives the same file.
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # A file name may hold letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(temporary, format=kind, dpi=_DPI, metadata=undated)


def label_figure(curves: Curves, result: LabelResult, title: str) -> Figure:
    """Return the figure that ``save_label_plot`` writes, drawn without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    reason = textwrap.fill(f"{result.verdict}: {result.reason}", _WRAP, max_lines=3)
    figure.suptitle(f"{title}\n{reason}", fontsize="medium", parse_math=False)
    search, label = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.3, 1.0))[0]
    panels = search.subplots(2, 2, sharex="col", sharey="row", squeeze=False)
    _draw_search(panels[0], panels[1], curves)
    handles = _legend(curves, "answer" if result.verdict == "unique" else "the label shown")
    search.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    _draw_label(label.subplots(), curves, result)
    return figure


def _draw_search(upper: Sequence[Axes], lower: Sequence[Axes], curves: Curves) -> None:
    """Fill 2 × 2 panels: ρ above and the paper's loss below, negative and positive scales."""
    for above, below, sign in zip(upper, lower, (-1, 1), strict=True):
        for panel, drawn in ((above, curves.residuals), (below, curves.losses)):
            _draw_curves(panel, curves, drawn, sign)
        for root in curves.roots:
            if root.sample.scale * sign > 0:
                _mark(above, root, root.residual)
                _mark(below, root, root.loss)
        below.axhline(curves.tolerance, color="black", linewidth=0.9, linestyle=":")
        above.set_title(f"{'negative' if sign < 0 else 'positive'} scales", fontsize="medium")
        below.set_xlabel("scale s of the feature, x = s v")
    upper[0].set_ylabel("ρ(s): variance left over,\nin units of the gradient's")
    lower[0].set_ylabel("the paper's loss:\n1000 × variance left over")
    _limit(upper[0], curves.residuals, (0.3, 3.0))
    _limit(lower[0], curves.losses, (0.3 * curves.tolerance, 3.0))


def _draw_curves(panel: Axes, curves: Curves, drawn: Sequence[Curve], sign: int) -> None:
    """Draw the curves of one sign over a logarithmic axis that grows away from the middle."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    here = curves.scales * sign > 0
    scale = curves.scales[here].abs().numpy()
    panel.set_xscale("log")
    panel.set_yscale("log")
    for curve in drawn:
        values = curve.values[here].clamp(_FLOOR, None).numpy()
        panel.plot(scale, values, **_style(curve.family))
    panel.fill_between(
        scale,
        0.0,
        1.0,
        where=curves.valid[here].numpy(),
        transform=panel.get_xaxis_transform(),
        color=_VALID,
        alpha=0.10,
        linewidth=0.0,
    )
    panel.set_xlim(scale.min(), scale.max())
    minus = "−" if sign < 0 else ""
    close = scale.max() < 300.0 * scale.min()
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if close else (1.0,)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{minus}{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(True, which="major", linewidth=0.4, alpha=0.5)
    if sign < 0:
        panel.invert_xaxis()


def _style(family: str) -> dict[str, Any]:
    """Return how the curve of a family is drawn: with a base solid, without one dashed."""
    base = family.endswith("smooth")
    return {"color": _COLOURS[family], "linewidth": 1.5, "linestyle": "-" if base else (0, (5, 2))}


def _limit(panel: Axes, drawn: Sequence[Curve], least: tuple[float, float]) -> None:
    """Give a panel and its row the range of the curves: at least ``least``, and no rounding."""
    finite = [curve.values[curve.values.isfinite()] for curve in drawn]
    low = min([least[0], *(float(values.min()) for values in finite if len(values))])
    high = max([least[1], *(float(values.max()) for values in finite if len(values))])
    panel.set_ylim(0.3 * max(low, _FLOOR), min(high, _CEILING))


def _mark(panel: Axes, root: Root, depth: float | None) -> None:
    """Mark a root by a line over the whole height and, where its curve is drawn, at its bottom."""
    colour, scale = _ANSWER if root.answer else _OTHER, abs(root.sample.scale)
    line = "-" if root.answer else "--"
    panel.axvline(scale, color=colour, linewidth=0.9, linestyle=line, alpha=0.8, zorder=1)
    if depth is not None:
        face = colour if root.answer else "white"
        panel.plot([scale], [max(depth, _FLOOR)], "o", color=colour, markerfacecolor=face, zorder=4)


def _legend(curves: Curves, answer: str) -> list[Artist]:
    """Return what explains the curves and the marks, ``answer`` the name of the answer's."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    drawn = dict.fromkeys(curve.family for curve in (*curves.residuals, *curves.losses))
    handles: list[Artist] = [Line2D([], [], label=family, **_style(family)) for family in drawn]
    kinds = {root.answer for root in curves.roots}
    if True in kinds:
        handles.append(Line2D([], [], color=_ANSWER, marker="o", label=answer))
    if False in kinds:
        other = Line2D([], [], color=_OTHER, linestyle="--", marker="o", markerfacecolor="white")
        other.set_label("alternative")
        handles.append(other)
    handles.append(Patch(color=_VALID, alpha=0.10, label="y(s) is a label"))
    accepted = f"the paper accepts below {curves.tolerance:g}"
    handles.append(Line2D([], [], color="black", linewidth=0.9, linestyle=":", label=accepted))
    return handles


def _draw_label(panel: Axes, curves: Curves, result: LabelResult) -> None:
    """Draw the answer's entries as bars, the alternatives' as rings, the base as one bar of all."""
    panel.set_title("the recovered label", fontsize="medium")
    panel.set_xlim(0.0, 1.3)
    panel.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    panel.set_xlabel("weight of the class")
    panel.spines[["top", "right"]].set_visible(False)
    if not curves.roots or result.labels is None:
        panel.set_yticks([])
        panel.text(0.65, 0.5, "no label", ha="center", va="center", color="#666666")
        return
    classes = result.labels.shape[-1]
    shown = _classes_shown([root.sample for root in curves.roots], classes)
    names = [f"class {c}" for c in shown]
    if classes > len(shown):
        names.append(f"each of {classes - len(shown)} others")
    rows = range(len(names))
    for root in curves.roots:
        values, errors = _entries(root.sample, shown, len(names))
        if not root.answer:
            panel.plot(values, rows, "o", color=_OTHER, markerfacecolor="none")
            continue
        panel.barh(rows, values, xerr=errors, color=_ANSWER, height=0.6, ecolor="black", capsize=2)
        for row, value, error in zip(rows, values, errors, strict=True):
            end = max(0.0, value + (0.0 if math.isnan(error) else error)) + 0.02
            panel.text(min(end, 1.02), row, f"{value + 0.0:.4g}", va="center", fontsize=9)
    panel.set_yticks(rows, names)
    panel.set_ylim(max(len(names), 8) - 0.5, -0.5)


def _classes_shown(samples: Sequence[SampleLabel], classes: int) -> list[int]:
    """Return the classes with rows of their own: all where they are few, else the supports."""
    if classes <= _ROWS:
        return list(range(classes))
    named = dict.fromkeys(c for sample in samples for c in sample.classes)
    return list(named)[:_ROWS]


def _entries(
    sample: SampleLabel, shown: Sequence[int], rows: int
) -> tuple[list[float], list[float]]:
    """Return values and standard errors at the classes shown, and of the others in a last row."""
    named = zip(sample.weights, sample.weight_errors, strict=True)
    entry = dict(zip(sample.classes, named, strict=True))
    base = sample.base, sample.base_error
    both = [entry.get(c, base) for c in shown] + [base] * (rows - len(shown))
    # No bar for an error that is too small to see, or without bound.
    drawn = [e if math.isfinite(e) and e > _VISIBLE else math.nan for _, e in both]
    return [v for v, _ in both], drawn
