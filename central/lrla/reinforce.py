"""REINFORCE for long flows, whole in this file (Williams, 1992; baseline by input as in Mao et al., 2019).

Logic of one iteration:
  1. draw a fabric and its traffic; run the policy on exactly this traffic several times, each time with other chances
  2. cost of a tick: flows under way times its length, long ones and others weighted; by Little's law its sum over a
     run is the sum of completion times. Returns: discounted costs from a tick on
  3. advantage of a decision: its return less the mean return of all runs at that tick. As all had the same traffic,
     what is left is what the decisions made of it
  4. one step of Adam along advantage times log probability, with an entropy bonus
Deterministic by the seed on one thread.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from central.lrla.flow_set import UNKNOWN_ROUTE, Choice, Floats, FlowSet, Ints
from central.lrla.laboratory import Lab, ticks
from central.lrla.network import Batch, PolicyNetwork, batch_of, log_probability


@dataclass(frozen=True)
class Settings:
    """Every knob.

    Attributes:
        iterations: updates.
        runs: of the same traffic in one iteration; their mean is the baseline.
        traffic_s: seconds of traffic of a run.
        horizon_s: costs that come so much later count 1/e.
        short_weight: what a flow that is not long costs, a long one costing 1.
        learning_rate: of Adam.
        entropy: weight of the bonus.
        gradient_norm: longest step.
        renew_s: how often a flow is decided on again, as reports come.
        loads, spines, oversubscriptions: fabrics are drawn from these.
        cdfs: and traffic from these.
    """

    iterations: int = 45
    runs: int = 4
    traffic_s: float = 3.0
    horizon_s: float = 2.0
    short_weight: float = 1.0
    learning_rate: float = 1e-2
    entropy: float = 1e-3
    gradient_norm: float = 1.0
    renew_s: float = 0.25
    loads: tuple[float, float] = (0.4, 0.7)
    spines: tuple[int, ...] = (2, 4)
    oversubscriptions: tuple[float, ...] = (1.0, 2.0)
    cdfs: tuple[str, ...] = ("websearch_bytes_hpcc", "datamining_vl2_bytes_trafficgenerator")


class Sampler:
    """A scheme that draws from the network's probabilities, and keeps what it saw and did."""

    name = "sampled"

    def __init__(self, network: PolicyNetwork, generator: torch.Generator) -> None:
        self._network = network
        self._generator = generator
        self.decisions: list[tuple[Batch, Tensor, Tensor]] = []

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """One draw per flow."""
        batch = batch_of(flows, asked)
        with torch.no_grad():
            routes, ranks = (
                torch.multinomial(torch.softmax(scores, dim=1), 1, generator=self._generator)[:, 0]
                for scores in self._network(batch)
            )
        self.decisions.append((batch, routes, ranks))
        chosen = torch.where(batch.usable.any(dim=1), routes, torch.tensor(UNKNOWN_ROUTE))
        return Choice(ranks.numpy(), chosen.numpy())


@dataclass(frozen=True)
class Rollout:
    """One run of the policy."""

    costs: Floats  # (ticks,)
    decisions: list[tuple[Batch, Tensor, Tensor]]
    at: list[int]  # tick of each


def draw(settings: Settings, rng: np.random.Generator) -> Lab:
    """A fabric and a kind of traffic."""
    return Lab(
        cdf=str(rng.choice(list(settings.cdfs))),
        load=float(rng.uniform(*settings.loads)),
        spines=int(rng.choice(list(settings.spines))),
        oversubscription=float(rng.choice(list(settings.oversubscriptions))),
        traffic_s=settings.traffic_s,
        renew_s=settings.renew_s,
    )


def roll(lab: Lab, network: PolicyNetwork, seed: int, generator: torch.Generator, short_weight: float) -> Rollout:
    """One run; its traffic is the seed's, its chances the generator's."""
    sampler = Sampler(network, generator)
    costs, at = [], []
    for number, tick in enumerate(ticks(lab, sampler, seed)):
        costs.append((tick.long + short_weight * tick.short) * lab.tick_s)
        if len(tick.asked):
            at.append(number)
    return Rollout(np.array(costs), sampler.decisions, at)


def returns(costs: Floats, discount: float) -> Floats:
    """Minus the discounted costs from each tick on; costs[t] came before the decision of tick t, so it is left out."""
    result, following = np.zeros(len(costs)), 0.0
    for tick in range(len(costs) - 1, -1, -1):
        result[tick] = following
        following = discount * following - costs[tick]
    return result


def advantages(rollouts: list[Rollout], discount: float) -> list[Floats]:
    """Return of each run less their mean at each tick, over all their deviation; a run that has ended costs nothing."""
    longest = max(len(rollout.costs) for rollout in rollouts)
    table = np.stack([returns(np.pad(r.costs, (0, longest - len(r.costs))), discount) for r in rollouts])
    left = table - table.mean(axis=0)
    scale = left.std() + 1e-8
    return [left[row, : len(rollout.costs)] / scale for row, rollout in enumerate(rollouts)]


def update(
    network: PolicyNetwork, optimiser: torch.optim.Optimizer, rollouts: list[Rollout], settings: Settings, tick_s: float
) -> dict[str, float]:
    """One step of policy gradient on runs of the same traffic; what happened."""
    discount = float(np.exp(-tick_s / settings.horizon_s))
    optimiser.zero_grad()
    decisions = sum(len(batch.asked) for rollout in rollouts for batch, _, _ in rollout.decisions)
    told = {"entropy": 0.0}
    for rollout, advantage in zip(rollouts, advantages(rollouts, discount), strict=True):
        terms = []
        for tick, (batch, route, priority) in zip(rollout.at, rollout.decisions, strict=True):
            logs, entropy = log_probability(network(batch), route, priority)
            terms.append(-(float(advantage[tick]) * logs.sum() + settings.entropy * entropy.sum()))
            told["entropy"] += float(entropy.detach().sum()) / max(decisions, 1)
        if terms:
            (torch.stack(terms).sum() / max(decisions, 1)).backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_norm)
    optimiser.step()
    cost = float(np.mean([rollout.costs.sum() for rollout in rollouts]))
    return {"cost": cost, **told, "gradient": float(norm), "decisions": float(decisions)}
