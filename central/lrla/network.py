"""The policy network: one for any number of flows, hosts, racks and routes (sets in the manner of DeepSets).

    flow     each long flow's features -> an embedding, by the same small network for all
    links    the embeddings of the flows on a link are added up: on the way up and down of each rack, by route, and at
             each host. The cost grows linearly with the number of flows, and their order does not matter
    route    embedding of the flow, sums at both ends of a route without the flow itself -> a score per route
    priority embedding of the flow, sums at its sender and its receiver without itself -> a score per priority
    rate     as priority, where rates may be chosen: a score per rate, the last for none
    scores   start as the rules' (rules.py): the last layers begin at zero, so an untrained network decides as
             young-first does, and training moves it away only where that pays

Shapes: n flows, m of them asked for, R routes, P priorities.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from central.lrla.flow_set import MAX_PRIORITIES, Bools, Floats, FlowSet, Ints, route_loads, route_shares
from central.lrla.inputs import CROWD, FREE_WEIGHT, allowed_priorities, features_of, ruled_priorities
from central.lrla.rules import costs
from central.lrla.weights import FEATURES, HIDDEN
from simulator.results import FlowResults

MASKED = -1e9


@dataclass(frozen=True)
class Batch:
    """A decision to take, as tensors; built once and kept for learning."""

    features: Tensor  # (n, FEATURES)
    share: Tensor  # (n, R) how each flow counts on routes
    places: Tensor  # int64 (4, n): source rack, destination rack, source, destination
    sizes: tuple[int, int]  # racks, hosts
    asked: Tensor  # int64 (m,)
    current: Tensor  # (m, R) 1 at the route a flow has
    costs: Tensor  # (m, R) of the rule; 0 where masked
    usable: Tensor  # bool (m, R)
    ruled: Tensor  # (m, P) 1 at the rule's priority
    allowed: Tensor  # bool (m, P)


def batch_of(flows: FlowSet, asked: Ints) -> Batch:
    """The decision on rows `asked` as tensors."""
    share = route_shares(flows, np.arange(len(flows)))
    up, down = route_loads(flows, share)
    cost = costs(flows, asked, up, down, share[asked])
    usable = flows.usable[asked] & flows.crosses[asked][:, None]
    current = np.zeros((len(asked), flows.routes))
    has = np.flatnonzero(flows.route[asked] >= 0)
    current[has, flows.route[asked][has]] = 1.0
    rule = ruled_priorities(flows, asked)
    allowed = allowed_priorities(flows, asked)
    places = np.stack([flows.source_rack, flows.destination_rack, flows.source, flows.destination])
    return Batch(
        _tensor(features_of(flows)),
        _tensor(share),
        torch.from_numpy(np.ascontiguousarray(places)),
        (flows.racks, flows.hosts),
        torch.from_numpy(np.ascontiguousarray(asked, np.int64)),
        _tensor(current),
        _tensor(np.where(usable, cost, 0.0)),
        torch.from_numpy(usable),
        _tensor(np.eye(MAX_PRIORITIES)[rule]),
        torch.from_numpy(allowed),
    )


class Eyes(Protocol):
    """Make of the flows of one run what a network sees; may remember."""

    def watch(self, ended: FlowResults) -> None:
        """These long flows have ended."""

    def see(self, flows: FlowSet, asked: Ints) -> Any:
        """The decision on rows `asked`; has `usable`, bool (m, R)."""


class Policy(nn.Module, ABC):
    """What REINFORCE trains: called with what its eyes see, it gives logits (m, R), (m, P) and, with rates, (m, F + 1).

    Args:
        rates: F of them, as shares of a host's link; empty: no rate is chosen.
    """

    def __init__(self, rates: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.rates = rates

    @abstractmethod
    def eyes(self) -> Eyes:
        """For a new run."""


class FlowEyes:
    """Sees the flows under way, remembers nothing."""

    def watch(self, ended: FlowResults) -> None:
        """Nothing is remembered."""

    def see(self, flows: FlowSet, asked: Ints) -> Batch:
        """See `batch_of`."""
        return batch_of(flows, asked)


class PolicyNetwork(Policy):
    """Scores for routes, priorities and perhaps rates of long flows."""

    def __init__(self, rates: tuple[float, ...] = ()) -> None:
        super().__init__(rates)
        self.flow = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.route = _head(3 * HIDDEN + 3, 1)
        self.priority = _head(3 * HIDDEN + 2, MAX_PRIORITIES)
        # How much a flow more on a route counts, and how firmly the rule's priority is held, at the start.
        self.load_weight = nn.Parameter(torch.tensor(2.0))
        self.rule_weight = nn.Parameter(torch.tensor(3.0))
        self.rate = _head(3 * HIDDEN + 2, len(rates) + 1) if rates else None

    def eyes(self) -> Eyes:
        """See `Policy.eyes`."""
        return FlowEyes()

    def corrections(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the network adds to the rules' scores: (m, R), (m, P) and, with rates, (m, F + 1)."""
        embedded = self.flow(batch.features)
        counted = torch.cat([embedded, torch.ones(len(embedded), 1)], dim=1) / CROWD
        racks, hosts = batch.sizes
        routes = batch.share.shape[1]
        on_routes = (batch.share[:, :, None] * counted[:, None, :]).reshape(len(counted), routes * (HIDDEN + 1))
        up = _sums(on_routes, batch.places[0], racks)
        down = _sums(on_routes, batch.places[1], racks)
        asked = batch.asked
        mine = embedded[asked]
        # The first layer of the route's head, part by part: on a link's sum once, not for every flow that asks.
        weight, bias = (self.route[0].get_parameter(name) for name in ("weight", "bias"))
        of_flow, of_up = weight[:, :HIDDEN], weight[:, HIDDEN : 2 * HIDDEN + 1]
        of_down, of_current = weight[:, 2 * HIDDEN + 1 : -1], weight[:, -1]
        inner = (up.reshape(racks, routes, HIDDEN + 1) @ of_up.T)[batch.places[0][asked]]
        inner += (down.reshape(racks, routes, HIDDEN + 1) @ of_down.T)[batch.places[1][asked]]
        inner += (mine @ of_flow.T + bias)[:, None, :]
        inner -= batch.share[asked][:, :, None] * (counted[asked] @ (of_up + of_down).T)[:, None, :]
        inner += batch.current[:, :, None] * of_current
        by_route = self.route[2](inner.tanh_())[:, :, 0]
        peers = [_sums(counted, place, hosts)[place[asked]] - counted[asked] for place in batch.places[2:]]
        seen = torch.cat([mine, *peers], dim=1)
        return by_route, self.priority(seen), *(() if self.rate is None else (self.rate(seen),))

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits of routes, priorities and perhaps rates; masked where there is no choice."""
        by_route, by_priority, *by_rate = self.corrections(batch)
        routes = by_route - self.load_weight * batch.costs
        ranks = by_priority + self.rule_weight * batch.ruled
        masked = routes.masked_fill(~batch.usable, MASKED), ranks.masked_fill(~batch.allowed, MASKED)
        return *masked, *(scores + free(scores) for scores in by_rate)


def free(scores: Tensor) -> Tensor:
    """What is added to the scores of rates at the start, shape (F + 1,): most flows go without one."""
    weights = torch.zeros(scores.shape[1])
    weights[-1] = FREE_WEIGHT
    return weights


def log_probability(logits: Sequence[Tensor], choices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of all choices of a flow together (m,), and their entropy (m,). One that was no choice has none of either."""
    total, entropy = torch.zeros(len(choices[0])), torch.zeros(len(choices[0]))
    for scores, chosen in zip(logits, choices, strict=True):
        logs = torch.log_softmax(scores, dim=1)
        open_ = (scores > MASKED / 2).sum(dim=1) > 1
        total = total + torch.where(open_, logs.gather(1, chosen.clamp(min=0)[:, None])[:, 0], torch.zeros(()))
        entropy = entropy + torch.where(open_, -(logs.exp() * logs).sum(dim=1), torch.zeros(()))
    return total, entropy


def _head(inputs: int, outputs: int) -> nn.Sequential:
    last = nn.Linear(HIDDEN, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), last)


def _sums(values: Tensor, place: Tensor, places: int) -> Tensor:
    return torch.zeros(places, values.shape[1]).index_add(0, place, values)


def _tensor(array: Floats | Bools) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
