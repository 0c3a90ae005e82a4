"""What a person sees of a scenario: a table, and a picture of every hour and size."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fabricpilot.errors import UsageError
from simulator.report import draw_by_size


def table(document: dict[str, Any]) -> Table:
    """One line per scheme; changes are against fair sharing, seed by seed, with 95 % confidence."""
    seeds = len(document["seeds"])
    repeated = f"{seeds} seed{'s' * (seeds != 1)}, K = {document['levels']}"
    if document["on"] == "testbed":
        repeated += f", real TCP at {document['link_rate_bps'] / 1e6:g} Mbit/s, hours of {document['hour_s']:g} s"
    out = Table(
        title=f"{document['scenario']}: {document['about']}; {repeated}",
        title_justify="left",
        caption="times in ms; changes against fair; the last columns are the mean FCT of flows of that size",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    out.add_column("scheme", no_wrap=True)
    for heading in ("mean FCT", "change", "p99 FCT", "change", "slowdown"):
        out.add_column(heading, justify="right", no_wrap=True)
    shown = _bucket_names(document)
    for name in shown:
        out.add_column(name, justify="right", no_wrap=True)
    for name, found in document["schemes"].items():
        means = {bucket["name"]: bucket["mean_us"] for bucket in found["buckets"]}
        out.add_row(
            name,
            f"{found['mean_us'] / 1e3:.4g}",
            _change(found, "mean_change"),
            f"{found['p99_us'] / 1e3:.4g}",
            _change(found, "p99_change"),
            f"{found['mean_slowdown']:.2f}",
            *(f"{means[bucket] / 1e3:.4g}" if bucket in means else "" for bucket in shown),
        )
    return out


def plot(document: dict[str, Any], path: Path) -> None:
    """Three panels: mean and p99 FCT of every hour against fair sharing, and mean FCT by size.

    Raises:
        UsageError: the file cannot be written or its ending is no image format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    schemes = document["schemes"]
    base_name = "fair" if "fair" in schemes else next(iter(schemes))
    base = schemes[base_name]
    figure = Figure(figsize=(16, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    for panel, field in zip(panels[:2], ("mean_us", "p99_us"), strict=True):
        for index, (name, found) in enumerate(schemes.items()):
            relative = [hour[field] / of[field] for hour, of in zip(found["hours"], base["hours"], strict=True)]
            panel.plot(range(1, len(relative) + 1), relative, "o-", color=f"C{index}", label=name)
        panel.set_xticks(range(1, len(base["hours"]) + 1), _hour_names(document))
        panel.set_ylabel(
            f"{field.removesuffix('_us')} FCT over that of {'fair' if 'fair' in schemes else next(iter(schemes))}"
        )
        panel.set_xlabel("hour")
    draw_by_size(
        panels[2],
        {name: {b["name"]: b["mean_us"] for b in found["buckets"]} for name, found in schemes.items()},
    )
    panels[2].legend(fontsize="small")
    figure.suptitle(f"{document['scenario']}: {document['about']}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw {path}: {error}") from error


def _change(found: dict[str, Any], key: str) -> str:
    if key not in found:
        return ""
    change = found[key]
    if change["low"] is None or not (change["high"] - change["low"]):
        return f"{change['mean']:+.1%}"
    return f"{change['mean']:+.1%} ± {(change['high'] - change['low']) / 2:.1%}"


def _bucket_names(document: dict[str, Any]) -> list[str]:
    return [bucket["name"] for bucket in next(iter(document["schemes"].values()))["buckets"]]


def _hour_names(document: dict[str, Any]) -> list[str]:
    """Number, and where all groups run the same: workload and load."""
    names = []
    for number, groups in enumerate(document["hours"], 1):
        kinds = {(group["workload"].split("_")[0], group["load"]) for group in groups}
        same = f"\n{next(iter(kinds))[0]}\n{next(iter(kinds))[1]:g}" if len(kinds) == 1 else ""
        names.append(f"{number}{same}")
    return names
