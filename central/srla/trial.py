"""What an actor is worth: its thresholds without noise, beside the base's, on the same flows of given situations."""

from dataclasses import dataclass

import numpy as np

from central.srla.ddpg import Ddpg
from central.srla.encoding import ACTIONS, Encoding, Singles, mask_of
from central.srla.environment import Met, meet, objective_of
from fabricpilot.levels import Thresholds
from simulator.workloads.situations import Range, draw
from simulator.workloads.trace import Trace


@dataclass(frozen=True, eq=False)
class Case:
    """One situation: its flows, what a report says of it under the base, and what the base is worth on those flows."""

    met: Met
    trace: Trace
    state: Singles
    base_value: float

    def value(self, thresholds: Thresholds, objective: str) -> float:
        """The objective of these flows under `thresholds`."""
        return objective_of(self.met.under(thresholds, self.trace), objective)


@dataclass(frozen=True)
class Trial:
    """Cases that an actor is tried on again and again."""

    cases: tuple[Case, ...]
    encoding: Encoding
    objective: str

    @classmethod
    def of(cls, given: Range, count: int, flows: int, encoding: Encoding, objective: str, seed: int) -> "Trial":
        """`count` situations out of the range, with `flows` flows each."""
        random = np.random.default_rng(seed)
        cases = []
        for _ in range(count):
            met = meet(draw(given, random), flows, encoding, random)
            at_base = encoding.thresholds_at(met.base, np.zeros(ACTIONS))
            # What is reported comes from other flows than those the thresholds are judged by.
            reported = met.under(at_base, met.situation.trace(flows, random))
            trace = met.situation.trace(flows, random)
            state = encoding.state_of(met.summary(at_base, reported), met.base)
            cases.append(Case(met, trace, state, objective_of(met.under(at_base, trace), objective)))
        return cls(tuple(cases), encoding, objective)

    def thresholds(self, agent: Ddpg) -> list[Thresholds]:
        """The actor's answer to each case."""
        states = np.stack([case.state for case in self.cases])
        masks = np.stack([mask_of(case.met.situation.levels) for case in self.cases])
        actions = agent.act(states, masks)
        return [
            self.encoding.thresholds_at(case.met.base, action) for case, action in zip(self.cases, actions, strict=True)
        ]

    def gain(self, agent: Ddpg) -> float:
        """Mean over the cases of 100 log(base / actor): about percent below the base."""
        gains = [
            np.log(case.base_value / case.value(chosen, self.objective))
            for case, chosen in zip(self.cases, self.thresholds(agent), strict=True)
        ]
        return 100 * float(np.mean(gains))
