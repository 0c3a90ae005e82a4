"""REINFORCE for long flows, whole in this file (Williams, 1992; baseline by input as in Mao et al., 2019).

Logic of one iteration:
  1. draw a fabric and its traffic; run the policy on exactly this traffic several times, each time with other chances
  2. cost of a tick: flows under way times its length, long ones and others weighted; by Little's law its sum over a
     run is the sum of completion times. Returns: discounted costs from a tick on. Where the others are to be no worse
     off than up to a limit, their weight is its multiplier (Lagrange): it grows while they are, and else shrinks
  3. advantage of a decision: its return less the mean return of all runs at that tick. As all had the same traffic,
     what is left is what the decisions made of it (AuTO's own network instead: its reward and baseline, `paper.py`)
  4. one step of Adam along advantage times log probability, with an entropy bonus
Deterministic by the seed on one thread.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from central.lrla.flow_set import UNKNOWN_ROUTE, Choice, Floats, FlowSet, Ints
from central.lrla.laboratory import Lab, ticks
from central.lrla.network import Policy, log_probability
from central.lrla.paper import Baseline, PaperSettings, rewards
from central.lrla.rules import Ecmp
from simulator.longflows import throughputs
from simulator.results import FlowResults

_MULTIPLIERS = 0.01, 100.0  # least and largest
_MOST_BEYOND = 0.25  # one run of heavy traffic is not to turn everything


@dataclass(frozen=True)
class Settings:
    """Every knob.

    Attributes:
        iterations: updates.
        runs: of the same traffic in one iteration; their mean is the baseline.
        traffic_s: seconds of traffic of a run.
        horizon_s: costs that come so much later count 1/e.
        short_weight: what a flow that is not long costs, a long one costing 1.
        short_limit: most that the others may cost together, as a share of what they cost under `ecmp` with the default
            thresholds on the same traffic; 0: no limit. With one, both kinds count by such shares, the others' times a
            multiplier that begins at `short_weight`.
        limit_rate: how soon the multiplier follows: by e to the power of so many times what is beyond the limit.
        learning_rate: of Adam.
        entropy: weight of the bonus.
        gradient_norm: longest step.
        renew_s: how often a flow is decided on again, as reports come.
        loads, spines, oversubscriptions: fabrics are drawn from these.
        cdfs: and traffic from these.
        thresholds: of the hosts; empty: the default ones.
        rates: that a flow may be held to, as shares of its host's link; empty: rates are not chosen.
        network: `sets` (network.py) or AuTO's own, `paper` (paper.py), with its reward and baseline.
        paper: what that leaves open.
    """

    iterations: int = 45
    runs: int = 4
    traffic_s: float = 3.0
    horizon_s: float = 2.0
    short_weight: float = 1.0
    short_limit: float = 0.0
    limit_rate: float = 1.0
    learning_rate: float = 1e-2
    entropy: float = 1e-3
    gradient_norm: float = 1.0
    renew_s: float = 0.25
    loads: tuple[float, float] = (0.4, 0.7)
    spines: tuple[int, ...] = (2, 4)
    oversubscriptions: tuple[float, ...] = (1.0, 2.0)
    cdfs: tuple[str, ...] = ("websearch_bytes_hpcc", "datamining_vl2_bytes_trafficgenerator")
    thresholds: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    network: Literal["sets", "paper"] = "sets"
    paper: PaperSettings = field(default_factory=PaperSettings)


Decision = tuple[Any, list[Tensor]]  # what was seen; per kind of choice, what was chosen for each flow (m,)


class Sampler:
    """A scheme that draws from the network's probabilities, and keeps what it saw and did. One per run."""

    name = "sampled"

    def __init__(self, network: Policy, generator: torch.Generator) -> None:
        self._network = network
        self._eyes = network.eyes()
        self._generator = generator
        self.decisions: list[Decision] = []

    def watch(self, ended: FlowResults) -> None:
        """See `laboratory.Watcher`."""
        self._eyes.watch(ended)

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """One draw per flow."""
        seen = self._eyes.see(flows, asked)
        with torch.no_grad():
            chosen = [
                torch.multinomial(torch.softmax(scores, dim=1), 1, generator=self._generator)[:, 0]
                for scores in self._network(seen)
            ]
        self.decisions.append((seen, chosen))
        routes = torch.where(seen.usable.any(dim=1), chosen[0], torch.tensor(UNKNOWN_ROUTE))
        rates = np.array([*self._network.rates, np.inf])[chosen[2].numpy()] if self._network.rates else None
        return Choice(chosen[1].numpy(), routes.numpy(), rates)


@dataclass(frozen=True)
class Rollout:
    """One run of the policy; n ticks, d of them with decisions.

    Attributes:
        costs: of each tick, flows under way times its length: long ones and others, shape (n, 2).
        gains: size over completion time of the long flows that ended, by tick and sender, shape (n, hosts).
        at: tick of each decision, shape (d,).
        senders: of the flows decided on, d arrays of shape (m,).
        decisions: what was seen and done; stays where the run was made.
    """

    costs: Floats
    gains: Floats
    at: list[int]
    senders: list[Ints]
    decisions: list[Decision]


def draw(settings: Settings, rng: np.random.Generator) -> Lab:
    """A fabric and a kind of traffic."""
    return Lab(
        cdf=str(rng.choice(list(settings.cdfs))),
        load=float(rng.uniform(*settings.loads)),
        spines=int(rng.choice(list(settings.spines))),
        oversubscription=float(rng.choice(list(settings.oversubscriptions))),
        traffic_s=settings.traffic_s,
        renew_s=settings.renew_s,
        thresholds=settings.thresholds or Lab.thresholds,
    )


def plain_costs(lab: Lab, seed: int) -> Floats:
    """What long flows and others cost by themselves, shape (2,): routes by hash, the default thresholds."""
    plain = replace(lab, thresholds=Lab.thresholds)
    flows = np.array([(tick.long, tick.short) for tick in ticks(plain, Ecmp(), seed)], np.float64)
    costs: Floats = np.maximum(flows.sum(axis=0), 1) * lab.tick_s  # to be divided by, also where there were none
    return costs


def multiplied(multiplier: float, cost: float, plain: float, settings: Settings) -> float:
    """The multiplier after runs in which flows that are not long cost `cost`, and `plain` by themselves."""
    beyond = np.clip(cost / plain - settings.short_limit, -_MOST_BEYOND, _MOST_BEYOND)
    return float(np.clip(multiplier * np.exp(settings.limit_rate * beyond), *_MULTIPLIERS))


def roll(lab: Lab, network: Policy, seed: int, generator: torch.Generator) -> Rollout:
    """One run; its traffic is the seed's, its chances the generator's."""
    sampler = Sampler(network, generator)
    costs, gains, at, senders = [], [], [], []
    for number, tick in enumerate(ticks(lab, sampler, seed)):
        costs.append((tick.long * lab.tick_s, tick.short * lab.tick_s))
        gains.append(throughputs(tick.ended_long, lab.hosts))
        if len(tick.asked):
            at.append(number)
            senders.append(tick.flows.source[tick.asked])
    return Rollout(np.array(costs), np.array(gains), at, senders, sampler.decisions)


def returns(costs: Floats, discount: float) -> Floats:
    """Minus the discounted costs from each tick on; costs[t] came before the decision of tick t, so it is left out."""
    result, following = np.zeros(len(costs)), 0.0
    for tick in range(len(costs) - 1, -1, -1):
        result[tick] = following
        following = discount * following - costs[tick]
    return result


def advantages(rollouts: list[Rollout], discount: float, short_weight: float) -> list[Floats]:
    """Return of each run less their mean at each tick, over all their deviation; a run that has ended costs nothing."""
    longest = max(len(rollout.costs) for rollout in rollouts)
    costs = [rollout.costs @ (1.0, short_weight) for rollout in rollouts]
    table = np.stack([returns(np.pad(each, (0, longest - len(each))), discount) for each in costs])
    left = table - table.mean(axis=0)
    scale = left.std() + 1e-8
    return [left[row, : len(rollout.costs)] / scale for row, rollout in enumerate(rollouts)]


def weights_of(rollouts: list[Rollout], settings: Settings, tick_s: float, short_weight: float) -> list[list[Floats]]:
    """What the log probability of each decided flow is multiplied by: per run and decision, shape (m,)."""
    found = advantages(rollouts, float(np.exp(-tick_s / settings.horizon_s)), short_weight)
    return [
        [np.full(len(senders), advantage[tick]) for tick, senders in zip(rollout.at, rollout.senders, strict=True)]
        for rollout, advantage in zip(rollouts, found, strict=True)
    ]


def paper_weights(rollouts: list[Rollout], settings: Settings, tick_s: float, baseline: Baseline) -> list[list[Floats]]:
    """As `weights_of`, as published: the sender's reward less the running mean, which takes these in first."""
    ticks_per_step = max(round(settings.paper.step_s / tick_s), 1)
    found = [rewards(run.gains, np.array(run.at, np.int64), ticks_per_step, settings.paper.cap) for run in rollouts]
    for values in found:
        baseline.add(values)
    return [
        [left[senders] for left, senders in zip(values - baseline.mean, rollout.senders, strict=True)]
        for rollout, values in zip(rollouts, found, strict=True)
    ]


class Gradient(NamedTuple):
    """Of one run, as sums over its decided flows."""

    parts: list[npt.NDArray[np.float32]]  # in the order of the network's parameters
    entropy: float
    decisions: int


def gradient(network: Policy, decisions: list[Decision], weights: list[Floats], bonus: float) -> Gradient:
    """Of minus (weight times log probability plus bonus times entropy).

    Args:
        network: the policy.
        decisions: of one run.
        weights: of the flows of each, shape (m,).
        bonus: weight of the entropy.
    """
    network.zero_grad()
    terms, entropies = [], 0.0
    for (seen, chosen), weight in zip(decisions, weights, strict=True):
        logs, entropy = log_probability(network(seen), chosen)
        terms.append(-((torch.from_numpy(weight).float() * logs).sum() + bonus * entropy.sum()))
        entropies += float(entropy.detach().sum())
    if terms:
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
    parts = [
        np.zeros(tuple(each.shape), np.float32) if each.grad is None else each.grad.numpy().copy()
        for each in network.parameters()
    ]
    return Gradient(parts, entropies, sum(len(weight) for weight in weights))


def step(
    network: Policy, optimiser: torch.optim.Optimizer, gradients: list[Gradient], longest: float
) -> dict[str, float]:
    """One step of the optimiser on the mean over all decided flows, at most `longest` long; what happened."""
    decisions = max(sum(one.decisions for one in gradients), 1)
    for number, each in enumerate(network.parameters()):
        total = torch.from_numpy(gradients[0].parts[number].copy())
        for one in gradients[1:]:  # in the order of the runs: the same sum whoever made them
            total += torch.tensor(one.parts[number])  # a copy: Ray's arrays are not writable
        each.grad = total / decisions
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), longest)
    optimiser.step()
    entropy = sum(one.entropy for one in gradients) / decisions
    return {"entropy": entropy, "gradient": float(norm), "decisions": float(decisions)}
