"""What ``reconstruct`` prints of an image: rows for people, data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradleak.cli.common import Report, exit_code_of, number
from gradleak.cli.map_report import map_data, map_summary

if TYPE_CHECKING:
    from gradleak.stages.reconstruct import ImageOutcome

# The data of a report on an input that gave no image.
NO_IMAGE: dict[str, object] = {
    "method": None,
    "batch_size": None,
    "exact": None,
    "residual": None,
    "precision": None,
    "matching": None,
    "warning": None,
    "estimated_psnr": None,
    "maps": [],
    "stopped": [],
    "fit": None,
    "null_control": None,
    "images": [],
    "device": None,
    "seconds": None,
}


def image_report(source: str, outcome: ImageOutcome, written: list[str]) -> Report:
    """Describe an outcome whose pictures are the files ``written``."""
    certificate, match = outcome.certificate, outcome.match
    rows = [
        ("verdict", f"{outcome.verdict}: {outcome.reason}"),
        ("method", outcome.method if match is None else _describe_match(outcome)),
        (
            "residual",
            f"{number(certificate.relative)} of the gradient, whose precision is "
            f"{number(certificate.precision)}",
        ),
        *([("beware", outcome.warning)] if outcome.warning else []),
        *_estimate_rows(outcome),
        *_control_rows(outcome),
        *map_summary(outcome.maps, outcome.barriers),
        *_fit_rows(outcome),
        ("solved in", f"{outcome.seconds:.3g} s on {outcome.device}"),
        *(("wrote", name) for name in written),
    ]
    data: dict[str, object] = {
        "input": source,
        "stage": "reconstruct",
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "method": outcome.method,
        "batch_size": len(outcome.images),
        "exact": certificate.exact,
        "residual": certificate.relative,
        "precision": certificate.precision,
        "matching": None
        if match is None
        else {
            "distance": match.options.distance,
            "optimiser": match.options.optimiser,
            "objective": match.objective,
            "steps": match.steps,
            "restart": match.restart,
            "stopped": match.stopped,
        },
        "warning": outcome.warning,
        "estimated_psnr": outcome.estimated and list(outcome.estimated),
        "maps": map_data(outcome.maps),
        "stopped": list(outcome.barriers),
        "fit": None
        if outcome.fitted is None
        else {
            "maps": list(outcome.fitted.cuts),
            "equations": outcome.fitted.equations,
            "residual": outcome.fitted.residual,
            "expected": outcome.fitted.expected,
            "steps": outcome.fitted.steps,
        },
        "null_control": None
        if outcome.control is None
        else {
            "method": outcome.control.method,
            "residual": outcome.control.certificate.relative,
        },
        "images": written,
        "device": outcome.device,
        "seconds": outcome.seconds,
    }
    return Report(source, rows, data, exit_code_of(outcome.verdict))


def _describe_match(outcome: ImageOutcome) -> str:
    match = outcome.match
    assert match is not None
    return (
        f"gradient matching, {match.options.distance} with {match.options.optimiser}, "
        f"{match.steps} steps, ended by {match.stopped}"
    )


def _fit_rows(outcome: ImageOutcome) -> list[tuple[str, str]]:
    fitted = outcome.fitted
    if fitted is None:
        return []
    text = (
        f"{', '.join(fitted.cuts)}: {fitted.equations} equations, missed by "
        f"{number(fitted.residual)}, of which their errors explain {number(fitted.expected)}"
    )
    return [("fitted to", text)]


def _control_rows(outcome: ImageOutcome) -> list[tuple[str, str]]:
    control = outcome.control
    if control is None:
        return []
    missed = number(control.certificate.relative)
    return [("null control", f"noise of the same norms gives a picture that misses it by {missed}")]


def _estimate_rows(outcome: ImageOutcome) -> list[tuple[str, str]]:
    if outcome.estimated is None:
        return []
    low, high = outcome.estimated
    return [("estimated", f"PSNR {low:.0f} to {high:.0f} dB, by the errors of the equations")]
