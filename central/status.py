"""`central status` for people: tables of groups and hosts, and one line on the link."""

from typing import Any

from rich.console import Console
from rich.table import Table

_UNITS = ("", "k", "M", "G", "T")


def show(told: dict[str, Any], console: Console | None = None) -> None:
    """Print the answer of the daemon's control socket."""
    console = console or Console()
    decision = told["decision_s"]["last"]
    console.print(
        f"central {told['version']} at {told['endpoint']}{' (insecure)' if told['insecure'] else ''}, "
        f"up {told['uptime_s']:.0f} s, policy {told['scheme']}, {told['reports_per_s']:.1f} reports/s, "
        f"last decision took {'-' if decision is None else f'{decision * 1000:.0f} ms'}",
        highlight=False,
        soft_wrap=True,
    )
    groups = Table("group", "K", "applied", "load", "flows", "thresholds (bytes)")
    for group in told["groups"]:
        groups.add_row(
            group["name"],
            str(group["levels"]),
            f"{group['applied']} of {group['hosts']}",
            f"{group['load']:.2f}",
            f"{group['flows']:.0f}",
            " ".join(map(short, group["thresholds"] or [])) or "-",
        )
    console.print(groups)
    for group in told["groups"]:
        since = f"epoch {group['epoch']}, {group['reason']}" if group["epoch"] else "no policy sent yet"
        console.print(
            f"{group['name']}, K = {group['levels']}: {since}; last decision: {group['last_decision'] or '-'}",
            highlight=False,
            soft_wrap=True,
        )
    hosts = Table("host", "group", "state", "seen", "queues", "bit/s", "active", "long", "missed")
    for host in told["hosts"]:
        hosts.add_row(
            host["name"],
            host["group"],
            host["state"] if host["state"] == "up" else f"[red]{host['state']}[/red]",
            f"{host['seen_s']:.1f} s",
            host["queues"],
            short(host["sent_bps"]),
            str(host["active"]),
            str(host["long"]),
            str(host["missed"]),
        )
    console.print(hosts)
    counters = {**told["link"], **told["link"]["handshakes"]}
    console.print(
        ", ".join(f"{name} {value}" for name, value in counters.items() if name != "handshakes"),
        highlight=False,
        soft_wrap=True,
    )


def short(value: float) -> str:
    """A number with at most four digits and a decimal unit: 20480 is 20.48k."""
    step = 0
    while abs(value) >= 1000 and step < len(_UNITS) - 1:
        value /= 1000
        step += 1
    return f"{value:.4g}{_UNITS[step]}"
