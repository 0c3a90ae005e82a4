"""What decisions, proposals and reports lead to: one guard per group and K, and the kill switch over all of them.

The daemon hands in what the scheme decided, what the learner proposed and what hosts reported; what hosts are to have
follows from the guards, and `Enforcement` sends it. Modes, changed by `fabricpilot central guard`:

    learning    the learner's proposals are tried, if policy.learn is "on"
    optimiser   everything returns to the scheme's decisions; proposals are not tried
    frozen      the same, and the scheme's new decisions do not count either: nothing changes any more

Mode, decisions and promotions survive a restart if there is a state folder.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

from central.clustering import MIN_FLOWS, divide
from central.enforcement import Enforcement
from central.guard.keeper import GroupGuard, Mode
from central.guard.memory import MAX_REMEMBERED, GuardMemory, Memory, Remembered
from central.learning import Lesson, Proposal
from central.policy.base import Decision, GroupSummary
from central.registry import Host, Registry
from fabricpilot.config import CentralConfig
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from fabricpilot.wire import Report

log = logging.getLogger(__name__)

MODES: tuple[Mode, ...] = get_args(Mode)
Key = tuple[str, int]  # group and K


class Steering:
    """All guards.

    Args:
        config: of central.
        registry: of the hosts.
        enforcement: sends what follows.
        memory: what survives a restart.
    """

    def __init__(
        self, config: CentralConfig, registry: Registry, enforcement: Enforcement, memory: GuardMemory
    ) -> None:
        self.guards: dict[Key, GroupGuard] = {}
        self.decisions: dict[Key, str] = {}  # what the scheme last said
        self.proposals: dict[Key, Proposal] = {}  # what the learner last said
        self._config = config
        self._registry = registry
        self._enforcement = enforcement
        self._memory = memory
        self._unwritten = False
        self._remembered = memory.read()
        self.mode: Mode = self._remembered.mode
        if self.mode != "learning":
            log.warning("the guard's mode is still '%s'; `fabricpilot central guard --resume` ends it", self.mode)

    def joined(self, host: Host, now_s: float) -> None:
        """A host has introduced itself: it gets what its group has."""
        self._welcome([host], now_s)

    def reported(self, host: Host, report: Report, now_s: float) -> None:
        """A host's report, already in the registry."""
        guard = self.guards.get((host.group, host.hello.levels))
        if guard is not None and guard.trial is not None and self._registry.follows(host):
            guard.observe(host.name, self._registry.experienced(host, report))
        self._enforcement.repeat(host, now_s)

    def regroup(self, now_s: float) -> None:
        """Divide the groups by what their hosts send; those that change their part get what it has."""
        for group, hosts in self._registry.by_configured_group().items():
            sizes = {host.name: host.sizes.at(now_s) for host in hosts}
            enough = {name: counts for name, counts in sizes.items() if counts.sum() >= MIN_FLOWS}
            parts = divide(enough, {host.name: host.cluster for host in hosts})
            moved = [host for host in hosts if parts.get(host.name, host.cluster) != host.cluster]
            for host in moved:
                self._registry.move(host, parts[host.name])
            if moved:
                log.info("group %s: %d host(s) go to another part by what they send", group, len(moved))
                self._welcome(moved, now_s)

    def questions(self, summaries: Iterable[GroupSummary]) -> list[GroupSummary]:
        """For the scheme: it compares with what it last decided itself, whatever was promoted since."""
        return [replace(summary, thresholds=self._guard(summary).baseline) for summary in summaries]

    def lesson(self, summaries: Iterable[GroupSummary], now_s: float) -> Lesson:
        """For the learner: what came of which thresholds, and the groups that may try something new."""
        observed, asked = [], []
        for summary in summaries:
            arms = [summary, self._registry.on_trial(summary, now_s)]
            observed += [arm for arm in arms if arm and arm.thresholds and arm.outcome]
            guard = self._guard(summary)
            if summary.thresholds and summary.outcome and guard.trial is None and not guard.resting_s(now_s):
                asked.append(summary)
        return Lesson(tuple(observed), tuple(asked))

    def decide(self, summary: GroupSummary, decision: Decision, now_s: float) -> None:
        """Put a decision of the scheme into force."""
        key = _key(summary)
        self.decisions[key] = decision.reason
        if decision.thresholds is None or summary.group not in self._registry.groups:
            return
        guard = self._guard(summary)
        if self.mode == "frozen" and guard.baseline is not None:
            return
        guard.decided(decision.thresholds, decision.reason)
        self._follow(summary, now_s)
        self._unwritten = True  # a decision for each of many groups is written once

    def propose(self, summary: GroupSummary, proposal: Proposal, now_s: float) -> None:
        """Try a proposal of the learner, or only tell it, as `policy.learn` says."""
        key = _key(summary)
        before, self.proposals[key] = self.proposals.get(key), proposal
        if proposal.thresholds is None or summary.group not in self._registry.groups:
            return
        if not self._trying:
            if before is None or before.thresholds is None:
                log.info("group %s, K = %d: %s would be tried", *key, list(proposal.thresholds))
            return
        guard = self._guard(summary)
        hosts = self._names(summary)
        told = guard.last
        if guard.challenge(proposal.thresholds, summary, hosts, now_s):
            assert guard.trial is not None
            log.info(
                "group %s, K = %d: trial %d of %s, first on %d of %d hosts",
                *key,
                guard.tally.trials,
                list(guard.trial.challenger.bytes),
                len(guard.trial.canaries) or len(hosts),
                len(hosts),
            )
            self._follow(summary, now_s)
        elif guard.last != told:
            log.warning("group %s, K = %d: proposal %s", *key, guard.last)

    def recheck(self, summaries: Iterable[GroupSummary], now_s: float) -> None:
        """Try the scheme's decision against what was promoted long ago."""
        for summary in summaries:
            if self._trying and self._guard(summary).recheck(summary, self._names(summary), now_s):
                log.info("group %s, K = %d: what was promoted is tried against the scheme's own", *_key(summary))
                self._follow(summary, now_s)

    def advance(self, now_s: float) -> None:
        """Close the rounds that are complete, forget groups that have gone, and write down what has changed."""
        if self._unwritten:  # before a group with news is forgotten
            self.write_down()
        for key in [key for key in self.guards if key[0] not in self._registry.groups]:
            for known in (self.guards, self.decisions, self.proposals):
                known.pop(key, None)
        for key, guard in self.guards.items():
            if guard.trial is None:
                continue
            live = {host.name: host.interval_s for host in self._registry.members(*key)}
            was_on = guard.trial.on_challenger
            verdict = guard.advance(live, now_s)
            if verdict is not None:
                log.info("group %s, K = %d: challenger %s", *key, guard.last)
                self._unwritten = True
            if verdict is not None or guard.trial is None or guard.trial.on_challenger != was_on:
                self._follow(self._summary(key, now_s), now_s)
        if self._unwritten:
            self.write_down()

    def switch(self, mode: str, now_s: float) -> None:
        """Set the mode; anything but `learning` returns all groups to the scheme's decisions at once.

        Raises:
            UsageError: no such mode.
        """
        if mode not in MODES:
            raise UsageError(f"guard mode '{mode}' is unknown; choose one of {', '.join(MODES)}")
        if mode == self.mode:
            return
        log.warning("guard: mode '%s' instead of '%s'", mode, self.mode)
        self.mode = mode
        if mode != "learning":
            for key, guard in self.guards.items():
                guard.withdraw(f"mode '{mode}' was switched on")
                if key[0] in self._registry.groups:
                    self._follow(self._summary(key, now_s), now_s)
        self.write_down()

    def write_down(self) -> None:
        """Write down what holds; of groups that are not there now, what held last."""
        self._unwritten = False
        known = {(one.group, one.levels): one for one in self._remembered.groups}
        for key, guard in self.guards.items():
            if guard.baseline is not None:
                promoted = list(guard.promoted.bytes) if guard.promoted else None
                known.pop(key, None)
                known[key] = Remembered(*key, list(guard.baseline.bytes), promoted)
        self._remembered = Memory(self.mode, list(known.values())[-MAX_REMEMBERED:])
        self._memory.write(self._remembered)

    def _welcome(self, hosts: list[Host], now_s: float) -> None:
        """Tell hosts that are new in their groups what these have; also if nobody was there until now."""
        for key in sorted({(host.group, host.hello.levels) for host in hosts}):
            nobody_has_it = key[1] not in self._registry.groups[key[0]].in_force
            if nobody_has_it and (key in self.guards or self._remembered.of(*key) is not None):
                self._follow(self._summary(key, now_s), now_s)
        self._enforcement.tell(hosts, now_s)

    @property
    def _trying(self) -> bool:
        """Whether anything may be tried on hosts."""
        return self._config.policy.learn == "on" and self.mode == "learning"

    def _names(self, summary: GroupSummary) -> list[str]:
        return [host.name for host in self._registry.members(*_key(summary))]

    def _guard(self, summary: GroupSummary) -> GroupGuard:
        key = _key(summary)
        if key not in self.guards:
            guard = GroupGuard.of(self._config.guard, self._config.policy.objective)
            remembered = self._remembered.of(*key)
            if remembered is not None:
                guard.baseline = Thresholds.of(remembered.baseline)
                if remembered.promoted and self._config.policy.learn == "on":
                    guard.promoted = Thresholds.of(remembered.promoted)
                guard.reason = "as before the restart"
            self.guards[key] = guard
        return self.guards[key]

    def _summary(self, key: Key, now_s: float) -> GroupSummary:
        return next(s for s in self._registry.summaries(now_s, key[0]) if s.levels == key[1])

    def _follow(self, summary: GroupSummary, now_s: float) -> None:
        wanted = self._guard(summary).wanted
        if wanted is not None:
            self._enforcement.follow(summary, wanted, now_s)


def _key(summary: GroupSummary) -> Key:
    return summary.group, summary.levels
