"""One picture: FCT distributions by size class, and the thresholds over time beneath."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from testbed.flows.results import Results
from testbed.report.fct import SIZE_CLASS_TITLES, SIZE_CLASSES, in_class

_COLOURS = (
    "#8a8f98",
    "#0b6e99",
    "#c0562f",
    "#4c8c4a",
    "#8e44ad",
    "#d9b310",
    "#5aa897",
    "#0b3c5d",
    "#d08ca7",
    "#2b3340",
)
_LEVEL_COLOURS = ("#0b3c5d", "#328cc1", "#5aa897", "#d9b310", "#c0562f", "#8e44ad", "#7f8c8d")


def draw(results: Mapping[str, Results], scale: float, thresholds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG.

    Args:
        results: of each scheme.
        scale: of the trace's flow sizes.
        thresholds: of all schemes, each with `scheme`, `time_s` (from the start of the traffic) and `thresholds`
            (bytes), in order of time within a scheme; those of the last scheme that has some are drawn.
        path: of the PNG.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, len(SIZE_CLASSES), height_ratios=(1.25, 1))
    for column, size_class in enumerate(SIZE_CLASSES):
        _distributions(figure.add_subplot(grid[0, column]), results, scale, size_class, first=column == 0)
    _thresholds(figure.add_subplot(grid[1, :]), results, thresholds)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _distributions(axes: Any, results: Mapping[str, Results], scale: float, size_class: str, *, first: bool) -> None:
    for (name, result), colour in zip(results.items(), cycle(_COLOURS), strict=False):
        chosen = in_class(result, scale, size_class) & result.completed
        fct_ms = np.sort(result.fct_ns[chosen] / 1e6)
        if len(fct_ms):
            axes.step(fct_ms, np.arange(1, len(fct_ms) + 1) / len(fct_ms), where="post", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.01)
    axes.set_title(f"flows of {SIZE_CLASS_TITLES[size_class]}" if size_class != "all" else "all flows", fontsize=10)
    axes.set_xlabel("FCT (ms)")
    axes.grid(visible=True, which="both", alpha=0.2)
    if first:
        axes.set_ylabel("share of flows")
        axes.legend(frameon=False)


def _thresholds(axes: Any, results: Mapping[str, Results], thresholds: Sequence[Mapping[str, Any]]) -> None:
    end_s = max(float(r.trace.start_ns[-1]) / 1e9 for r in results.values())
    scheme = thresholds[-1]["scheme"] if thresholds else ""
    if thresholds:
        thresholds = [entry for entry in thresholds if entry["scheme"] == scheme]
        times = [max(0.0, float(entry["time_s"])) for entry in thresholds] + [end_s]
        for level in range(len(thresholds[0]["thresholds"])):
            values = [entry["thresholds"][level] for entry in thresholds]
            colour = _LEVEL_COLOURS[level % len(_LEVEL_COLOURS)]
            axes.step(times, [*values, values[-1]], where="post", color=colour, label=f"level {level} to {level + 1}")
        axes.set_yscale("log")
        axes.legend(frameon=False, ncols=4, loc="best")
    else:
        axes.text(0.5, 0.5, "no thresholds were in force", ha="center", va="center", transform=axes.transAxes)
    axes.set_xlim(0, end_s)
    axes.set_xlabel("seconds since the traffic began")
    axes.set_ylabel("threshold (bytes)")
    axes.set_title(f"thresholds in force under {scheme}" if scheme else "thresholds", fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.2)
