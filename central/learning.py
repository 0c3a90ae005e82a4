"""The learner as a worker's service: what came of thresholds in, proposals out, and a checkpoint now and then.

It runs in a process of its own, the only one of central that loads torch. Nothing it does reaches a host by itself:
proposals go to the guard as plain numbers. A learner that fails for one group proposes nothing for it.

The checkpoint is written whole or not at all, after a round when the last one is older than `CHECKPOINT_S`, and when
central ends. One that cannot be read is set aside, and learning begins anew.
"""

import importlib
import importlib.util
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from central.durable import replace_file
from central.policy.base import GroupSummary, Learner, LearnStats
from central.turns import Turns
from fabricpilot.config import PolicySection
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds

log = logging.getLogger(__name__)

CHECKPOINT_S = 30.0
CHECKPOINT = "learner.checkpoint"


@dataclass(frozen=True)
class Lesson:
    """One round for the learner.

    Attributes:
        observed: what came of thresholds, for groups under their incumbents and for hosts on trial.
        asked: groups to propose thresholds for.
    """

    observed: tuple[GroupSummary, ...]
    asked: tuple[GroupSummary, ...]


@dataclass(frozen=True)
class Proposal:
    """What a learner proposes: plain numbers, checked by nobody yet; None: nothing."""

    thresholds: tuple[float, ...] | None
    reason: str


@dataclass(frozen=True)
class Learned:
    """The answer to a lesson.

    Attributes:
        proposals: one per group asked for, in order.
        stats: of the last observation; None before the first.
        failures: calls of the learner that raised, so far.
        checkpoint_age_s: since the last checkpoint was written or read; None: there is none.
    """

    proposals: tuple[Proposal, ...]
    stats: LearnStats | None
    failures: int
    checkpoint_age_s: float | None


class Learning:
    """The learner that `[policy] learner` names.

    Args:
        section: which one, and what it is for.
        folder: of the checkpoint; None: nothing is kept.
    """

    def __init__(self, section: PolicySection, folder: Path | None) -> None:
        module, name = find_learner(section.learner)
        self._learner: Learner = getattr(importlib.import_module(module), name)(section)
        self._path = folder / CHECKPOINT if folder else None
        self._stats: LearnStats | None = None
        self._failures = 0
        self._saved_s: float | None = None
        self._lessons = Turns(self._learn, lambda _: None)
        self._proposing = Turns(self._propose, lambda _: Proposal(None, "waits for its turn: there are many groups"))
        if self._path is not None and self._path.exists():
            self._restore(self._path)

    def answer(self, asked: Lesson) -> Learned:
        """Learn from what was observed, then propose; of very many groups, for some."""
        self._lessons.answer(asked.observed)
        proposals = tuple(self._proposing.answer(asked.asked))
        if asked.observed and (self._saved_s is None or time.monotonic() - self._saved_s >= CHECKPOINT_S):
            self._save()
        age_s = None if self._saved_s is None else time.monotonic() - self._saved_s
        return Learned(proposals, self._stats, self._failures, age_s)

    def close(self) -> None:
        """Write the last checkpoint."""
        if self._stats is not None:
            self._save()

    def _learn(self, summary: GroupSummary) -> None:
        try:
            self._stats = self._learner.learn(summary)
        except Exception:
            self._failed("learn", summary)

    def _propose(self, summary: GroupSummary) -> Proposal:
        try:
            decision = self._learner.propose(summary)
            values = decision.thresholds
            if values is None:
                return Proposal(None, str(decision.reason))
            given = values.bytes if isinstance(values, Thresholds) else cast(Iterable[float], values)
            return Proposal(tuple(float(value) for value in given), str(decision.reason))
        except Exception as error:
            self._failed("propose", summary)
            return Proposal(None, f"{self._name} failed: {type(error).__name__}")

    def _failed(self, what: str, summary: GroupSummary) -> None:
        if not self._failures:  # the traceback once; the count tells the rest
            log.exception("learner %s failed to %s for group %s", self._name, what, summary.group)
        self._failures += 1

    def _restore(self, path: Path) -> None:
        try:
            self._learner.load(path)
        except Exception as error:
            aside = path.with_suffix(".unreadable")
            path.replace(aside)
            log.error("checkpoint %s cannot be read (%s); set aside as %s, learning anew", path, error, aside.name)
            return
        self._saved_s = time.monotonic()
        log.info("learner %s goes on from %s", self._name, path)

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            replace_file(self._path, self._learner.save)
        except Exception as error:
            log.error("cannot write checkpoint %s: %s", self._path, error)
            return
        self._saved_s = time.monotonic()

    @property
    def _name(self) -> str:
        return type(self._learner).__name__


def find_learner(reference: str) -> tuple[str, str]:
    """Module and class of a learner, without loading them.

    Raises:
        UsageError: not `module:Class`, or no such module.
    """
    module, _, name = reference.partition(":")
    try:
        found = importlib.util.find_spec(module) if name.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UsageError(f"policy.learner = '{reference}'; give module:Class of an installed learner")
    return module, name
