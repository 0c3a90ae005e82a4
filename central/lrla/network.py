"""The policy network: one for any number of flows, hosts, racks and routes (sets in the manner of DeepSets).

    flow     each long flow's features -> an embedding, by the same small network for all
    links    the embeddings of the flows on a link are added up: on the way up and down of each rack, by route, and at
             each host. The cost grows linearly with the number of flows, and their order does not matter
    route    embedding of the flow, sums at both ends of a route without the flow itself -> a score per route
    priority embedding of the flow, sums at its sender and its receiver without itself -> a score per priority
    scores   start as the rules' (rules.py): the last layers begin at zero, so an untrained network decides as
             shortest-first does, and training moves it away only where that pays

Shapes: n flows, m of them asked for, R routes, P priorities.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from central.lrla.flow_set import MAX_PRIORITIES, Bools, Floats, FlowSet, Ints, route_loads, route_shares
from central.lrla.rules import SHORTEST_FIRST_BYTES, costs, priorities
from simulator.results import FlowResults

FEATURES = 9
HIDDEN = 32
_LOG_BYTES = 30.0  # log2 of a GiB: sizes are features in [0, 1]
_CROWD = 8.0  # flows on a link that make a sum of about 1
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


def features_of(flows: FlowSet) -> Floats:
    """(n, FEATURES), each about 0 to 1, as the columns below say."""
    known = ~np.isnan(flows.known_bytes)
    rate = flows.attained_bytes * 8 / np.maximum(flows.age_s, 1e-6) / flows.rate_bps
    columns = (
        np.log2(1 + flows.attained_bytes) / _LOG_BYTES,
        known,
        np.log2(1 + np.where(known, flows.known_bytes, 0.0)) / _LOG_BYTES,
        np.clip((np.log10(np.maximum(flows.age_s, 1e-4)) + 4) / 6, 0, 1),
        np.clip(rate, 0, 1),
        flows.route >= 0,
        flows.priority / (MAX_PRIORITIES - 1),
        flows.migration,
        flows.priorities / MAX_PRIORITIES,
    )
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def batch_of(flows: FlowSet, asked: Ints) -> Batch:
    """The decision on rows `asked` as tensors."""
    share = route_shares(flows, np.arange(len(flows)))
    up, down = route_loads(flows)
    cost = costs(flows, asked, up, down, share[asked])
    usable = flows.usable[asked] & flows.crosses[asked][:, None]
    current = np.zeros((len(asked), flows.routes))
    has = np.flatnonzero(flows.route[asked] >= 0)
    current[has, flows.route[asked][has]] = 1.0
    rule = priorities(flows, asked, SHORTEST_FIRST_BYTES)
    allowed = np.arange(MAX_PRIORITIES) < flows.priorities[asked][:, None]
    allowed[flows.migration[asked], 1:] = False  # migrations wait for all others
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
    """What REINFORCE trains: called with what its eyes see, it gives logits (m, R) and (m, P)."""

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
    """Scores for routes and priorities of long flows."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.route = _head(3 * HIDDEN + 3, 1)
        self.priority = _head(3 * HIDDEN + 2, MAX_PRIORITIES)
        # How much a flow more on a route counts, and how firmly the rule's priority is held, at the start.
        self.load_weight = nn.Parameter(torch.tensor(2.0))
        self.rule_weight = nn.Parameter(torch.tensor(1.0))

    def eyes(self) -> Eyes:
        """See `Policy.eyes`."""
        return FlowEyes()

    def corrections(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the network adds to the rules' scores: (m, R) and (m, P)."""
        embedded = self.flow(batch.features)
        counted = torch.cat([embedded, torch.ones(len(embedded), 1)], dim=1) / _CROWD
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
        return by_route, self.priority(torch.cat([mine, *peers], dim=1))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of routes (m, R) and of priorities (m, P); masked where there is no choice."""
        by_route, by_priority = self.corrections(batch)
        routes = by_route - self.load_weight * batch.costs
        ranks = by_priority + self.rule_weight * batch.ruled
        return routes.masked_fill(~batch.usable, MASKED), ranks.masked_fill(~batch.allowed, MASKED)

    def bonus(self, batch: Batch) -> tuple[Floats, Ints]:
        """For deciding without chance: what to take off the rule's cost of each route, and the best priority."""
        with torch.no_grad():
            by_route, by_priority = self.corrections(batch)
            ranks = (by_priority + self.rule_weight * batch.ruled).masked_fill(~batch.allowed, MASKED)
            weight = self.load_weight.clamp(min=0.1)
            return (by_route / weight).double().numpy(), ranks.argmax(dim=1).numpy()


def log_probability(logits: tuple[Tensor, Tensor], route: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
    """Of both choices together (m,), and their entropy (m,). A row without a route to choose has none of either."""
    total, entropy = torch.zeros(len(route)), torch.zeros(len(route))
    for scores, chosen in zip(logits, (route, priority), strict=True):
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
