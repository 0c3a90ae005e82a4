"""`central status` and `central guard` for people: tables of groups, guards and hosts; lines on learner and link."""

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
    groups = Table("group", "K", "applied", "load", "flows", "slowdown", "p99", "thresholds (bytes)")
    for group in told["groups"]:
        groups.add_row(
            group["name"],
            str(group["levels"]),
            f"{group['applied']} of {group['hosts']}",
            f"{group['load']:.2f}",
            f"{group['flows']:.0f}",
            *_fared(group["outcome"]),
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
    show_guard(told, console)
    console.print(_long_flows(told["long_flows"]), highlight=False, soft_wrap=True)
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


def _long_flows(told: dict[str, Any]) -> str:
    if told["scheme"] == "off":
        return "long flows: off"
    times = told["round_ms"]
    took = f"; a round took {times['p50']:.1f} ms, p99 {times['p99']:.1f} ms" if times["p50"] is not None else ""
    return f"long flows: {told['scheme']}, {told['flows']} under way, {told['decided']} decisions{took}"


def show_guard(told: dict[str, Any], console: Console | None = None) -> None:
    """What the guard is at, group by group, and how the learner does."""
    console = console or Console()
    console.print(f"guard mode {told['guard_mode']}; {_learner(told['learner'])}", highlight=False, soft_wrap=True)
    guards = Table("group", "K", "trial", "challenger (bytes)", "effect", "promoted", "rolled back", "refused")
    for group in told["groups"]:
        guard = group["guard"]
        if guard is None:
            continue
        guards.add_row(
            group["name"],
            str(group["levels"]),
            guard["phase"] if guard["phase"] == "idle" else f"{guard['phase']}, round {guard['round']}",
            " ".join(map(short, guard["challenger"] or guard["promoted"] or [])) or "-",
            _effect(guard["effect"]),
            str(guard["promotions"]),
            str(guard["rollbacks"]),
            str(guard["refused"]),
        )
    if guards.row_count:
        console.print(guards)
    for group in told["groups"]:
        if group["guard"] and group["guard"]["last"]:
            console.print(f"{group['name']}, K = {group['levels']}: {group['guard']['last']}", highlight=False)


def _learner(told: dict[str, Any]) -> str:
    if told["mode"] == "off":
        return "learning is off"
    if told["round_s"] is None:
        return f"learner {told['name']} ({told['mode']}) has not answered yet, {told['restarts']} restart(s)"
    return (
        f"learner {told['name']} ({told['mode']}): {told['transitions']} transitions, {told['updates']} updates, "
        f"last round {told['round_s'] * 1000:.0f} ms, {told['failures']} failure(s), {told['restarts']} restart(s)"
    )


def _effect(effect: dict[str, float | None] | None) -> str:
    """Change of completion times with its interval."""
    if effect is None or effect["mean"] is None:
        return "-"
    ends = ["?" if effect[end] is None else f"{effect[end]:+.1%}" for end in ("low", "high")]
    return f"{effect['mean']:+.1%} ({ends[0]} to {ends[1]})"


def _fared(outcome: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{outcome['mean_slowdown']:.2f}", f"{outcome['p99_slowdown']:.1f}") if outcome else ("-", "-")


def short(value: float) -> str:
    """A number with at most four digits and a decimal unit: 20480 is 20.48k."""
    step = 0
    while abs(value) >= 1000 and step < len(_UNITS) - 1:
        value /= 1000
        step += 1
    return f"{value:.4g}{_UNITS[step]}"
