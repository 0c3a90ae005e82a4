"""Draws what thresholds do to each flow size: mean slowdown T(x)/x by the exact model, one line per method."""

from pathlib import Path

import numpy as np

from central.thresholds.exact import response_times
from central.thresholds.optimum import Optimum
from fabricpilot.errors import UsageError
from simulator.workloads.distribution import SizeDistribution


def draw(path: Path, sizes: SizeDistribution, optima: list[Optimum]) -> None:
    """Write the plot; its kind follows from the file's suffix.

    Raises:
        UsageError: the file cannot be written or has no known suffix.
    """
    from matplotlib.figure import Figure

    lowest = max(float(sizes.quantile(0.01)), 1.0)
    x = np.geomspace(min(lowest, sizes.max_bytes / 2), sizes.max_bytes, 600)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, optimum in enumerate(optima):
        times = response_times(sizes, optimum.load, optimum.thresholds, x, optimum.visible_bytes, optimum.turns)
        axes.plot(x, times / x, color=f"C{number}", label=f"{optimum.method}, {optimum.thresholds.levels} levels")
        for threshold in optimum.thresholds.bytes:
            if x[0] <= threshold < sizes.max_bytes:
                axes.axvline(threshold, color=f"C{number}", lw=0.6, alpha=0.5)
    load = optima[0].load
    axes.axhline(1 / (1 - load), color="0.4", ls="--", lw=1, label="fair sharing")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="flow size, bytes",
        ylabel="mean slowdown",
        title=f"{sizes.name}, load {load:g}",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw to {path}: {error}") from error
