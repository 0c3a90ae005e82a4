"""What `fabricpilot central status` is told: groups with their guards, and hosts, as plain JSON values."""

import math
from typing import Any

from central.guard.keeper import GroupGuard
from central.policy.base import GroupSummary, Outcome
from central.registry import Host, Registry
from central.steering import Steering
from fabricpilot.levels import Thresholds


def group_status(registry: Registry, steering: Steering, summary: GroupSummary, now_s: float) -> dict[str, Any]:
    """One group and K: what is in force, how its flows fare, and what the guard is at."""
    key = (summary.group, summary.levels)
    group = registry.groups[summary.group]
    in_force, trial = group.in_force.get(summary.levels), group.on_trial.get(summary.levels)
    hosts = registry.members(*key)
    on_trial = registry.on_trial(summary, now_s)
    proposal = steering.proposals.get(key)
    guard = steering.guards.get(key)
    return {
        "name": summary.group,
        "levels": summary.levels,
        "hosts": summary.hosts,
        "applied": sum(_has_applied(registry, host) for host in hosts),
        "thresholds": _bytes(in_force.thresholds if in_force else None),
        "epoch": in_force.epoch if in_force else 0,
        "reason": in_force.reason if in_force else "",
        "last_decision": steering.decisions.get(key, ""),
        "since": round(in_force.since, 3) if in_force else None,
        "flows": round(summary.flows, 1),
        "load": round(summary.load, 4),
        "size_p50_bytes": _number(summary.sizes.quantile(0.5)),
        "size_p99_bytes": _number(summary.sizes.quantile(0.99)),
        "duration_p50_us": _number(group.durations.quantile(0.5, now_s)),
        "duration_p99_us": _number(group.durations.quantile(0.99, now_s)),
        "outcome": _outcome(summary.outcome),
        "trial": {
            "thresholds": list(trial.policy.thresholds.bytes),
            "epoch": trial.policy.epoch,
            "hosts": len(trial.hosts),
            "outcome": _outcome(on_trial.outcome if on_trial else None),
        }
        if trial
        else None,
        "guard": _guard_status(guard, now_s) if guard else None,
        "proposal": {"thresholds": proposal.thresholds, "reason": proposal.reason} if proposal else None,
    }


def host_status(registry: Registry, host: Host, now_s: float) -> dict[str, Any]:
    """One host."""
    policy = registry.policy_of(host)
    return {
        "name": host.name,
        "group": host.group,
        "state": "lost" if host.lost else "up",
        "seen_s": round(now_s - host.seen_s, 2),
        "levels": host.hello.levels,
        "backend": host.hello.backend,
        "queues": host.hello.queues,
        "version": host.hello.version,
        "epoch": host.epoch,
        "wanted_epoch": policy.epoch if policy else 0,
        "link_rate_bps": host.hello.link_rate_bps,
        "sent_bps": round(host.sent_bps),
        "reports": host.reports,
        "missed": host.missed,
        "restarts": host.restarts,
        "active": host.active,
        "long": host.long,
    }


def _guard_status(guard: GroupGuard, now_s: float) -> dict[str, Any]:
    trial = guard.trial
    effect = trial.effect() if trial else guard.effect
    return {
        "phase": guard.phase,
        "round": trial.rounds if trial else 0,
        "baseline": _bytes(guard.baseline),
        "promoted": _bytes(guard.promoted),
        "challenger": _bytes(trial.challenger if trial else None),
        # of the trial under way, or of the last one: change of completion times, -0.05 is 5 % less
        "effect": dict(zip(("mean", "low", "high"), map(_change, effect), strict=True)) if effect else None,
        "last": guard.last,
        "resting_s": round(guard.resting_s(now_s), 1),
        "trials": guard.tally.trials,
        "promotions": guard.tally.promoted,
        "rollbacks": guard.tally.rolled_back,
        "refused": guard.tally.refused,
    }


def _has_applied(registry: Registry, host: Host) -> bool:
    policy = registry.policy_of(host)
    return policy is not None and policy.epoch == host.epoch


def _outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    return {
        "flows": round(outcome.flows, 1),
        "mean_fct_us": round(outcome.mean_fct_s * 1e6, 1),
        "mean_slowdown": round(outcome.mean_slowdown, 4),
        "p99_slowdown": round(outcome.p99_slowdown, 3),
        "slowdown": [round(value, 4) for value in outcome.slowdown],
        "shares": [round(value, 4) for value in outcome.shares],
    }


def _bytes(thresholds: Thresholds | None) -> list[int] | None:
    return list(thresholds.bytes) if thresholds else None


def _change(log_slowdown: float) -> float | None:
    return round(math.expm1(log_slowdown), 4) if abs(log_slowdown) < 100 else None


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else round(value, 1)
