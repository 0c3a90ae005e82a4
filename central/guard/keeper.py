"""The guard of one group and K: baseline, challenger, trial, and what was promoted.

The baseline is what the policy scheme (the optimiser, or fixed thresholds) decided; the learner's proposals are the
challengers. The incumbent is the baseline until a challenger was promoted, and again as soon as the scheme decides
otherwise: its thresholds are for the traffic of now, and the promoted ones were tried on that of then.

After a challenger that was rolled back the group rests, twice as long each time, so that a learner that is wrong all
the time costs less and less. What was promoted is tried again now and then, against the baseline as the challenger:
traffic may have changed in a way that the scheme does not see.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from central.guard.bounds import Bounds, InadmissibleError, admissible
from central.guard.canaries import canaries
from central.guard.contrast import bucket_weights
from central.guard.trial import Rules, Trial, Verdict
from central.outcomes import Experienced
from central.policy.base import GroupSummary, Outcome
from fabricpilot.config import GuardSection
from fabricpilot.levels import Thresholds

Mode = Literal["learning", "optimiser", "frozen"]

_SAME = 1.05  # proposals whose thresholds all lie within this factor of the incumbent's are no other policy
_MAX_REST_S = 3600.0
_SILENT_ROUND_S = 3.0  # a round ends at the latest so long, or three typical report intervals, after it began


@dataclass(frozen=True)
class Wanted:
    """Which hosts of the group are to have which thresholds.

    Attributes:
        incumbent: of all hosts but those on trial.
        challenger: of the hosts on trial; None while there are none.
        hosts: on trial.
        reason: of the last change, for the log and the hosts.
    """

    incumbent: Thresholds
    challenger: Thresholds | None
    hosts: frozenset[str]
    reason: str


@dataclass
class Tally:
    """What became of proposals so far."""

    trials: int = 0
    promoted: int = 0
    rolled_back: int = 0
    refused: int = 0


@dataclass
class GroupGuard:
    """State of one group and K; `now_s` in its methods is monotonic seconds."""

    rules: Rules
    bounds: Bounds
    canary_share: float
    rest_s: float
    recheck_s: float
    objective: str
    baseline: Thresholds | None = None
    promoted: Thresholds | None = None
    trial: Trial | None = None
    tally: Tally = field(default_factory=Tally)
    last: str = ""  # what was decided of the last challenger, and why
    effect: tuple[float, float, float] | None = None  # of the last trial
    reason: str = ""
    _failures: int = 0  # in a row
    _rest_until_s: float = 0.0
    _round_began_s: float = 0.0
    _recheck_at_s: float = 0.0
    _rechecks: bool = False  # the challenger on trial is the baseline

    @classmethod
    def of(cls, section: GuardSection, objective: str) -> "GroupGuard":
        """A guard as `[guard]` says."""
        return cls(
            Rules(section.alpha, section.canary_rounds, section.slice_rounds, section.max_pairs, section.max_harm),
            Bounds(section.lowest_bytes, section.highest_bytes, section.max_step),
            section.canary_share,
            section.rest_s,
            section.recheck_s,
            objective,
        )

    @property
    def incumbent(self) -> Thresholds | None:
        """What hosts have that try nothing; None before the scheme's first decision."""
        return self.promoted or self.baseline

    @property
    def wanted(self) -> Wanted | None:
        """What hosts are to have; None before the first decision."""
        if self.incumbent is None:
            return None
        hosts = self.trial.on_challenger if self.trial else frozenset()
        return Wanted(self.incumbent, self.trial.challenger if self.trial and hosts else None, hosts, self.reason)

    @property
    def phase(self) -> str:
        """For people: idle, or the phase of the trial."""
        return self.trial.phase if self.trial else "idle"

    def resting_s(self, now_s: float) -> float:
        """How long no challenger is tried; 0: one may come."""
        return max(0.0, self._rest_until_s - now_s)

    def decided(self, thresholds: Thresholds, reason: str) -> None:
        """The scheme's decision. It ends a trial and whatever was promoted before."""
        if self.trial is not None:
            self._end(Verdict(False, "the scheme decided anew"), blame=False)
        self.baseline, self.promoted, self.reason = thresholds, None, reason

    def withdraw(self, reason: str) -> None:
        """Return to the baseline at once."""
        if self.trial is not None:
            self._end(Verdict(False, reason), blame=False)
        if self.promoted is not None:
            self.promoted, self.reason = None, reason

    def challenge(self, proposed: object, summary: GroupSummary, hosts: Collection[str], now_s: float) -> bool:
        """Try a proposal, if none is on trial, the group does not rest, and it is admissible and something new.

        Args:
            proposed: what the learner says, of whatever kind.
            summary: of the group.
            hosts: its hosts that report.
            now_s: the time.
        """
        incumbent = self.incumbent
        if self.trial is not None or now_s < self._rest_until_s or incumbent is None or not hosts:
            return False
        try:
            challenger = admissible(proposed, summary.levels, incumbent, self.bounds)
        except InadmissibleError as error:
            self.tally.refused += 1
            self.last = f"refused: {error}"
            self._rest(now_s)
            return False
        if summary.outcome is None or same(challenger, incumbent):
            return False
        self._begin(challenger, summary.outcome, hosts, now_s)
        return True

    def recheck(self, summary: GroupSummary, hosts: Collection[str], now_s: float) -> bool:
        """Try the baseline against what was promoted, if that is long ago; arguments as `challenge`."""
        due = self.promoted is not None and self.trial is None and now_s >= self._recheck_at_s
        if not due or self.baseline is None or summary.outcome is None or not hosts:
            return False
        self._begin(self.baseline, summary.outcome, hosts, now_s)
        self._rechecks = True
        return True

    def observe(self, host: str, flows: Experienced) -> None:
        """Flows of a report from a host that had what it is to have for all of the report's time."""
        if self.trial is not None:
            self.trial.observe(host, flows)

    def advance(self, live: Mapping[str, float], now_s: float) -> Verdict | None:
        """Close the round if it is complete, or has lasted too long; the verdict if that ends the trial.

        Args:
            live: the group's hosts that are not lost, with the interval of their reports in seconds.
            now_s: the time.
        """
        trial = self.trial
        if trial is None:
            return None
        taking_part = {host: interval_s for host, interval_s in live.items() if host in trial.hosts}
        if not all(map(trial.heard, taking_part)):
            typical_s = sorted(taking_part.values())[len(taking_part) // 2]
            if now_s - self._round_began_s < max(_SILENT_ROUND_S, 3 * typical_s):
                return None
        elif not taking_part and now_s - self._round_began_s < _SILENT_ROUND_S:
            return None
        self._round_began_s = now_s
        verdict = trial.close_round()
        if verdict is not None:
            rechecked = self._rechecks
            self._end(verdict, blame=not verdict.promoted)
            self._recheck_at_s = now_s + self.recheck_s
            if not verdict.promoted and not rechecked:
                self._rest(now_s)
        return verdict

    def _begin(self, challenger: Thresholds, outcome: Outcome, hosts: Collection[str], now_s: float) -> None:
        self.tally.trials += 1
        first = canaries(hosts, self.canary_share, self.tally.trials)
        weights = bucket_weights(outcome, self.objective)
        self.trial = Trial(challenger, hosts, first, weights, self.rules, seed=self.tally.trials)
        self._rechecks = False
        self.effect = None
        self.reason = f"on trial, number {self.tally.trials}"
        self._round_began_s = now_s

    def _end(self, verdict: Verdict, blame: bool) -> None:
        assert self.trial is not None
        self.effect = self.trial.effect() or self.effect
        if self._rechecks:
            self.last = f"{'withdrawn' if verdict.promoted else 'kept'}, as with the baseline {verdict.reason}"
            self.promoted = None if verdict.promoted else self.promoted
            self.reason = self.last
            self.trial = None
            return
        if verdict.promoted:
            self.promoted = self.trial.challenger
            self.tally.promoted += 1
            self._failures = 0
        else:
            self.tally.rolled_back += 1
            self._failures += blame
        self.last = f"{'promoted' if verdict.promoted else 'rolled back'}: {verdict.reason}"
        self.reason = self.last
        self.trial = None

    def _rest(self, now_s: float) -> None:
        self._rest_until_s = now_s + min(_MAX_REST_S, self.rest_s * 2.0 ** min(max(0, self._failures - 1), 16))


def same(one: Thresholds, other: Thresholds) -> bool:
    """Whether no threshold differs by more than `_SAME`: no trial could tell them apart."""
    return one.levels == other.levels and all(
        max(a, b) <= _SAME * min(a, b) for a, b in zip(one.bytes, other.bytes, strict=True)
    )
