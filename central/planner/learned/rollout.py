"""Trajectories: several states of one cluster walked side by side by the policy, one batch per step.

A decision keeps what training needs: the observation, the choice, its log-probability and the value. Actions far below
the likeliest can be cut (`cut`): VMR2L found that improbable actions are mostly bad ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from central.planner.learned.network import Batch, Policy, batch_of
from central.planner.learned.observe import Observation, Observer, Singles
from central.planner.model.cluster import Bools, Ints
from central.planner.solvers.greedy import Walk


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
    choices: list[Choice] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    best: float = 0.0
    length: int = 0  # of the best prefix
    over: bool = False


@dataclass(frozen=True)
class Cut:
    """Risk-seeking options: quantiles of probability below which actions are cut, per stage; greedy takes the best."""

    vm_quantile: float = 0.0
    place_quantile: float = 0.0
    greedy_first: bool = False  # the first trajectory takes the likeliest action every time


def roll(
    policy: Policy,
    walks: Sequence[Walk],
    generator: torch.Generator,
    cut: Cut,
    stop: Callable[[], bool] = lambda: False,
    keep: bool = False,
) -> list[Trajectory]:
    """Walk every one of `walks` until its budget is used up, the goal is met, nothing is legal, or `stop()`."""
    paths = [Trajectory(walk, best=walk.net(), length=len(walk.steps)) for walk in walks]
    observer = Observer(walks[0].valuation)
    while not stop():
        active = [path for path in paths if not path.over]
        if not active:
            break
        with torch.no_grad():
            _advance(policy, observer, active, generator, cut, keep, paths[0])
    return paths


def _advance(
    policy: Policy,
    observer: Observer,
    active: list[Trajectory],
    generator: torch.Generator,
    cut: Cut,
    keep: bool,
    first: Trajectory,
) -> None:
    """One step of every active trajectory."""
    seen = [
        observer.observe(path.walk.state, path.walk.budget.moves / max(1, path.walk.budget.limits.mnl))
        for path in active
    ]
    batch = batch_of(seen)
    scores, tokens, values = policy(batch)
    greedy = [cut.greedy_first and path is first for path in active]
    pending = list(range(len(active)))
    refused = scores.clone()
    for _ in range(8):  # a VM none of whose places is allowed (affinity, caps) is masked and another one chosen
        for row in [row for row in pending if not (refused[row] > -1e8).any()]:
            active[row].over = True
            pending.remove(row)
        if not pending:
            return
        vm_log, chosen = _sample(refused[pending], cut.vm_quantile, generator, [greedy[row] for row in pending])
        options = [
            observer.places(active[row].walk.state, seen[row], vm) for row, vm in zip(pending, chosen, strict=True)
        ]
        for position, row in enumerate(pending):
            _limit(active[row].walk, int(chosen[position]), options[position])
        able = [position for position, option in enumerate(options) if option[2].any()]
        if able:
            rows = [pending[position] for position in able]
            _place(
                policy, batch, tokens, values, active, seen, rows,
                [int(chosen[p]) for p in able], [options[p] for p in able], vm_log[able], generator, cut, greedy, keep,
            )  # fmt: skip
        for position, row in enumerate(pending):
            refused[row, int(chosen[position])] = -1e9
        pending = [row for position, row in enumerate(pending) if position not in set(able)]
    for row in pending:
        active[row].over = True


def _limit(walk: Walk, vm: int, option: tuple[range, Singles, Bools]) -> None:
    """Take away places that a cap or the byte limit forbids."""
    if walk.budget.only_mnl:
        return
    places, _, legal = option
    source = int(walk.cluster.place_pm[walk.state.vm_place[vm]])
    for index in np.flatnonzero(legal):
        legal[index] = walk.budget.allows(vm, source, int(walk.cluster.place_pm[places.start + int(index)]))


def _place(
    policy: Policy,
    batch: Batch,
    tokens: Tensor,
    values: Tensor,
    active: list[Trajectory],
    seen: list[Observation],
    rows: list[int],
    vms: list[int],
    options: list[tuple[range, Singles, Bools]],
    vm_log: Tensor,
    generator: torch.Generator,
    cut: Cut,
    greedy: list[bool],
    keep: bool,
) -> None:
    """Stage two for the trajectories `rows`, and the moves."""
    clusters = [active[row].walk.cluster for row in rows]
    pms = [c.place_pm[o[0].start : o[0].stop] for c, o in zip(clusters, options, strict=True)]
    pm, features, legal = stack_places(pms, [o[1] for o in options], [o[2] for o in options])
    part = Batch(*(getattr(batch, name)[rows] for name in Batch.__dataclass_fields__))
    scores = policy.place_scores(part, tokens[rows], torch.tensor(vms), pm, features, legal)
    place_log, chosen = _sample(scores, cut.place_quantile, generator, [greedy[row] for row in rows])
    for position, row in enumerate(rows):
        path, vm, index = active[row], vms[position], int(chosen[position])
        places, table, mask = options[position]
        before = path.walk.net()
        path.walk.go(vm, places.start + index)
        after = path.walk.net()
        if keep:
            log = float(vm_log[position] + place_log[position])
            path.choices.append(Choice(seen[row], vm, pms[position], table, mask, index, log, float(values[row])))
            path.rewards.append(after - before)
        if after > path.best + 1e-9:
            path.best, path.length = after, len(path.walk.steps)
        path.over = path.walk.budget.moves_left <= 0 or path.walk.reached()


def stack_places(pms: list[Ints], features: list[Singles], legal: list[Bools]) -> tuple[Tensor, Tensor, Tensor]:
    """Places of several decisions, padded: PM (B, K), features (B, K, F), legal (B, K)."""
    width = max(len(one) for one in pms)
    pm = np.zeros((len(pms), width), dtype=np.int64)
    table = np.zeros((len(pms), width, features[0].shape[1]), dtype=np.float32)
    mask = np.zeros((len(pms), width), dtype=np.bool_)
    for row, (one, values, able) in enumerate(zip(pms, features, legal, strict=True)):
        pm[row, : len(one)], table[row, : len(one)], mask[row, : len(one)] = one, values, able
    return torch.from_numpy(pm), torch.from_numpy(table), torch.from_numpy(mask)


def _sample(scores: Tensor, quantile: float, generator: torch.Generator, greedy: list[bool]) -> tuple[Tensor, Ints]:
    """(log-probabilities, actions) per row; actions below the quantile of the legal ones' probabilities are cut."""
    log = torch.log_softmax(scores, dim=-1)
    kept = log
    if quantile > 0.0:
        legal = scores > -1e8
        floor = torch.stack(
            [torch.quantile(row[able], quantile, interpolation="higher") for row, able in zip(log, legal, strict=True)]
        )
        kept = log.masked_fill(log < floor[:, None], -1e9)
    noise = -torch.log(-torch.log(torch.rand(kept.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
    noise[torch.tensor(greedy)] = 0.0
    actions = (kept + noise).argmax(dim=-1)  # Gumbel-max: a sample from the softmax
    return log.gather(1, actions[:, None])[:, 0], actions.numpy()
