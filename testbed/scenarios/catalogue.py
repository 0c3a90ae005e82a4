"""What scenarios there are: groups of ports, each with a workload and a load for every hour.

A port is where traffic of a group meets (the link to one receiver, the only bottleneck of its senders). An hour of a
scenario is as long as its `hour_s` says: enough flows for a stable mean, and many of the controller's intervals. The
full size takes real hours. AuTO's scenarios are homogeneous, spatial and dynamic (SIGCOMM 2018, section 6).
"""

from dataclasses import dataclass, replace

import numpy as np

from fabricpilot.errors import UsageError
from simulator.schemes import DEFAULT_SEND_BUFFER_BYTES
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import hourly

WEB_SEARCH = "websearch_dctcp_bytes_trafficgenerator"
DATA_MINING = "datamining_vl2_bytes_trafficgenerator"
HADOOP = "facebook_hadoop_bytes_hpcc"
RPC = "qcluster_Google_AllRPC"
CACHE = "facebook_cache_raw_trafficgenerator"

SCHEDULE_SEED = 1  # of the dynamic scenario's hours: the same for every run, so that hours can be compared


@dataclass(frozen=True)
class Hour:
    """One hour of a group: which bundled flow-size distribution at which load of each of its ports."""

    workload: str
    load: float


@dataclass(frozen=True)
class PortGroup:
    """Ports whose senders share one policy.

    Attributes:
        name: of the host group.
        ports: how many there are.
        hours: one entry per hour of the scenario.
    """

    name: str
    ports: int
    hours: tuple[Hour, ...]

    @property
    def main_workload(self) -> str:
        """The one with the most hours; the earliest of several."""
        named = [hour.workload for hour in self.hours]
        return max(named, key=named.count)


@dataclass(frozen=True)
class Scenario:
    """Traffic, and how often the controller looks at it.

    Attributes:
        name: what `scenario run` calls it.
        about: one line.
        groups: all with the same number of hours.
        hour_s: length of an hour.
        interval_s: between two decisions.
        link_rate_bps: of every port.
        send_buffer_bytes: how much of what waits to be sent hosts see, where a scheme looks at it.
    """

    name: str
    about: str
    groups: tuple[PortGroup, ...]
    hour_s: float = 900.0
    interval_s: float = 45.0
    link_rate_bps: float = 1e9
    send_buffer_bytes: float = DEFAULT_SEND_BUFFER_BYTES

    @property
    def hours(self) -> int:
        """How many there are."""
        return len(self.groups[0].hours)

    def longer(self, factor: float) -> "Scenario":
        """The same with hours `factor` times as long; decisions come as often as before."""
        return replace(self, hour_s=self.hour_s * factor)


def _steady(*hours: Hour) -> tuple[PortGroup, ...]:
    return (PortGroup("all", 4, hours),)


def _dynamic() -> tuple[PortGroup, ...]:
    """Eight hours, each with another pair of workload and load, drawn with `SCHEDULE_SEED`."""
    both = [SizeDistribution.load(name) for name in (WEB_SEARCH, DATA_MINING)]
    phases = hourly(both, (0.6, 0.7, 0.8), 8, np.random.default_rng(SCHEDULE_SEED))
    return _steady(*(Hour(phase.distribution.name, phase.load) for phase in phases))


def _spatial() -> tuple[PortGroup, ...]:
    kinds = ((WEB_SEARCH, 0.6), (WEB_SEARCH, 0.8), (DATA_MINING, 0.6), (DATA_MINING, 0.6))
    return tuple(
        PortGroup(f"group{number}", 2, (Hour(workload, load),) * 2) for number, (workload, load) in enumerate(kinds, 1)
    )


def _mix() -> tuple[PortGroup, ...]:
    kinds = (("hadoop", HADOOP, 0.6), ("rpc", RPC, 0.6), ("cache", CACHE, 0.3))
    return tuple(PortGroup(name, 1, (Hour(workload, load),) * 2) for name, workload, load in kinds)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("websearch", "web search at load 0.8 everywhere, 2 hours", _steady(*[Hour(WEB_SEARCH, 0.8)] * 2)),
        Scenario("datamining", "data mining at load 0.8 everywhere, 2 hours", _steady(*[Hour(DATA_MINING, 0.8)] * 2)),
        Scenario("spatial", "four groups: web search 0.6 and 0.8, data mining 0.6 twice; 2 hours", _spatial()),
        Scenario("dynamic", "8 hours, each with another workload (web search, data mining) and load", _dynamic()),
        Scenario("mix", "Hadoop, RPC and cache traffic, a group each; 2 short hours", _mix(), 6.0, 0.3),
        Scenario(
            "overload",
            "web search at 0.8, an hour at 1.1, then 0.6 and 0.6",
            _steady(*(Hour(WEB_SEARCH, load) for load in (0.8, 1.1, 0.6, 0.6))),
        ),
    )
}


def scenario(name: str) -> Scenario:
    """A scenario by name.

    Raises:
        UsageError: there is none of that name; lists them.
    """
    if name not in SCENARIOS:
        raise UsageError(f"scenario '{name}' is unknown; choose from: {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
