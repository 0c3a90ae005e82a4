"""What a person sees of a run: a table in the terminal, and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fabricpilot.errors import UsageError
from simulator.statistics import BUCKETS, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(summaries: Mapping[str, Summary], title: str) -> Table:
    """One line per scheme; percentages are mean FCT against the first scheme."""
    caption = "times in ms; the last columns are the mean FCT of flows of that size"
    out = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    out.add_column("scheme", no_wrap=True)
    for heading in ("mean FCT", "change", "p99 FCT", "slowdown", "p99"):
        out.add_column(heading, justify="right", no_wrap=True)
    shown = [name for name, _ in BUCKETS if any(name == b.name for s in summaries.values() for b in s.buckets)]
    for name in shown:
        out.add_column(name, justify="right", no_wrap=True)
    first = next(iter(summaries.values())).overall.mean_us
    for scheme, summary in summaries.items():
        all_flows = summary.overall
        change = (
            "" if summary.overall is next(iter(summaries.values())).overall else f"{all_flows.mean_us / first - 1:+.1%}"
        )
        by_name = {b.name: b for b in summary.buckets}
        out.add_row(
            scheme,
            f"{all_flows.mean_us / 1e3:.4g}",
            change,
            f"{all_flows.p99_us / 1e3:.4g}",
            f"{all_flows.mean_slowdown:.2f}",
            f"{all_flows.p99_slowdown:.1f}",
            *(f"{by_name[name].mean_us / 1e3:.4g}" if name in by_name else "" for name in shown),
        )
    return out


def plot(summaries: Mapping[str, Summary], title: str, path: Path) -> None:
    """Two panels into an image file: mean FCT by size bucket, and slowdown percentiles by size.

    Raises:
        UsageError: the file cannot be written or its ending is no image format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_by_size(left, {n: {b.name: b.mean_us for b in s.buckets} for n, s in summaries.items()})
    for index, (scheme, summary) in enumerate(summaries.items()):
        middle = [c.name.removeprefix("<= ").removeprefix("> ").removesuffix(" B") for c in summary.classes]
        sizes = [float(edge) for edge in middle]
        right.plot(sizes, [c.p50_slowdown for c in summary.classes], color=f"C{index}", label=f"{scheme}, median")
        right.plot(sizes, [c.p99_slowdown for c in summary.classes], "--", color=f"C{index}", label=f"{scheme}, p99")
    left.legend()
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("flow size (bytes, upper edge of class)")
    right.set_ylabel("slowdown")
    right.legend(fontsize="small")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw {path}: {error}") from error


def draw_by_size(panel: "Axes", mean_us: Mapping[str, Mapping[str, float]]) -> None:
    """Bars beside each other: mean FCT of every scheme by size bucket, `{scheme: {bucket: microseconds}}`."""
    shown = [name for name, _ in BUCKETS if any(name in means for means in mean_us.values())]
    width = 0.8 / len(mean_us)
    for index, (scheme, means) in enumerate(mean_us.items()):
        at = [i + (index - (len(mean_us) - 1) / 2) * width for i, name in enumerate(shown) if name in means]
        heights = [means[name] / 1e3 for name in shown if name in means]
        panel.bar(at, heights, width, label=scheme, color=f"C{index}")
    panel.set_xticks(range(len(shown)), shown)
    panel.set_yscale("log")
    panel.set_ylabel("mean FCT (ms)")
    panel.set_xlabel("flow size")
