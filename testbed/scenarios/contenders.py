"""The schemes that a scenario compares: how each ranks flows, and what chooses its thresholds.

None of the fixed ones knows the scenario beforehand, except where its line says so. `CONTENDERS` is the order of
tables and pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from central.policy.base import ThresholdPolicy
from central.policy.schemes import policy_of
from fabricpilot.config import PolicySection
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds, default_thresholds
from fabricpilot.published import published, workload_of
from simulator.schemes import Scheme, equal_split, scheme
from simulator.workloads.distribution import SizeDistribution
from testbed.scenarios.catalogue import PortGroup

_QUANTILES = 2048  # points that a mixture of distributions is described by, per distribution


@dataclass(frozen=True)
class Contender:
    """One scheme.

    Attributes:
        name: in results.
        about: one line.
        ranking: how flows of a group are ranked, with K levels.
        policy: makes what decides on thresholds while the scenario runs; None: they stay.
        on_testbed: the scheme of `central.policy.schemes` that ports and agents of a real network run for it.
        turns: long flows, those of the last level, take turns.
    """

    name: str
    about: str
    ranking: Callable[[PortGroup, int], Scheme]
    policy: Callable[[], ThresholdPolicy] | None = None
    on_testbed: str = "mlfq"
    turns: bool = False


def _simple(name: str) -> Callable[[PortGroup, int], Scheme]:
    return lambda group, levels: scheme(name)


def _fixed(name: str, thresholds: Callable[[PortGroup, int], Thresholds]) -> Callable[[PortGroup, int], Scheme]:
    return lambda group, levels: scheme(name, thresholds=thresholds(group, levels))


def _web_search_at_80(group: PortGroup, levels: int) -> Thresholds:
    return published("websearch", levels, 0.8).thresholds


def _matched(group: PortGroup, levels: int) -> Thresholds:
    return published(workload_of(group.main_workload), levels, group.hours[0].load).thresholds


def _mismatched(group: PortGroup, levels: int) -> Thresholds:
    other = "websearch" if workload_of(group.main_workload) == "datamining" else "datamining"
    return published(other, levels, group.hours[0].load).thresholds


def _equal_split(group: PortGroup, levels: int) -> Thresholds:
    return equal_split(mixture(group), levels)


def _default(group: PortGroup, levels: int) -> Thresholds:
    return default_thresholds(levels)


def _in_turn(group: PortGroup, levels: int) -> Scheme:
    return replace(scheme("written", thresholds=default_thresholds(levels)), turns=True)


def _deciding(name: str) -> Callable[[], ThresholdPolicy]:
    """The policy of a scheme as central runs it by default."""
    return lambda: policy_of(PolicySection(scheme=name))


def mixture(group: PortGroup) -> SizeDistribution:
    """Sizes of all flows of a group over its hours, each workload by the number of flows it brings."""
    flows: dict[str, float] = {}
    for hour in group.hours:
        sizes = SizeDistribution.load(hour.workload)
        flows[hour.workload] = flows.get(hour.workload, 0.0) + hour.load / sizes.mean_bytes
    if len(flows) == 1:
        return SizeDistribution.load(group.main_workload)
    middles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    points = np.concatenate([SizeDistribution.load(name).quantile(middles) for name in flows])
    weights = np.repeat([count / _QUANTILES for count in flows.values()], _QUANTILES)
    order = np.argsort(points, kind="stable")
    cdf = np.cumsum(weights[order])
    return SizeDistribution(f"{group.name}, all hours", points[order], cdf / cdf[-1])


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("fair", "equal sharing, no priorities (TCP/DCTCP)", _simple("fair"), on_testbed="fair"),
        Contender(
            "pias-matched",
            "thresholds published for the group's main workload at its first load",
            _fixed("mlfq", _matched),
        ),
        Contender("pias-mismatched", "thresholds published for the other workload", _fixed("mlfq", _mismatched)),
        Contender("qlas", "AuTO's baseline: thresholds fixed for web search at 0.8", _fixed("mlfq", _web_search_at_80)),
        Contender(
            "qsjf",
            "knows sizes: levels by size, thresholds as qlas",
            _fixed("qsjf", _web_search_at_80),
            on_testbed="qsjf",
        ),
        Contender("equal-split", "knows all hours' sizes: quantiles as thresholds", _fixed("mlfq", _equal_split)),
        Contender(
            "optimiser",
            "the exact optimiser on what is reported",
            _fixed("mlfq", _default),
            _deciding("optimiser"),
            "optimiser",
        ),
        Contender("auto", "AuTO as published: 700 features", _fixed("mlfq", _default), _deciding("auto"), "auto"),
        Contender(
            "fabricpilot-levels",
            "the optimiser, levels by bytes written",
            _fixed("written", _default),
            _deciding("fabricpilot"),
            "fabricpilot",
        ),
        Contender(
            "fabricpilot",
            "the optimiser, levels by bytes written, long flows in turn",
            _in_turn,
            _deciding("fabricpilot"),
            "fabricpilot",
            turns=True,
        ),
        Contender(
            "srpt", "shortest remaining size first: knows everything, the bound", _simple("srpt"), on_testbed="srpt"
        ),
    )
}


def contenders(names: str = "") -> list[Contender]:
    """Those named, separated by commas, in the table's order; all by default.

    Raises:
        UsageError: an unknown one.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(CONTENDERS)
    for name in wanted:
        if name not in CONTENDERS:
            raise UsageError(f"scheme '{name}' is unknown here; choose from: {', '.join(CONTENDERS)}")
    return [contender for name, contender in CONTENDERS.items() if name in wanted]
