"""The learned solver: risk-seeking evaluation.

The effect of moves is known exactly, so sampling several trajectories and deploying only the best costs nothing but
time (VMR2L, NSDI 24, section 4.3). The first trajectory takes the likeliest action at every step, the others sample;
actions far less likely than others are cut. All walk side by side, one batch per step. Each ends at its best prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from central.planner.learned.rollout import Cut, Trajectory
from central.planner.model.cluster import Cluster
from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.greedy import Walk
from fabricpilot.errors import UsageError

MOST_SAMPLES = 256


@dataclass(frozen=True)
class Options:
    """Risk-seeking options. Quantiles: the share of legal actions that is cut, the improbable ones.

    The temperature was chosen on seeds 1 to 3 of the medium shape: the published 1 strays too far from the policy.
    """

    samples: int = 8
    vm_quantile: float = 0.98
    place_quantile: float = 0.95
    temperature: float = 0.5
    weights: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise UsageError(f"--samples {self.samples}: expected 1 to {MOST_SAMPLES} trajectories")
        for name, quantile in (("--vm-quantile", self.vm_quantile), ("--place-quantile", self.place_quantile)):
            if not 0.0 <= quantile < 1.0:
                raise UsageError(f"{name} {quantile:g}: expected 0 or more and less than 1")


def learned(problem: Problem, deadline: Deadline, seed: int, options: Options | None = None) -> Solution:
    """The best of several trajectories of the policy."""
    best = best_of(sample(problem, deadline, seed, options or Options()))
    walk = best.walk
    while len(walk.steps) > best.length:
        walk.back()
    return Solution(tuple(walk.steps))


def sample(
    problem: Problem, deadline: Deadline, seed: int, options: Options, cluster: Cluster | None = None
) -> list[Trajectory]:
    """The trajectories."""
    import torch

    from central.planner.learned import weights
    from central.planner.learned.rollout import roll

    policy, _ = weights.load(options.weights or weights.DEFAULT)
    cluster = cluster or Cluster(problem.mapping, problem.limits.fixed)
    walks = [Walk(problem, cluster) for _ in range(options.samples)]
    generator = torch.Generator().manual_seed(seed)
    cut = Cut(options.vm_quantile, options.place_quantile, options.temperature, greedy_first=True)

    def stop(paths: Sequence[Trajectory]) -> bool:
        best = best_of(paths)
        deadline.board.sketch(best.walk.steps[: best.length])
        return deadline.over

    return roll(policy, walks, generator, cut, stop)


def best_of(paths: Sequence[Trajectory]) -> Trajectory:
    """Highest value, or with a goal that several reach, the shortest; then the shortest."""
    goal = paths[0].walk.value_needed is not None

    def merit(path: Trajectory) -> tuple[float, float]:
        if goal and path.walk.reached():
            return float("inf"), -float(path.length)
        return round(path.best, 6), -float(path.length)

    return max(paths, key=merit)
