"""Trajectories: several states of one cluster walked side by side by the policy, one batch per step.

Each walk keeps its observation tables and its tokens; a move touches two PMs, and only their trees are encoded anew. A
choice keeps what training needs. Actions far below the likeliest can be cut (`Cut`): VMR2L found that improbable
actions are mostly bad ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from central.planner.learned.network import Batch, Policy, batch_of
from central.planner.learned.observe import LOCAL_FEATURES, Observation, Observer
from central.planner.model.cluster import Bools, Ints
from central.planner.solvers.greedy import Walk
from central.planner.solvers.tables import Singles

REWARD_SCALE = 16 / 128  # a slot is 16 cores; the published reward is fragment cores removed over 128

Option = tuple[range, Singles, Bools]  # places of a VM's kind, their features, which are legal


@dataclass(frozen=True)
class Choice:
    """A decision as training sees it."""

    seen: Observation
    vm: int
    place_pm: Ints  # (K,) PM of each place of the VM's kind
    place_features: Singles  # (K, F)
    legal: Bools  # (K,)
    place: int  # position among the K
    log_probability: float
    value: float


@dataclass
class Trajectory:
    """One walk, the choices on it and the reward of each: value gained."""

    walk: Walk
    observer: Observer
    choices: list[Choice] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    best: float = 0.0
    length: int = 0  # of the best prefix
    over: bool = False


@dataclass(frozen=True)
class Cut:
    """Risk-seeking options: quantiles of probability below which actions are cut, per stage."""

    vm_quantile: float = 0.0
    place_quantile: float = 0.0
    temperature: float = 1.0  # below 1: nearer to the likeliest action
    greedy_first: bool = False  # the first trajectory takes the likeliest action every time


class Tokens:
    """VM and PM tokens of several walks, kept between steps."""

    def __init__(self, policy: Policy, observers: Sequence[Observer]) -> None:
        self.policy = policy
        self.vm, self.pm = policy.encode_all(batch_of([observer.observe() for observer in observers]))

    def follow(self, parents: Sequence[int]) -> None:
        """From now on row i continues what was row `parents[i]`."""
        self.vm, self.pm = self.vm[list(parents)], self.pm[list(parents)]

    def refresh(self, changed: list[tuple[int, Observer, int]]) -> None:
        """Encode anew the trees (walk, its observer, PM) that a move has changed."""
        leaves = max(1, max(len(observer.members[pm]) for _, observer, pm in changed))
        vm = np.zeros((len(changed), leaves, LOCAL_FEATURES), dtype=np.float32)
        mask = np.zeros((len(changed), leaves), dtype=np.bool_)
        for row, (_, observer, pm) in enumerate(changed):
            members = observer.members[pm]
            vm[row, : len(members)] = observer.vm[members, :LOCAL_FEATURES]
            mask[row, : len(members)] = True
        pms = np.stack([observer.pm[pm] for _, observer, pm in changed])
        tokens, hosts = self.policy.encode(torch.from_numpy(vm), torch.from_numpy(pms), torch.from_numpy(mask))
        for row, (walk, observer, pm) in enumerate(changed):
            members = observer.members[pm]
            self.vm[walk, members] = tokens[row, : len(members)]
            self.pm[walk, pm] = hosts[row]


def roll(
    policy: Policy,
    walks: Sequence[Walk],
    generator: torch.Generator,
    cut: Cut,
    stop: Callable[[Sequence[Trajectory]], bool] = lambda paths: False,
    keep: bool = False,
) -> list[Trajectory]:
    """Walk every one of `walks` until its budget is used up, the goal is met, nothing is legal, or `stop()`."""
    paths = [Trajectory(walk, Observer(walk), best=walk.net(), length=len(walk.steps)) for walk in walks]
    for path in paths:
        path.over = path.walk.budget.moves_left <= 0 or path.walk.reached()
    with torch.no_grad():
        tokens = Tokens(policy, [path.observer for path in paths])
        while not stop(paths) and any(not path.over for path in paths):
            _advance(policy, tokens, paths, generator, cut, keep)
    return paths


def _advance(
    policy: Policy, tokens: Tokens, paths: list[Trajectory], generator: torch.Generator, cut: Cut, keep: bool
) -> None:
    """One step of every trajectory that is not over."""
    active = [index for index, path in enumerate(paths) if not path.over]
    seen = [paths[i].observer.observe() for i in active]
    batch = batch_of(seen)
    vm_tokens = tokens.vm[active]
    scores, pms, values = policy.score(batch, vm_tokens, tokens.pm[active])
    pending = list(range(len(active)))
    changed: list[tuple[int, Observer, int]] = []
    for _ in range(8):  # a VM none of whose places is allowed (affinity, caps) is masked and another one chosen
        for row in [row for row in pending if not (scores[row] > -1e8).any()]:
            paths[active[row]].over = True
            pending.remove(row)
        if not pending:
            break
        greedy = [cut.greedy_first and active[row] == 0 for row in pending]
        vm_log, chosen = sample(scores[pending] / cut.temperature, cut.vm_quantile, generator, greedy)
        options = [_options(paths[active[row]], int(vm)) for row, vm in zip(pending, chosen, strict=True)]
        able = [position for position, option in enumerate(options) if option[2].any()]
        if able:
            picked = [pending[position] for position in able]
            part = Batch(*(getattr(batch, name)[picked] for name in Batch.__dataclass_fields__))
            pm, features, legal = stack_places(
                [paths[active[row]].walk.cluster for row in picked], [options[position] for position in able]
            )
            vms = torch.from_numpy(chosen[able])
            place_scores = policy.place_scores(part, vm_tokens[picked], pms[picked], vms, pm, features, legal)
            place_log, places = sample(
                place_scores / cut.temperature, cut.place_quantile, generator, [greedy[p] for p in able]
            )
            for position, row in enumerate(picked):
                path, option = paths[active[row]], options[able[position]]
                vm, index = int(vms[position]), int(places[position])
                if keep:
                    log = float(vm_log[able[position]] + place_log[position])
                    hosts = path.walk.cluster.place_pm[option[0].start : option[0].stop]
                    path.choices.append(
                        Choice(seen[row], vm, hosts, option[1], option[2], index, log, float(values[row]))
                    )
                touched = _go(path, vm, option[0].start + index)
                changed += [(active[row], path.observer, pm_number) for pm_number in touched]
        for position, row in enumerate(pending):
            scores[row, int(chosen[position])] = -1e9
        pending = [row for position, row in enumerate(pending) if position not in able]
    for row in pending:
        paths[active[row]].over = True
    if changed:
        tokens.refresh(changed)


def _go(path: Trajectory, vm: int, place: int) -> list[int]:
    """Make the move; the PMs it touched."""
    walk = path.walk
    source = int(walk.state.vm_place[vm])
    before = walk.net()
    walk.go(vm, place)
    path.observer.moved(vm, source, place)
    after = walk.net()
    path.rewards.append(after - before)
    if after > path.best + 1e-9:
        path.best, path.length = after, len(walk.steps)
    path.over = walk.budget.moves_left <= 0 or walk.reached()
    return sorted({int(walk.cluster.place_pm[source]), int(walk.cluster.place_pm[place])})


def _options(path: Trajectory, vm: int) -> Option:
    """Places for a VM; a cap or the byte limit takes some away."""
    places, features, legal = path.observer.places(vm)
    walk = path.walk
    if not walk.budget.only_mnl:
        source = int(walk.cluster.place_pm[walk.state.vm_place[vm]])
        for index in np.flatnonzero(legal):
            legal[index] = walk.budget.allows(vm, source, int(walk.cluster.place_pm[places.start + int(index)]))
    return places, features, legal


def stack_places(clusters: Sequence[object], options: Sequence[Option]) -> tuple[Tensor, Tensor, Tensor]:
    """Places of several decisions, padded: PM (B, K), features (B, K, F), legal (B, K)."""
    hosts = [
        cluster.place_pm[places.start : places.stop]  # type: ignore[attr-defined]
        for cluster, (places, _, _) in zip(clusters, options, strict=True)
    ]
    return stack(hosts, [features for _, features, _ in options], [legal for _, _, legal in options])


def stack(hosts: Sequence[Ints], features: Sequence[Singles], legal: Sequence[Bools]) -> tuple[Tensor, Tensor, Tensor]:
    """The same from arrays."""
    width = max(len(one) for one in hosts)
    pm = np.zeros((len(hosts), width), dtype=np.int64)
    table = np.zeros((len(hosts), width, features[0].shape[1]), dtype=np.float32)
    mask = np.zeros((len(hosts), width), dtype=np.bool_)
    for row, (one, values, able) in enumerate(zip(hosts, features, legal, strict=True)):
        pm[row, : len(one)], table[row, : len(one)], mask[row, : len(one)] = one, values, able
    return torch.from_numpy(pm), torch.from_numpy(table), torch.from_numpy(mask)


def sample(scores: Tensor, quantile: float, generator: torch.Generator, greedy: list[bool]) -> tuple[Tensor, Ints]:
    """(log-probabilities, actions) per row; actions below the quantile of the legal ones' probabilities are cut."""
    log = torch.log_softmax(scores, dim=-1)
    kept = log
    if quantile > 0.0:
        legal = (scores > -1e8).sum(dim=-1)
        # Of n legal actions the likeliest ceil((1 - quantile) n) stay, at least one; the rest sorts behind them.
        stay = torch.ceil((1.0 - quantile) * legal).long().clamp(min=1)
        top = log.topk(int(stay.max()), dim=-1).values
        kept = log.masked_fill(log < top.gather(1, stay[:, None] - 1), -1e9)
    noise = -torch.log(-torch.log(torch.rand(kept.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
    noise[torch.tensor(greedy)] = 0.0
    actions = (kept + noise).argmax(dim=-1)  # Gumbel-max: a sample from the softmax
    return log.gather(1, actions[:, None])[:, 0], actions.numpy()
