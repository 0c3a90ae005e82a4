"""PPO for the two-stage policy, whole in this file (Schulman et al., 2017; details as in VMR2L and cleanrl).

Logic of one iteration:
  1. several walks on freshly drawn small mappings, side by side, by the current policy; every choice is kept
  2. advantages by GAE(gamma, lambda) from the rewards (value gained, in slots, over 8: 16 cores over VMR2L's 128)
  3. a few passes over all choices in small batches: the clipped surrogate on the joint probability of VM and place, the
     value's squared error, an entropy bonus on both stages
Deterministic by the seed on one thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from central.planner.learned import distill, weights
from central.planner.learned.network import Policy, batch_of
from central.planner.learned.rollout import REWARD_SCALE, Choice, Cut, Trajectory, roll, stack
from central.planner.model.problem import Problem
from central.planner.solvers.greedy import Walk


@dataclass(frozen=True)
class Settings:
    """Every knob. The first seven are VMR2L's."""

    learning_rate: float = 2.5e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.1
    entropy: float = 0.005
    value_weight: float = 0.5
    walks: int = 8  # side by side
    passes: int = 2
    batch: int = 32
    iterations: int = 200
    gradient_norm: float = 0.5
    problems: distill.Settings = field(default_factory=distill.Settings)
    seed: int = 0


def advantages(
    rewards: npt.NDArray[np.float64], values: npt.NDArray[np.float64], gamma: float, gae_lambda: float
) -> npt.NDArray[np.float64]:
    """Generalised advantages (T,) of one finished episode (Schulman et al., 2016, equation 16): nothing comes after."""
    result = np.zeros(len(rewards))
    following, carried = 0.0, 0.0
    for step in range(len(rewards) - 1, -1, -1):
        surprise = rewards[step] + gamma * following - values[step]
        carried = surprise + gamma * gae_lambda * carried
        result[step] = carried
        following = values[step]
    return result


def evaluate(policy: Policy, choices: list[Choice]) -> tuple[Tensor, Tensor, Tensor]:
    """(joint log-probability, entropy of both stages, value), each (B,), of choices under the policy as it is."""
    states = batch_of([choice.seen for choice in choices])
    vm_tokens, pm_tokens = policy.encode_all(states)
    scores, pms, values = policy.score(states, vm_tokens, pm_tokens)
    vm_log = torch.log_softmax(scores, dim=-1)
    pm, features, legal = stack(
        [choice.place_pm for choice in choices],
        [choice.place_features for choice in choices],
        [choice.legal for choice in choices],
    )
    vm = torch.tensor([choice.vm for choice in choices])
    place_log = torch.log_softmax(policy.place_scores(states, vm_tokens, pms, vm, pm, features, legal), dim=-1)
    place = torch.tensor([choice.place for choice in choices])
    joint = vm_log.gather(1, vm[:, None])[:, 0] + place_log.gather(1, place[:, None])[:, 0]
    entropy = -(vm_log.exp() * vm_log).sum(dim=-1) - (place_log.exp() * place_log).sum(dim=-1)
    return joint, entropy, values


def update(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    paths: list[Trajectory],
    settings: Settings,
    random: np.random.Generator,
) -> dict[str, float]:
    """One PPO update on finished trajectories; what happened, averaged."""
    choices = [choice for path in paths for choice in path.choices]
    gains, returns = [], []
    for path in paths:
        rewards = np.array(path.rewards) * REWARD_SCALE
        expected = np.array([choice.value for choice in path.choices])
        gain = advantages(rewards, expected, settings.gamma, settings.gae_lambda)
        gains.append(gain)
        returns.append(gain + expected)
    advantage = torch.tensor(np.concatenate(gains), dtype=torch.float32)
    target = torch.tensor(np.concatenate(returns), dtype=torch.float32)
    old = torch.tensor([choice.log_probability for choice in choices])
    told = {"loss": 0.0, "clipped": 0.0, "entropy": 0.0}
    batches = 0
    for _ in range(settings.passes):
        order = random.permutation(len(choices))
        for start in range(0, len(order), settings.batch):
            rows = order[start : start + settings.batch]
            picked = advantage[rows]
            normal = (picked - picked.mean()) / (picked.std(unbiased=False) + 1e-8)
            joint, entropy, values = evaluate(policy, [choices[row] for row in rows])
            ratio = (joint - old[rows]).exp()
            limited = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            surrogate = torch.minimum(ratio * normal, limited * normal).mean()
            value_loss = ((values - target[rows]) ** 2).mean()
            loss = -surrogate + settings.value_weight * value_loss - settings.entropy * entropy.mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.gradient_norm)
            optimiser.step()
            told["loss"] += loss.item()
            told["clipped"] += ((ratio - 1).abs() > settings.clip).float().mean().item()
            told["entropy"] += entropy.mean().item()
            batches += 1
    return {name: value / max(1, batches) for name, value in told.items()}


def train(
    settings: Settings,
    out: Path,
    policy: Policy | None = None,
    report: Callable[[str], None] = print,
    problems: Callable[[np.random.Generator], Problem] | None = None,
    before: dict[str, object] | None = None,
) -> Policy:
    """Train from `policy` (or from nothing); a checkpoint goes to `out` every 20 iterations."""
    torch.manual_seed(settings.seed)
    random = np.random.default_rng(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    policy = policy or Policy()
    policy.eval()  # there is no dropout; this only says that normalisation is not adapted
    optimiser = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5)
    started = time.monotonic()
    smooth = 0.0
    for iteration in range(1, settings.iterations + 1):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1 - (iteration - 1) / settings.iterations)
        problem = problems(random) if problems else distill.random_problem(settings.problems, random)
        first = Walk(problem)
        walks = [first, *(Walk(problem, first.cluster) for _ in range(settings.walks - 1))]
        paths = [path for path in roll(policy, walks, generator, Cut(), keep=True) if path.choices]
        if not paths:
            continue
        gained = float(np.mean([sum(path.rewards) for path in paths])) / problem.limits.mnl
        told = update(policy, optimiser, paths, settings, random)
        smooth = gained if iteration == 1 else 0.95 * smooth + 0.05 * gained
        if iteration % 10 == 0:
            report(
                f"iteration {iteration} slots per move {smooth:.3f} entropy {told['entropy']:.2f} "
                f"clipped {told['clipped']:.3f} {time.monotonic() - started:.0f} s"
            )
        if iteration % 20 == 0 or iteration == settings.iterations:
            record = {"algorithm": "ppo", "iterations": iteration, "seconds": round(time.monotonic() - started)}
            weights.save(policy, out, {**record, "seed": settings.seed, "before": before})
    return policy
