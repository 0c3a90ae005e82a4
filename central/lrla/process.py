"""The process that schedules long flows beside the daemon: table, scheme and torch live here, the link never waits.

One round: what hosts have said since the round before -> table -> one decision for all flows that need one, of all
hosts together -> a `Verdicts` message per host, encoded. A round takes as long as it takes; what arrives meanwhile is
the next one, so that under load decisions are batched by themselves.
"""

import gc
import time
from pathlib import Path

import msgspec
import numpy as np

from central.lrla.flow_set import LongFlowScheme
from central.lrla.synthetic import random_flows
from central.lrla.table import FlowTable, HostFlows
from central.lrla.turns import InTurn
from fabricpilot.config import LongFlowsSection
from fabricpilot.wire import MAX_VERDICTS, Verdicts, encode


class Round(msgspec.Struct, frozen=True):
    """Daemon to process."""

    now_s: float  # monotonic
    told: list[HostFlows]


class Answer(msgspec.Struct, frozen=True):
    """Process to daemon."""

    frames: list[tuple[str, bytes]]  # host, encoded `Verdicts`
    flows: int  # known now
    decided: int
    more: bool  # verdicts wait to be renewed: another round, also if nobody says anything
    inference_ms: float  # the scheme alone
    round_ms: float  # all of it


def scheme_of(section: LongFlowsSection) -> LongFlowScheme:
    """The scheme that `[long_flows]` names.

    Raises:
        UsageError: weights that cannot be read, or that choose rates.
    """
    if section.scheme == "in-turn":
        return InTurn(section.turn_bytes)
    if section.scheme != "learned":
        from central.lrla.rules import RULES

        return RULES[section.scheme]
    from central.lrla.learned import LearnedScheme
    from central.lrla.weights import SHIPPED, deployable

    return LearnedScheme(deployable(Path(section.weights or SHIPPED)))


class Scheduler:
    """One round after the other; the service of a `central.worker.Worker`."""

    def __init__(self, section: LongFlowsSection) -> None:
        self._scheme = scheme_of(section)
        self._table = FlowTable(section)
        self._scheme.decide(random_flows(2, np.random.default_rng(0)), np.arange(2))  # compiles, loads
        gc.freeze()  # what was loaded stays: no collection walks over it again

    def close(self) -> None:
        """Nothing is kept."""

    def answer(self, asked: Round) -> Answer:
        """Take in what hosts said, decide what is due."""
        began = time.perf_counter()
        for told in asked.told:
            self._table.update(told, asked.now_s)
        self._table.expire(asked.now_s)
        due = self._table.due(asked.now_s)
        if isinstance(self._scheme, InTurn) and asked.told:  # who goes on and who ended decide about the others
            flows, rows = self._table.flow_set()
            due = np.union1d(due, rows[self._scheme.changed(flows)])
        frames: list[tuple[str, bytes]] = []
        inference_ms = 0.0
        if len(due):
            flows, rows = self._table.flow_set()
            at = rows.searchsorted(due)
            thinking = time.perf_counter()
            choice = self._scheme.decide(flows, at)
            inference_ms = (time.perf_counter() - thinking) * 1e3
            for host, verdicts in self._table.verdicts(due, choice, asked.now_s).items():
                for first in range(0, len(verdicts), MAX_VERDICTS):
                    frames.append((host, encode(Verdicts(verdicts=verdicts[first : first + MAX_VERDICTS]))))
        more = len(self._table.due(asked.now_s)) > 0
        return Answer(frames, len(self._table), len(due), more, inference_ms, (time.perf_counter() - began) * 1e3)
