"""`fabricpilot bench planner --portfolio`: is `auto` ever behind a single solver that had the same time?

A cell is a problem and a deadline. `auto` runs first; where it proves its plan nobody can be ahead, elsewhere every
other solver runs with the same deadline. The difference is in fragment rate: below 0 `auto` is ahead.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from central.planner.model.problem import Limits

# (name, shape, objective, limits): what is hard in a way of its own
PROBLEMS: tuple[tuple[str, str, str, Limits], ...] = (
    ("medium", "medium", "fr", Limits(100)),
    ("mixed", "medium", "mixed", Limits(100)),
    ("affinity", "affinity", "fr", Limits(100)),
    ("large", "large", "fr", Limits(100)),
    ("large multi", "large", "multi", Limits(100)),
    ("multi", "multi", "multi", Limits(100)),
    ("multi bytes", "multi", "multi", Limits(100, max_bytes=1000 * 2**30)),
    ("bytes", "medium", "fr", Limits(100, max_bytes=400 * 2**30)),
    ("cap per PM", "medium", "fr", Limits(50, per_pm=1)),
    ("large tenants", "large", "fr", Limits(100, per_tenant=3)),
)
DEADLINES_S = (0.3, 1.0, 2.0, 5.0)
SINGLE = ("exact", "swap", "greedy", "packing", "lns", "learned", "guided", "beam", "pop")
SAME = 1e-9


def compare(
    names: Sequence[str], deadlines_s: Sequence[float], seeds: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[dict[str, Any]]:
    """One row per cell: what `auto` and every other solver reached.

    By CPU time as `clock` the lanes of `auto` run in turn, each with a processor of its own as it were; then a busy
    machine does not matter much (HiGHS still counts real seconds).
    """
    from central.planner.generator import generate, shape
    from central.planner.model.objective import parse_objective
    from central.planner.model.problem import Problem
    from central.planner.planning import make_plan

    for name, kind, objective, limits in PROBLEMS:
        if names and name not in names:
            continue
        for seed in range(1, seeds + 1):
            problem = Problem(generate(shape(kind), seed), parse_objective(objective), limits)
            make_plan(problem, "greedy", 0.1, seed, clock)  # whoever is first on a mapping finds the caches cold
            for deadline_s in deadlines_s:
                plan = make_plan(problem, "auto", deadline_s, seed, clock)
                proven = plan.gap is not None and plan.gap <= SAME
                rates = {"auto": plan.final.fragment_rate}
                late_s = plan.seconds - deadline_s
                for single in () if proven else SINGLE:
                    other = make_plan(problem, single, deadline_s, seed, clock)
                    rates[single] = other.final.fragment_rate
                    late_s = max(late_s, other.seconds - deadline_s)
                yield {
                    "problem": name,
                    "seed": seed,
                    "deadline_s": deadline_s,
                    "proven": proven,
                    "bound": plan.bound,
                    "rates": rates,
                    "latest_s": round(late_s, 3),  # seconds after the deadline, the worst of all
                    "best_single": None if proven else min(SINGLE, key=lambda one: rates[one]),
                    "difference": 0.0 if proven else rates["auto"] - min(rates[one] for one in SINGLE),
                }


def line(row: dict[str, Any]) -> str:
    """A row for a person."""
    start = f"{row['problem']:14} seed {row['seed']} {row['deadline_s']:4} s  auto {row['rates']['auto']:.4f}"
    if row["proven"]:
        return f"{start}  proven"
    best = row["best_single"]
    return f"{start}  best single {row['rates'][best]:.4f} ({best})  auto ahead by {-row['difference']:+.4f}"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Cells in all, proven, and where `auto` is behind."""
    behind = [row for row in rows if row["difference"] > SAME]
    return {
        "cells": len(rows),
        "proven": sum(row["proven"] for row in rows),
        "ahead": sum(row["difference"] < -SAME for row in rows),
        "behind": len(behind),
        "most_behind": max((row["difference"] for row in behind), default=0.0),
        "latest_s": max((row["latest_s"] for row in rows), default=0.0),
    }
