"""The FCT table for a terminal: every class under every scheme, and what the last scheme changes against the first."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from testbed.report.fct import SIZE_CLASS_TITLES, SIZE_CLASSES, FctSummary

_COLUMNS = ("mean_us", "p50_us", "p99_us", "mean_slowdown")


def fct_table(schemes: Mapping[str, Mapping[str, FctSummary]]) -> Table:
    """FCT in milliseconds and mean slowdown; the last scheme is compared with the first."""
    names = list(schemes)
    table = Table(title="Flow completion times (ms)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("flow size", no_wrap=True)
    table.add_column("scheme", no_wrap=True)
    for heading in ("flows", "mean", "median", "p99", "slowdown"):
        table.add_column(heading, justify="right")
    for size_class in SIZE_CLASSES:
        for number, name in enumerate(names):
            summary = schemes[name][size_class]
            title = SIZE_CLASS_TITLES[size_class] if number == 0 else ""
            cells = [_cell(getattr(summary, c), c) for c in _COLUMNS]
            table.add_row(title, name, f"{summary.count:,}", *cells)
        if len(names) > 1:
            first, last = schemes[names[0]][size_class], schemes[names[-1]][size_class]
            changes = [change(getattr(first, c), getattr(last, c)) for c in _COLUMNS]
            table.add_row("", "[dim]change[/dim]", "", *(_coloured(c) for c in changes))
        table.add_section()
    return table


def change(before: float | None, after: float | None) -> float | None:
    """Relative change, -0.5 for half; None where it is not defined."""
    return None if not before or after is None else after / before - 1


def _cell(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    if column != "mean_slowdown":
        value /= 1000  # milliseconds
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _coloured(relative: float | None) -> str:
    if relative is None:
        return "-"
    colour = "green" if relative < -0.01 else "red" if relative > 0.01 else "dim"
    return f"[{colour}]{relative:+.1%}[/{colour}]"
