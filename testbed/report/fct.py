"""Flow completion times by size class: the numbers every comparison is made of.

The classes are those of the literature, in sizes of the published distribution: what is sent is scaled, so sizes
are divided by the scale before they are classed. KB and MB are decimal.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from testbed.flows.calibration import Calibration
from testbed.flows.results import Results

KB, MB = 1_000, 1_000_000

# name in report.json: (above, up to), unscaled bytes
SIZE_CLASSES: Mapping[str, tuple[float, float]] = {
    "all": (0, float("inf")),
    "small": (0, 100 * KB),
    "medium": (100 * KB, 10 * MB),
    "large": (10 * MB, float("inf")),
}
SIZE_CLASS_TITLES = {"all": "all", "small": "(0, 100 KB]", "medium": "(100 KB, 10 MB]", "large": "(10 MB, ∞)"}


@dataclass(frozen=True)
class FctSummary:
    """Completion times of the completed flows of one class; None where there are none."""

    count: int
    mean_us: float | None
    p50_us: float | None
    p99_us: float | None
    mean_slowdown: float | None
    p99_slowdown: float | None


def in_class(results: Results, scale: float, name: str) -> npt.NDArray[np.bool_]:
    """Which flows of the trace are of the class, shape (n,)."""
    above, up_to = SIZE_CLASSES[name]
    # Compared on the scaled side: a size of exactly 100 KB must not leave its class by rounding.
    size = results.trace.size_bytes
    member: npt.NDArray[np.bool_] = (size > above * scale) & (size <= up_to * scale)
    return member


def summarise(results: Results, calibration: Calibration, scale: float) -> dict[str, FctSummary]:
    """The summary of every class, over completed flows."""
    summaries = {}
    for name in SIZE_CLASSES:
        chosen = in_class(results, scale, name) & results.completed
        fct_us = results.fct_ns[chosen] / 1e3
        slowdown = results.fct_ns[chosen] / calibration.ideal_ns(results.trace.size_bytes[chosen])
        summaries[name] = _summary(fct_us, slowdown)
    return summaries


def _summary(fct_us: npt.NDArray[np.float64], slowdown: npt.NDArray[np.float64]) -> FctSummary:
    if len(fct_us) == 0:
        return FctSummary(0, None, None, None, None, None)
    p50, p99 = np.percentile(fct_us, [50, 99])
    return FctSummary(
        count=len(fct_us),
        mean_us=round(float(fct_us.mean()), 1),
        p50_us=round(float(p50), 1),
        p99_us=round(float(p99), 1),
        mean_slowdown=round(float(slowdown.mean()), 3),
        p99_slowdown=round(float(np.percentile(slowdown, 99)), 3),
    )


def as_json(summaries: Mapping[str, FctSummary]) -> dict[str, dict[str, float | int | None]]:
    """The summaries as they stand in report.json."""
    return {name: asdict(summary) for name, summary in summaries.items()}
