"""One trial of a challenger against the incumbent, report by report, until it is promoted or rolled back.

A round is over when every host has reported. The phases, each bounded in rounds:

    before   nobody has the challenger yet: how the canary hosts differ from the others by themselves
    canary   the canary hosts have it, the others do not; more harm than before ends the trial
    slices   all hosts have it and do not have it, by turns: two slices make a pair, in an order that a seed draws

Only slices can promote. Hosts differ, and the differences between two sets of hosts would have to be learned as
precisely as the gain itself; and hosts share queues, so that thresholds which put everything on top look good on the
hosts that have them because the others pay. A slice compares the whole group with itself. What it would expose the
group to has passed the canary hosts before. A host that is alone in its group has no canary phase.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from central.guard.contrast import Floats, cell, contrast
from central.guard.evidence import Evidence
from central.outcomes import Experienced
from fabricpilot.levels import Thresholds

Phase = Literal["before", "canary", "slices"]

MAX_BLIND = 10  # rounds or pairs in a row without comparable flows, after which a trial ends
_DEVIATIONS = 2.0  # standard errors by which a mean may be wrong
_CLEARLY = 3.0  # standard errors that harm must exceed to end a trial at once: rounds are many, and trials precious


@dataclass(frozen=True)
class Rules:
    """How trials are run.

    Attributes:
        alpha: probability with which a challenger that is no better is promoted.
        canary_rounds: length of `before` and of `canary`.
        slice_rounds: length of a slice.
        max_pairs: most pairs of slices.
        max_harm: a challenger under which flows take so many times as long, clearly, is dropped without further proof.
    """

    alpha: float = 0.05
    canary_rounds: int = 12
    slice_rounds: int = 5
    max_pairs: int = 20
    max_harm: float = 1.5


@dataclass(frozen=True)
class Verdict:
    """The end of a trial."""

    promoted: bool
    reason: str


class Trial:
    """A challenger on trial.

    Args:
        challenger: what is tried.
        hosts: of the group; those that join later take no part.
        canaries: those that try it first; none: slices at once.
        weights: of the size buckets, shape (buckets,).
        rules: how.
        seed: draws the order within pairs.
    """

    def __init__(
        self,
        challenger: Thresholds,
        hosts: Iterable[str],
        canaries: frozenset[str],
        weights: Floats,
        rules: Rules,
        seed: int,
    ) -> None:
        self.challenger = challenger
        self.hosts = frozenset(hosts)
        self.canaries = canaries
        self.phase: Phase = "before" if canaries else "slices"
        self.rounds = 0
        self.before, self.canary, self.pairs = Evidence(), Evidence(), Evidence()
        self._weights = weights
        self._rules = rules
        self._seed = seed
        self._blind = 0
        self._this_round: dict[str, Floats] = {}
        self._slice: dict[str, Floats] = {}  # of the slice under way
        self._first_slice: dict[str, Floats] = {}  # of the pair under way
        self._slices = 0
        self._in_slice = 0

    @property
    def on_challenger(self) -> frozenset[str]:
        """The hosts that are to have the challenger now."""
        if self.phase == "slices":
            return self.hosts if self._challenger_slice else frozenset()
        return self.canaries if self.phase == "canary" else frozenset()

    def observe(self, host: str, flows: Experienced) -> None:
        """Flows of a report from a host that had the thresholds it is to have for the whole of the report's time."""
        if host in self.hosts:
            self._this_round[host] = self._this_round.get(host, 0.0) + cell(flows)

    def heard(self, host: str) -> bool:
        """Whether the host has reported in this round."""
        return host in self._this_round

    def close_round(self) -> Verdict | None:
        """A round is over; the verdict if the trial is, too."""
        self.rounds += 1
        cells, self._this_round = self._this_round, {}
        if self.phase == "slices":
            return self._in_slices(cells)
        canaries = [cells[host] for host in cells if host in self.canaries]
        others = [cells[host] for host in cells if host not in self.canaries]
        difference = contrast(canaries, others, self._weights)
        if difference is None:
            return self._nothing_to_compare()
        self._blind = 0
        if self.phase == "before":
            self.before.add(difference)
            if self.before.n >= self._rules.canary_rounds:
                self.phase = "canary"
            return None
        self.canary.add(difference)
        return self._after_canary_round()

    def effect(self) -> tuple[float, float, float] | None:
        """Change of the mean log-slowdown by the challenger: estimate and interval; None before there is one."""
        if self.pairs.n:
            return self.pairs.mean, *self.pairs.interval(self._rules.alpha)
        if self.canary.n:
            mean, radius = self._harm()
            return mean, mean - radius, mean + radius
        return None

    @property
    def _challenger_slice(self) -> bool:
        drawn = hashlib.sha256(f"{self._seed}:{self._slices // 2}".encode()).digest()[0] & 1
        return (self._slices + drawn) % 2 == 1

    def _harm(self) -> tuple[float, float]:
        """How much worse canary hosts fare than before, against the others; and half the interval."""
        wrong_before = _DEVIATIONS * self.before.error
        return self.canary.mean - self.before.mean, self.canary.radius(self._rules.alpha) + wrong_before

    def _after_canary_round(self) -> Verdict | None:
        mean, radius = self._harm()
        told = f"{_percent(mean)} on {len(self.canaries)} canary host(s) after {self.canary.n} rounds"
        noise = self.before.deviation * math.sqrt(1 / self.canary.n + 1 / self.before.n)
        if self.canary.n >= 2 and mean > max(math.log(self._rules.max_harm), _CLEARLY * noise):
            return Verdict(False, f"flows took {told}: more than max_harm allows")
        if mean - radius > 0:
            return Verdict(False, f"flows took {told}: worse beyond chance")
        if self.canary.n < self._rules.canary_rounds:
            return None
        if mean > 2 * _DEVIATIONS * self.before.error:
            return Verdict(False, f"flows took {told}: too much to go on")
        self.phase = "slices"
        return None

    def _in_slices(self, cells: dict[str, Floats]) -> Verdict | None:
        for host, seen in cells.items():
            self._slice[host] = self._slice.get(host, 0.0) + seen
        self._in_slice += 1
        if self._in_slice < self._rules.slice_rounds:
            return None
        was_challenger = self._challenger_slice
        done, self._slice, self._in_slice = self._slice, {}, 0
        self._slices += 1
        if self._slices % 2:
            self._first_slice = done
            return None
        under, without = (done, self._first_slice) if was_challenger else (self._first_slice, done)
        difference = contrast(under.values(), without.values(), self._weights)
        if difference is None:
            return self._nothing_to_compare()
        self._blind = 0
        self.pairs.add(difference)
        return self._after_pair()

    def _after_pair(self) -> Verdict | None:
        low, high = self.pairs.interval(self._rules.alpha)
        n, mean, most = self.pairs.n, self.pairs.mean, self._rules.max_pairs
        told = f"{_percent(mean)} in {n} pairs of slices"
        noise = self.pairs.error if n > 1 else 0.0  # after one pair nothing tells chance from harm: be careful
        if mean > max(math.log(self._rules.max_harm), _DEVIATIONS * noise):
            return Verdict(False, f"flows took {told}: more than max_harm allows")
        if low > 0:
            return Verdict(False, f"flows took {told}: worse beyond chance")
        if high < 0:
            return Verdict(True, f"flows took {told}: better beyond chance")
        if n >= most or (n >= most / 2 and mean >= 0):
            return Verdict(False, f"flows took {told}: no gain to be seen")
        return None

    def _nothing_to_compare(self) -> Verdict | None:
        self._blind += 1
        if self._blind < MAX_BLIND:
            return None
        return Verdict(False, f"no comparable flows in {MAX_BLIND} comparisons in a row")


def _percent(change: float) -> str:
    """A change of a log-slowdown in words."""
    share = math.expm1(change)
    return f"{abs(share):.1%} {'longer' if share > 0 else 'less long'}"
