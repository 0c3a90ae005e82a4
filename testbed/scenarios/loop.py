"""One scheme through one scenario with one seed: ports run, hosts report, central decides, thresholds come back.

The loop is central's own: every port's report goes into `central.registry.Registry`, and its group summaries to the
scheme's policy, which knows nothing else. Time is the simulation's.
"""

from dataclasses import dataclass, replace

from central.policy.base import ThresholdPolicy
from central.registry import InForce, Registry
from simulator.results import FlowResults
from simulator.schemes import BACKLOG, WRITTEN, Scheme
from testbed.scenarios.catalogue import Scenario
from testbed.scenarios.cell import Cell, CellPlace
from testbed.scenarios.contenders import Contender

_WINDOWS = 2  # intervals that a decision looks back, by exponential forgetting


@dataclass(frozen=True)
class Run:
    """What is to be run."""

    scenario: Scenario
    contender: Contender
    seed: int
    levels: int


@dataclass(frozen=True)
class Trail:
    """What came of it.

    Attributes:
        hours: finished flows by the hour in which they started.
        thresholds: of each group at the end of each hour, [hour][group]; empty where the scheme has none.
        decisions: changes of thresholds.
    """

    hours: list[FlowResults]
    thresholds: list[list[list[int]]]
    decisions: int


def play(run: Run) -> Trail:
    """Run it, to the end of the last flow."""
    scenario = run.scenario
    cells = [
        Cell(
            CellPlace(run.seed, number, port),
            group,
            scenario.hour_s,
            scenario.link_rate_bps,
            _in_sight(run.contender.ranking(group, run.levels), scenario.send_buffer_bytes),
        )
        for number, group in enumerate(scenario.groups)
        for port in range(group.ports)
    ]
    controller = _Controller(run, cells) if run.contender.policy else None
    ended: list[FlowResults] = []
    trail: list[list[list[int]]] = []
    for hour in range(scenario.hours):
        for cell in cells:
            cell.begin_hour(hour)
        begin_s, end_s = hour * scenario.hour_s, (hour + 1) * scenario.hour_s
        step = 1
        while controller is not None and begin_s + step * scenario.interval_s < end_s:
            ended += controller.step(begin_s + step * scenario.interval_s, cells)
            step += 1
        ended += controller.step(end_s, cells) if controller else [cell.run_until(end_s) for cell in cells]
        trail.append(controller.in_force() if controller else [])
    ended += [cell.run_until(float("inf")) for cell in cells]
    flows = FlowResults.joined(ended)
    hour_of = (flows.start_s // scenario.hour_s).astype(int).clip(0, scenario.hours - 1)
    by_hour = [flows.rows(hour_of == hour) for hour in range(scenario.hours)]
    return Trail(by_hour, trail, controller.changes if controller else 0)


def _in_sight(ranking: Scheme, send_buffer_bytes: float) -> Scheme:
    """The same with hosts that see so much of what waits to be sent."""
    return replace(ranking, send_buffer_bytes=send_buffer_bytes) if ranking.basis in (BACKLOG, WRITTEN) else ranking


class _Controller:
    """Central's side: a registry, one policy for all groups, and what it last decided."""

    def __init__(self, run: Run, cells: list[Cell]) -> None:
        assert run.contender.policy is not None
        self.changes = 0
        self._policy: ThresholdPolicy = run.contender.policy()
        self._interval_s = run.scenario.interval_s
        self._registry = Registry(_WINDOWS * self._interval_s, float("inf"), turns=run.contender.turns)
        self._groups: dict[str, list[Cell]] = {}
        for cell in cells:
            hello = cell.hello(run.levels)
            self._registry.hello(hello.host, b"", hello, 0.0)
            self._groups.setdefault(hello.group, []).append(cell)

    def step(self, now_s: float, cells: list[Cell]) -> list[FlowResults]:
        """Run all ports to `now_s`, let them report and decide; gives the flows that ended."""
        ended = []
        for cell in cells:
            flows = cell.run_until(now_s)
            ended.append(flows)
            self._registry.report(cell.place.name, b"", cell.report(flows, self._interval_s), now_s)
        for summary in self._registry.summaries(now_s):
            decision = self._policy.decide(summary)
            if decision.thresholds is not None:
                self.changes += 1
                group = self._registry.groups[summary.group]
                group.in_force[summary.levels] = InForce(decision.thresholds, self.changes, decision.reason, now_s)
                for cell in self._groups[summary.group]:
                    cell.set_thresholds(decision.thresholds)
        return ended

    def in_force(self) -> list[list[int]]:
        """Thresholds of every group; empty before its first decision."""
        found = []
        for name in self._groups:
            policies = list(self._registry.groups[name].in_force.values())
            found.append(list(policies[0].thresholds.bytes) if policies else [])
        return found
