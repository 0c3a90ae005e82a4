"""report.json: everything an experiment showed, for programs.

The first keys are what readers may rely on: schemes, dscp, lost_flows, workload, load, seed. The rest says what the
numbers depend on.
"""

from dataclasses import asdict
from typing import Any

from testbed.experiment import Capture, Outcome, SchemeOutcome
from testbed.report.fct import as_json, summarise
from testbed.report.table import change
from testbed.schemes import FABRICPILOT, FIFO


def document(outcome: Outcome) -> dict[str, Any]:
    """The report of an experiment."""
    plan = outcome.plan
    schemes = {
        name: as_json(summarise(scheme.results, outcome.calibration, plan.scale))
        for name, scheme in outcome.schemes.items()
    }
    return {
        "schemes": schemes,
        "dscp": _dscp(_shown(outcome)),
        "lost_flows": sum(scheme.results.lost for scheme in outcome.schemes.values()),
        "workload": plan.recipe.workload,
        "load": plan.load,
        "seed": plan.seed,
        "offered_load": round(outcome.trace.offered_load, 4),
        "flows": len(outcome.trace),
        "scale": plan.scale,
        "duration_s": plan.duration_s,
        "senders": plan.senders,
        "improvement": _improvement(schemes),
        "runs": {name: _run(scheme) for name, scheme in outcome.schemes.items()},
        "thresholds": [
            {"scheme": name, **entry} for name, scheme in outcome.schemes.items() for entry in scheme.thresholds
        ],
        "calibration": {
            "size_bytes": list(outcome.calibration.size_bytes),
            "fct_us": [round(ns / 1e3, 1) for ns in outcome.calibration.fct_ns],
        },
        "environment": outcome.environment,
    }


def _shown(outcome: Outcome) -> Capture | None:
    """The capture of fabricpilot, or of the first scheme that has one; those of all are with their runs."""
    captures = {name: scheme.capture for name, scheme in outcome.schemes.items() if scheme.capture is not None}
    return captures.get(FABRICPILOT, next(iter(captures.values()), None))


def _dscp(capture: Capture | None) -> dict[str, Any]:
    if capture is None:
        return {"checked": 0, "correct": 0}
    verdict = capture.verdict
    return {
        "checked": verdict.checked,
        "correct": verdict.correct,
        "at_threshold_change": verdict.at_change,
        "by_dscp": {str(code): count for code, count in sorted(verdict.by_dscp.items())},
        "flows_checked": verdict.flows,
        "flows_begun_before_the_window": verdict.skipped_flows,
        "packets_of_those": verdict.skipped_packets,
        "flows_with_a_gap": verdict.incomplete_flows,
        "captured": capture.packets,
        "missed_by_capture": capture.missed,
        "window_s": round(capture.window_s, 3),
        "wrong": [
            {
                "flow": list(wrong.packet.flow),
                "dscp": wrong.packet.dscp,
                "expected": list(wrong.expected),
                "attained_bytes": wrong.attained_bytes,
                "payload_bytes": wrong.packet.payload_bytes,
                "time_ns": wrong.packet.time_ns,
            }
            for wrong in verdict.wrong
        ],
    }


def _improvement(schemes: dict[str, Any]) -> dict[str, Any] | None:
    """Relative changes from FIFO to fabricpilot; -0.5 is half."""
    if FIFO not in schemes or FABRICPILOT not in schemes:
        return None
    before, after = schemes[FIFO], schemes[FABRICPILOT]
    columns = ("mean_us", "p50_us", "p99_us", "mean_slowdown")
    relative = {name: {c: change(before[name][c], after[name][c]) for c in columns} for name in before}
    return {
        name: {c: None if value is None else round(value, 4) for c, value in row.items()}
        for name, row in relative.items()
    }


def _run(scheme: SchemeOutcome) -> dict[str, Any]:
    return {
        "lost": scheme.results.lost,
        "elapsed_s": round(scheme.elapsed_s, 1),
        "generator_late_p99_us": round(scheme.results.late_p99_us, 1),
        "bottleneck": asdict(scheme.port),
        "tcp": asdict(scheme.tcp),
        "dscp": _dscp(scheme.capture),
        "daemons": [
            {
                "name": usage.name,
                "cpu_share": round(usage.cpu_s / scheme.elapsed_s, 4),
                "rss_mb": round(usage.rss_bytes / 1e6, 1),
            }
            for usage in scheme.usage
        ],
    }
