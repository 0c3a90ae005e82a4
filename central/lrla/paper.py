"""AuTO's agent for long flows as published, for the record: a network of fixed size that sees one host at a time.

    state   11 long flows under way x 6 (5-tuple, priority) and 10 that have ended x 7 (5-tuple, completion time, size)
            of the sender: 136 inputs, zeros where there is none; every feature between 0 and 1
    action  for each of the 11 a softmax over priorities, one over routes and, if wanted, one over rates
    reward  of a decision: sum of size over completion time of the sender's long flows that end in the step after it,
            over that of the step before it, capped; less the running mean of the sender's rewards

What the paper does not say and is chosen here: step, cap, features' scales, hidden layers. What cannot be as there:
simulated flows have no ports, so these two inputs are 0. Flows beyond the eleventh (the oldest have the places) get the
lowest priority and the hash's route; routes beyond the fourth are not used.
"""

from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from central.lrla.flow_set import MAX_PRIORITIES, Bools, Floats, FlowSet, Ints
from central.lrla.network import MASKED, Eyes, Policy, free
from simulator.longflows import paper_reward
from simulator.results import FlowResults

ACTIVE, ACTIVE_FEATURES = 11, 6
ENDED, ENDED_FEATURES = 10, 7
INPUTS = ACTIVE * ACTIVE_FEATURES + ENDED * ENDED_FEATURES
MAX_ROUTES = 4
NO_PLACE = -1
_LOG_BYTES = 30.0  # log2 of a GiB
_LOG_MS = 5.0  # log10 of 100 s


@dataclass(frozen=True)
class PaperSettings:
    """What the paper leaves open.

    Attributes:
        layers: hidden ones.
        step_s: the time before and after a decision that its reward compares.
        cap: largest reward.
    """

    layers: tuple[int, ...] = (128, 128)
    step_s: float = 1.0
    cap: float = 2.0


def active_features(flows: FlowSet, rows: Ints) -> Floats:
    """Flows under way, shape (k, 6): addresses as a share of all hosts, no ports, 1 for "a flow", priority."""
    return np.column_stack(
        (
            _five(flows.source[rows], flows.destination[rows], flows.hosts),
            flows.priority[rows] / (MAX_PRIORITIES - 1),
        )
    )


def ended_features(ended: FlowResults, hosts: int) -> Floats:
    """Flows that have ended, shape (k, 7): as above, logarithms of completion time (to 100 s) and size (to 1 GiB)."""
    return np.column_stack(
        (
            _five(ended.host, ended.destination, hosts),
            np.clip(np.log10(np.maximum(ended.fct_s * 1e3, 1.0)) / _LOG_MS, 0, 1),
            np.clip(np.log2(1 + ended.size_bytes) / _LOG_BYTES, 0, 1),
        )
    )


def encode(active: Floats, ended: Floats) -> Floats:
    """State of a host, shape (136,), from up to 11 rows of 6 and up to 10 rows of 7."""
    state = np.zeros(INPUTS)
    state[: active.size] = active.ravel()
    first = ACTIVE * ACTIVE_FEATURES
    state[first : first + ended.size] = ended.ravel()
    return state


def places(flows: FlowSet, host: int) -> Ints:
    """Rows of the host's 11 oldest flows, oldest first."""
    rows = np.flatnonzero(flows.source == host)
    oldest: Ints = rows[np.argsort(-flows.age_s[rows], kind="stable")][:ACTIVE]
    return oldest


@dataclass(frozen=True)
class HostBatch:
    """A decision to take; h hosts, m flows asked for."""

    states: Tensor  # (h, 136)
    host: Tensor  # int64 (m,): row in `states`
    place: Tensor  # int64 (m,): among the 11, or `NO_PLACE`
    usable: Tensor  # bool (m, R), R at most `MAX_ROUTES`
    allowed: Tensor  # bool (m, P)


class HostEyes:
    """Sees flows host by host, and remembers the last that ended at each."""

    def __init__(self) -> None:
        self._ended: dict[int, deque[FlowResults]] = defaultdict(lambda: deque(maxlen=ENDED))

    def watch(self, ended: FlowResults) -> None:
        """See `Eyes.watch`."""
        for row, host in enumerate(ended.host.tolist()):
            self._ended[host].append(ended.rows(np.array([row])))

    def see(self, flows: FlowSet, asked: Ints) -> HostBatch:
        """See `Eyes.see`."""
        senders, host = np.unique(flows.source[asked], return_inverse=True)
        place_of = np.full(len(flows), NO_PLACE)
        states = np.zeros((len(senders), INPUTS))
        for number, sender in enumerate(senders.tolist()):
            rows = places(flows, sender)
            place_of[rows] = np.arange(len(rows))
            states[number] = encode(active_features(flows, rows), self._of(sender, flows.hosts))
        place = place_of[asked]
        placed = (place != NO_PLACE)[:, None]
        allowed = np.arange(MAX_PRIORITIES) < flows.priorities[asked][:, None]
        allowed[:, 1:] &= placed & ~flows.migration[asked][:, None]
        usable: Bools = flows.usable[asked, :MAX_ROUTES] & flows.crosses[asked][:, None] & placed
        return HostBatch(
            torch.from_numpy(states.astype(np.float32)),
            torch.from_numpy(host.astype(np.int64)),
            torch.from_numpy(place.astype(np.int64)),
            torch.from_numpy(usable),
            torch.from_numpy(allowed),
        )

    def _of(self, host: int, hosts: int) -> Floats:
        kept = self._ended.get(host)
        return ended_features(FlowResults.joined(list(kept)), hosts) if kept else np.zeros((0, ENDED_FEATURES))


class PaperNetwork(Policy):
    """136 inputs, for each of 11 flows 4 priorities, 4 routes and perhaps rates, the last for none."""

    def __init__(self, layers: tuple[int, ...] = PaperSettings.layers, rates: tuple[float, ...] = ()) -> None:
        super().__init__(rates)
        parts: list[nn.Module] = []
        inputs = INPUTS
        for width in layers:
            parts += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self._outputs = MAX_PRIORITIES + MAX_ROUTES + (len(rates) + 1 if rates else 0)
        self.body = nn.Sequential(*parts, nn.Linear(inputs, ACTIVE * self._outputs))

    def eyes(self) -> Eyes:
        """See `Policy.eyes`."""
        return HostEyes()

    def forward(self, batch: HostBatch) -> tuple[Tensor, ...]:
        """Logits of routes, priorities and perhaps rates; masked where there is no choice."""
        scores = self.body(batch.states).reshape(len(batch.states), ACTIVE, self._outputs)
        mine = scores[batch.host, batch.place.clamp(min=0)]
        routes = mine[:, MAX_PRIORITIES : MAX_PRIORITIES + batch.usable.shape[1]]
        ranks = mine[:, :MAX_PRIORITIES]
        masked = routes.masked_fill(~batch.usable, MASKED), ranks.masked_fill(~batch.allowed, MASKED)
        if not self.rates:
            return masked
        rates = mine[:, MAX_PRIORITIES + MAX_ROUTES :]
        held = torch.arange(len(self.rates) + 1) < len(self.rates)
        return *masked, (rates + free(rates)).masked_fill(held & (batch.place == NO_PLACE)[:, None], MASKED)


def rewards(gains: Floats, at: Ints, step: int, cap: float) -> Floats:
    """Rewards of decisions at these ticks, shape (d, hosts); 1 where nothing ended in the step before.

    Args:
        gains: size over completion time of the long flows that ended, by tick and sender, shape (n, hosts). What ended
            at the tick of a decision ended before it.
        at: ticks, shape (d,).
        step: in ticks.
        cap: largest reward.
    """
    sums = np.vstack((np.zeros((1, gains.shape[1])), gains.cumsum(axis=0)))
    now, last = at + 1, len(gains)
    before = sums[now] - sums[np.maximum(now - step, 0)]
    after = sums[np.minimum(now + step, last)] - sums[now]
    return paper_reward(before, after, cap)


class Baseline:
    """Running mean of the rewards of each host."""

    def __init__(self, hosts: int) -> None:
        self.count = np.zeros(hosts)
        self.total = np.zeros(hosts)

    def add(self, values: Floats) -> None:
        """Further rewards, shape (d, hosts)."""
        self.count += len(values)
        self.total += values.sum(axis=0)

    @property
    def mean(self) -> Floats:
        """Shape (hosts,); 0 before the first."""
        return self.total / np.maximum(self.count, 1)


def _five(source: Ints, destination: Ints, hosts: int) -> Floats:
    nothing = np.zeros(len(source))
    return np.column_stack(((source + 1) / hosts, (destination + 1) / hosts, nothing, nothing, nothing + 1))
