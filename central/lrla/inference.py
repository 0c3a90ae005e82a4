"""The trained network as a running central uses it: numpy in single precision, without torch and without gradients.

Where it sits: `network.py` is the same network for training, and says what it means; `learned.py` decides by this one.
A test holds that both give the same scores. What makes it fast:

  1. whatever is linear in a flow's embedding, for all heads, is one product of matrices
  2. sums over the flows of a link are one compiled pass, without a row per flow and route
  3. arrays are kept from call to call, and grow

Shapes: n flows, m of them asked for, R routes, P priorities, F rates, H = HIDDEN.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from central.lrla.flow_set import Floats, FlowSet, Ints, route_shares
from central.lrla.inputs import CROWD, FREE_WEIGHT, allowed_priorities, features_of, ruled_priorities
from central.lrla.weights import HIDDEN
from simulator.compiled import compiled

Singles = npt.NDArray[np.float32]

_LEAST_LOAD_WEIGHT = 0.1  # what a flow more on a route counts at least, so that scores stay finite in flows


class Inference:
    """A network's decisions without chance.

    Args:
        values: its parameters by name, as `PolicyNetwork.state_dict` has them.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        held = {name: np.asarray(value, np.float32) for name, value in values.items()}
        self._heads = [name for name in ("priority", "rate") if f"{name}.0.weight" in held]  # of a flow by its peers
        weight = {name: held[f"{name}.0.weight"] for name in ("flow", "route", *self._heads)}
        self._first = np.ascontiguousarray(weight["flow"].T), held["flow.0.bias"]
        self._second = np.ascontiguousarray(held["flow.2.weight"].T), held["flow.2.bias"]
        link = HIDDEN + 1  # a sum of embeddings, and how many
        up, down = (weight["route"][:, HIDDEN + k * link :][:, :link] / CROWD for k in (0, 1))
        by_peers = np.concatenate([weight[name] for name in self._heads])
        sender, receiver = (by_peers[:, HIDDEN + k * link :][:, :link] / CROWD for k in (0, 1))
        self._links = [np.ascontiguousarray(part.T) for part in (up, down, sender, receiver)]
        self._current = np.ascontiguousarray(weight["route"][:, -1])
        # Of each asked flow: its part in a route's score, what it takes off the sums it is in itself, and the same for
        # the heads by peers, where both are one.
        twice, peers = up + down, sender + receiver
        parts = (weight["route"][:, :HIDDEN], twice[:, :HIDDEN], by_peers[:, :HIDDEN] - peers[:, :HIDDEN])
        self._asked = np.ascontiguousarray(np.concatenate(parts).T)
        biases = np.concatenate([held[f"{name}.0.bias"] for name in self._heads])
        self._asked_bias = np.concatenate((held["route.0.bias"], twice[:, HIDDEN], biases - peers[:, HIDDEN]))
        self._last = {
            name: (np.ascontiguousarray(held[f"{name}.2.weight"].T), held[f"{name}.2.bias"])
            for name in ("route", *self._heads)
        }
        self._load_weight = max(float(held["load_weight"]), _LEAST_LOAD_WEIGHT)
        self._rule_weight = held["rule_weight"]
        self._kept: dict[str, Singles] = {}

    def decide(self, flows: FlowSet, asked: Ints) -> tuple[Floats, Ints, Ints | None]:
        """For the flows in rows `asked`: what to take off the rule's cost of each route (m, R), priority and rate (m,).

        Rates are numbers from 0 to F, F for none; None: the network knows of no rates.
        """
        by_route, by_priority, *by_rate = self.corrections(flows, asked)
        by_priority[np.arange(len(asked)), ruled_priorities(flows, asked)] += self._rule_weight
        by_priority[~allowed_priorities(flows, asked)] = -np.inf
        for scores in by_rate:
            scores[:, -1] += FREE_WEIGHT
        rate = by_rate[0].argmax(axis=1) if by_rate else None
        return by_route.astype(np.float64) / self._load_weight, by_priority.argmax(axis=1), rate

    def corrections(self, flows: FlowSet, asked: Ints) -> tuple[Singles, ...]:
        """What the network adds to the rules' scores: see `PolicyNetwork.corrections`."""
        n, m, routes = len(flows), len(asked), flows.routes
        share = route_shares(flows, np.arange(n))
        features = self._room("features", n, self._first[0].shape[0])
        features[:] = features_of(flows)
        embedded = _layer(_layer(features, self._first, self._room("first", n)), self._second, self._room("second", n))
        sizes = (flows.racks * routes, flows.racks * routes, flows.hosts, flows.hosts)
        sums = [self._room(f"sum {k}", rows, HIDDEN + 1) for k, rows in enumerate(sizes)]
        for each in sums:
            each[:] = 0
        ends = flows.source_rack, flows.destination_rack, flows.source, flows.destination
        _add_up(embedded, share, *ends, *sums)
        up, down, sender, receiver = (
            np.matmul(each, part, out=self._room(f"link {k}", len(each), part.shape[1]))
            for k, (each, part) in enumerate(zip(sums, self._links, strict=True))
        )
        mine = np.matmul(embedded[asked], self._asked, out=self._room("asked", m, self._asked.shape[1]))
        mine += self._asked_bias
        inner = self._room("routes", m * routes)
        by_rack = flows.source_rack[asked], flows.destination_rack[asked]
        _route_rows(up, down, *by_rack, flows.route[asked], share[asked], mine, self._current, inner)
        peers = mine[:, 2 * HIDDEN :]
        peers += sender[flows.source[asked]]
        peers += receiver[flows.destination[asked]]
        np.tanh(peers, out=peers)
        scores = [np.tanh(inner, out=inner) @ self._last["route"][0] + self._last["route"][1]]
        for k, name in enumerate(self._heads):
            last, bias = self._last[name]
            scores.append(peers[:, k * HIDDEN : (k + 1) * HIDDEN] @ last + bias)
        return scores[0].reshape(m, routes), *scores[1:]

    def _room(self, name: str, rows: int, columns: int = HIDDEN) -> Singles:
        """An array of this shape that is kept under this name; what it holds is what was there."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < rows or kept.shape[1] != columns:
            kept = self._kept[name] = np.empty((rows + rows // 2, columns), np.float32)
        return kept[:rows]


def _layer(inputs: Singles, layer: tuple[Singles, Singles], out: Singles) -> Singles:
    np.matmul(inputs, layer[0], out=out)
    out += layer[1]
    activated: Singles = np.tanh(out, out=out)
    return activated


@compiled
def _add_up(
    embedded: Singles,
    share: Floats,
    source_rack: Ints,
    destination_rack: Ints,
    source: Ints,
    destination: Ints,
    up: Singles,
    down: Singles,
    sender: Singles,
    receiver: Singles,
) -> None:
    """Embeddings and numbers of the flows on each way up and down (rack * R + route), at each sender and receiver."""
    n, routes = share.shape
    hidden = embedded.shape[1]
    for i in range(n):
        for r in range(routes):
            part = np.float32(share[i, r])
            if part == 0:
                continue
            above, below = up[source_rack[i] * routes + r], down[destination_rack[i] * routes + r]
            for j in range(hidden):
                above[j] += part * embedded[i, j]
                below[j] += part * embedded[i, j]
            above[hidden] += part
            below[hidden] += part
        out, into = sender[source[i]], receiver[destination[i]]
        for j in range(hidden):
            out[j] += embedded[i, j]
            into[j] += embedded[i, j]
        out[hidden] += np.float32(1)
        into[hidden] += np.float32(1)


@compiled
def _route_rows(
    up: Singles,
    down: Singles,
    source_rack: Ints,
    destination_rack: Ints,
    route: Ints,
    share: Floats,
    mine: Singles,
    current: Singles,
    inner: Singles,
) -> None:
    """What goes into the route head's first activation, a row per asked flow and route: (m * R, H)."""
    m, routes = share.shape
    hidden = len(current)
    for i in range(m):
        for r in range(routes):
            above, below = up[source_rack[i] * routes + r], down[destination_rack[i] * routes + r]
            row, own = inner[i * routes + r], np.float32(share[i, r])
            for j in range(hidden):
                row[j] = above[j] + below[j] + mine[i, j] - own * mine[i, hidden + j]
            if r == route[i]:
                for j in range(hidden):
                    row[j] += current[j]
