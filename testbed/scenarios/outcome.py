"""All runs of a scenario: every scheme with every seed, in two processes or more, joined into means and confidence.

Every seed is one independent sample of the traffic; schemes meet the same traffic under the same seed, so a change is
compared seed by seed. Intervals are Student's t over the seeds.
"""

import math
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from simulator.results import FlowResults
from simulator.statistics import FlowStatistics, Group
from testbed.scenarios.catalogue import Scenario
from testbed.scenarios.contenders import contenders
from testbed.scenarios.loop import Run, Trail, play

BASELINE = "fair"  # changes are told against it
CONFIDENCE = 0.95
_FIELDS = ("mean_us", "p99_us", "mean_slowdown", "p99_slowdown")


@dataclass(frozen=True)
class Sample:
    """One scheme under one seed: statistics of all flows, and of each hour."""

    name: str
    seed: int
    overall: dict[str, Any]
    hours: list[dict[str, Any]]
    thresholds: list[list[list[int]]]
    decisions: int


def measure(
    scenario: Scenario,
    names: str,
    seeds: Sequence[int],
    levels: int,
    workers: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Run every scheme with every seed; the document that `scenario run --json` prints.

    Args:
        scenario: what is run.
        names: schemes, by commas; empty for all.
        seeds: at least one.
        levels: K.
        workers: processes.
        progress: called with the scheme's name after every run.
    """
    chosen = contenders(names)
    wanted = [(contender.name, seed) for seed in seeds for contender in chosen]
    samples: list[Sample] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(wanted))) as pool:
        tasks = [(scenario, name, seed, levels) for name, seed in wanted]
        for sample in pool.imap_unordered(_one, tasks):
            samples.append(sample)
            progress(sample.name)
    return document(scenario, samples, seeds, levels)


def document(scenario: Scenario, samples: Sequence[Sample], seeds: Sequence[int], levels: int) -> dict[str, Any]:
    """What `scenario run --json` prints of samples of every scheme with every seed, wherever they were taken."""
    present = {sample.name for sample in samples}
    by_name = {
        contender.name: sorted((s for s in samples if s.name == contender.name), key=lambda s: s.seed)
        for contender in contenders()
        if contender.name in present
    }
    base = by_name.get(BASELINE)
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "on": "simulator",
        "seeds": list(seeds),
        "levels": levels,
        "link_rate_bps": scenario.link_rate_bps,
        "hour_s": scenario.hour_s,
        "interval_s": scenario.interval_s,
        "send_buffer_bytes": scenario.send_buffer_bytes,
        "hours": [
            [{"group": group.name, "ports": group.ports, **asdict(group.hours[hour])} for group in scenario.groups]
            for hour in range(scenario.hours)
        ],
        "schemes": {name: _joined(group, base) for name, group in by_name.items()},
    }


def _one(task: tuple[Scenario, str, int, int]) -> Sample:
    """In a worker process: contenders hold functions, so they travel by name."""
    import torch  # only where one may learn

    scenario, name, seed, levels = task
    torch.set_num_threads(1)  # runs are side by side already
    (contender,) = contenders(name)
    return sample_of(name, seed, play(Run(scenario, contender, seed, levels)))


def sample_of(name: str, seed: int, trail: Trail) -> Sample:
    """The statistics of a run."""
    return Sample(
        name,
        seed,
        _statistics(FlowResults.joined(trail.hours)),
        [_statistics(hour) for hour in trail.hours],
        trail.thresholds,
        trail.decisions,
    )


def _statistics(flows: FlowResults) -> dict[str, Any]:
    counted = FlowStatistics(exact=True)
    counted.add(flows)
    summary = counted.summary()
    return _numbers(summary.overall) | {"buckets": [{"name": b.name, **_numbers(b)} for b in summary.buckets]}


def _numbers(group: Group) -> dict[str, float]:
    return {"flows": group.flows, **{name: getattr(group, name) for name in _FIELDS}}


def _joined(samples: list[Sample], base: list[Sample] | None) -> dict[str, Any]:
    """Means over the seeds."""
    found = _over_seeds([s.overall for s in samples])
    found["hours"] = [_over_seeds([s.hours[hour] for s in samples]) for hour in range(len(samples[0].hours))]
    found["decisions"] = float(np.mean([s.decisions for s in samples]))
    found["thresholds"] = samples[0].thresholds  # of the first seed
    if base is not None:
        for field in ("mean_us", "p99_us", "mean_slowdown"):
            ratios = [s.overall[field] / b.overall[field] - 1 for s, b in zip(samples, base, strict=True)]
            mean, low, high = confidence(ratios)
            found[f"{field.removesuffix('_us')}_change"] = {"mean": mean, "low": low, "high": high}
    return found


def _over_seeds(samples: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"flows": sum(s["flows"] for s in samples)}
    for field in _FIELDS:
        mean, low, high = confidence([s[field] for s in samples])
        found[field] = mean
        found[f"{field}_interval"] = [low, high]
    names = dict.fromkeys(bucket["name"] for s in samples for bucket in s.get("buckets", []))
    if names:
        found["buckets"] = [
            {"name": name, **_over_seeds([b for s in samples for b in s["buckets"] if b["name"] == name])}
            for name in names
        ]
    return found


def confidence(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of its 95 % confidence interval (Student's t); None for the ends of a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * float(np.std(values, ddof=1))
    half /= math.sqrt(len(values))
    return mean, mean - half, mean + half
