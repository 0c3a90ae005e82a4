"""A scenario of the catalogue on real hosts: TCP in network namespaces, agents on the senders, central deciding.

    small scenario -> star with a port per group -> calibrate -> every scheme under every seed -> the same document

The names are those of `contenders`; ports and agents are what `testbed run` has for them. Thresholds that do not adapt
are the contender's own for each group, at the group's scale, held by agents that run alone; those that adapt come from
a central that `central run` would be, with the group of every host. Nothing of it stays, Ctrl-C included.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fabricpilot.errors import FabricpilotError
from fabricpilot.levels import Thresholds
from simulator.results import FlowResults
from testbed.daemons import Daemons, Role, running
from testbed.experiment import Steps, calibrated, programs_of, star_in_place
from testbed.flows.calibration import Calibration
from testbed.flows.recorded import RecordedTrace
from testbed.flows.replay import replay
from testbed.flows.results import Results
from testbed.netns.programs import Programs
from testbed.netns.registry import RUNTIME_DIR
from testbed.netns.star import StarPlan
from testbed.scenarios.contenders import Contender, contenders
from testbed.scenarios.loop import Trail
from testbed.scenarios.outcome import Sample, document, sample_of
from testbed.scenarios.small import SmallScenario, trace_of
from testbed.schemes import check_kernel, has_agents, mode_of, port_in_force, scaled, transport_of

_WINDOWS = 2  # decisions' intervals that central looks back, as in the simulator
_MIN_FLOWS = 50  # in that window: hours of seconds have few flows
_LEAST_REPORT_S = 0.25


@dataclass(frozen=True)
class Star:
    """What all runs share."""

    plan: StarPlan
    small: SmallScenario
    calibration: Calibration
    levels: int


def fit_for_hosts(names: str) -> tuple[list[Contender], dict[str, str]]:
    """The contenders named that a network can run, and the others with the reason.

    Raises:
        UsageError: an unknown one.
    """
    from central.policy.schemes import find

    refused = {c.name: find(c.on_testbed).refusal for c in contenders(names)}
    return [c for c in contenders(names) if not refused[c.name]], {n: why for n, why in refused.items() if why}


def measure_on_hosts(
    small: SmallScenario,
    chosen: Sequence[Contender],
    seeds: Sequence[int],
    levels: int,
    out_dir: Path,
    steps: Steps,
    runtime_dir: Path = RUNTIME_DIR,
) -> dict[str, Any]:
    """Run every scheme under every seed; the document of `outcome.document`, and what hosts add to it.

    Traces, flows and logs go to `out_dir`.

    Raises:
        KernelError: not root, or the kernel lacks what a scheme needs.
        FabricpilotError: with one line that says what failed; nothing of the star is left.
    """
    samples: list[Sample] = []
    added: dict[str, dict[str, Any]] = {c.name: {"lost": 0, "generator_late_p99_us": 0.0} for c in chosen}
    with star_in_place(small.senders, steps, runtime_dir, receivers=small.ports) as plan:
        programs = programs_of(plan, out_dir)
        check_kernel([c.on_testbed for c in chosen], plan, programs, small.rate_bps, small.buffer_bytes)
        traces = {seed: trace_of(small, seed) for seed in seeds}
        where = out_dir / "calibration"
        ideal = calibrated(plan, traces[seeds[0]], small.rate_bps, small.buffer_bytes, where, steps)
        star = Star(plan, small, ideal, levels)
        for seed in seeds:
            for contender in chosen:
                here = out_dir / f"{contender.name}-{seed}"
                results, thresholds, decisions = _run(star, contender, traces[seed], here, steps)
                results.save(here / "flows.csv")
                trail = Trail(_hours(star, results), thresholds, decisions)
                samples.append(sample_of(contender.name, seed, trail))
                told = added[contender.name]
                told["lost"] += results.lost
                told["generator_late_p99_us"] = round(max(told["generator_late_p99_us"], results.late_p99_us), 1)
    found = document(small.scenario, samples, seeds, levels)
    for name, told in added.items():
        found["schemes"][name] |= told
    return found | {"on": "testbed", "scales": list(small.scales), "senders": small.senders}


def _run(
    star: Star, contender: Contender, trace: RecordedTrace, out_dir: Path, steps: Steps
) -> tuple[Results, list[list[list[int]]], int]:
    """One scheme under one trace: every flow, thresholds as `Trail` has them, and how often central changed them."""
    small, scheme = star.small, contender.on_testbed
    programs = programs_of(star.plan, out_dir)
    steps.begin(f"{contender.name}: get ready", 1)
    with ExitStack() as stack:
        bottleneck = (star.plan, programs, small.rate_bps, small.buffer_bytes, star.levels)
        stack.enter_context(port_in_force(scheme, *bottleneck))
        daemons = stack.enter_context(running(_daemons(star, contender, programs))) if has_agents(scheme) else None
        steps.begin(f"{contender.name}: {len(trace):,} flows", len(trace))
        began_s = time.time()
        results = replay(
            star.plan,
            programs,
            trace,
            out_dir,
            drain_s=20.0 + 10 * int(trace.size_bytes.max()) * 8 / small.rate_bps,
            progress=lambda flows, at_s: steps.advance(flows, _clock(at_s, small.duration_s)),
            transport=transport_of(scheme),
        )
        thresholds, decisions = _thresholds(star, contender, daemons, began_s)
    return results, thresholds, decisions


def _daemons(star: Star, contender: Contender, programs: Programs) -> Daemons:
    small, here = star.small, star.small.scenario
    roles = {
        host.name: Role(here.groups[small.group_of(n)].name, _first(star, contender, small.group_of(n)))
        for n, host in enumerate(star.plan.sender_hosts)
    }
    return Daemons(
        star.plan,
        programs,
        small.rate_bps,
        here.interval_s,
        mode=mode_of(contender.on_testbed),
        scheme=contender.on_testbed,
        levels=star.levels,
        hints=contender.on_testbed == "qsjf",
        roles=roles,
        policy={"window_s": _WINDOWS * here.interval_s, "min_flows": _MIN_FLOWS},
        long_flows={"scheme": "in-turn"} if contender.turns else {},
        report_s=max(_LEAST_REPORT_S, min(1.0, here.interval_s / 2)),
        alone=contender.policy is None,
    )


def _clock(at_s: float, duration_s: float) -> str:
    return f"{max(0.0, at_s):.0f} of {duration_s:.0f} s" if at_s <= duration_s else "the last flows"


def _first(star: Star, contender: Contender, group: int) -> Thresholds | None:
    """What agents of a group begin with."""
    published = contender.ranking(star.small.scenario.groups[group], star.levels).thresholds
    return scaled(published, star.small.scales[group]) if published else None


def _thresholds(
    star: Star, contender: Contender, daemons: Daemons | None, began_s: float
) -> tuple[list[list[list[int]]], int]:
    """Thresholds of each group at the end of each hour, in published sizes, and how many decisions made them."""
    small, here = star.small, star.small.scenario
    if daemons is None:
        return [[] for _ in range(here.hours)], 0
    names = [group.name for group in here.groups]
    now = [_first(star, contender, number) for number in range(small.ports)]
    log = daemons.threshold_log
    changes = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    trail, at = [], 0
    for hour in range(here.hours):
        while at < len(changes) and changes[at]["time"] - began_s < (hour + 1) * here.hour_s:
            now[names.index(changes[at]["group"])] = Thresholds.of(changes[at]["thresholds"])
            at += 1
        trail.append(
            [
                [round(value / small.scales[group]) for value in vector.bytes] if vector else []
                for group, vector in enumerate(now)
            ]
        )
    return trail, len(changes)


def _hours(star: Star, results: Results) -> list[FlowResults]:
    """Completed flows by the hour they start in, in published sizes, as the simulator gives them."""
    small, trace, done = star.small, results.trace, np.flatnonzero(results.completed)
    scale = np.array(small.scales)[trace.sender % small.ports]
    flows = FlowResults(
        flow=done,
        size_bytes=(trace.size_bytes / scale)[done],
        start_s=trace.start_ns[done] / 1e9,
        fct_s=results.fct_ns[done] / 1e9,
        ideal_s=star.calibration.ideal_ns(trace.size_bytes[done]) / 1e9,
        host=trace.sender[done],
        destination=trace.sender[done] % small.ports,
    )
    hour_of = (flows.start_s // small.scenario.hour_s).astype(int).clip(0, small.scenario.hours - 1)
    by_hour = [flows.rows(hour_of == hour) for hour in range(small.scenario.hours)]
    if not all(map(len, by_hour)):
        raise FabricpilotError(f"no flow of hour {[len(h) for h in by_hour].index(0) + 1} completed; see its logs")
    return by_hour
