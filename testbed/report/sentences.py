"""What a report says in plain sentences; the terminal and the page show the same ones."""

from typing import Any


def sentences(report: dict[str, Any]) -> list[str]:
    """The findings, most important first."""
    found = []
    improvement = report["improvement"]
    if improvement is not None:
        small, overall = improvement["small"], improvement["all"]
        found.append(
            f"Small flows: p99 {_factor(small['p99_us'])}, mean {_factor(small['mean_us'])}; "
            f"all flows: mean slowdown {_factor(overall['mean_slowdown'])} against FIFO."
        )
    completed = ", ".join(f"{name} {run['all']['count']:,}" for name, run in report["schemes"].items())
    found.append(f"Flows completed of {report['flows']:,}: {completed}; lost: {report['lost_flows']}.")
    for name, run in report["runs"].items():
        if run["dscp"]["checked"]:
            found.append(_dscp_sentence(name, run["dscp"]))
    retransmitted = ", ".join(
        f"{name} {run['bottleneck']['dropped']:,} packets dropped, {run['tcp']['timeouts']:,} timeouts, "
        f"{run['tcp']['syn_retransmits']:,} SYNs sent again"
        for name, run in report["runs"].items()
    )
    found.append(f"At the bottleneck: {retransmitted}.")
    for name, run in report["runs"].items():
        if run["daemons"]:
            costs = ", ".join(f"{d['name']} {d['cpu_share']:.1%} CPU, {d['rss_mb']:.0f} MB" for d in run["daemons"])
            found.append(f"Daemons under {name}: {costs}.")
    late = max(run["generator_late_p99_us"] for run in report["runs"].values())
    found.append(f"Flows started at most {late / 1000:.1f} ms late (p99); that is part of every completion time.")
    return found


def _dscp_sentence(scheme: str, dscp: dict[str, Any]) -> str:
    wrong = dscp["checked"] - dscp["correct"]
    return (
        f"DSCP under {scheme}: {dscp['correct']:,} of {dscp['checked']:,} captured packets of "
        f"{dscp['flows_checked']:,} flows carried the one their flow's bytes demanded ({wrong} did not; "
        f"{dscp['at_threshold_change']:,} were sent at a threshold change); "
        f"{dscp['missed_by_capture']} packets missed by the capture."
    )


def _factor(relative: float | None) -> str:
    """-0.75 reads '4.0 times lower'."""
    if relative is None or relative <= -1:
        return "not comparable"
    factor = 1 + relative
    return f"{1 / factor:.1f} times lower" if factor <= 1 else f"{factor:.2f} times higher"
