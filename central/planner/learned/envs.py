"""Gymnasium environments of VM rescheduling: one move per step.

Registered by `register_envs` as fabricpilot/Reschedule-v0 (base), -Affinity-v0, -Penalty-v0 and -Sparse-v0.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from central.planner.generator import Shape, generate
from central.planner.learned.observe import PM_FEATURES, VM_FEATURES, Observation, Observer
from central.planner.learned.rollout import REWARD_SCALE
from central.planner.model.objective import parse_objective
from central.planner.model.problem import Limits, Problem
from central.planner.solvers.greedy import Walk


@dataclass(frozen=True)
class Kind:
    """What makes one environment differ from the others."""

    affinity: bool = False
    penalty: float = 0.0  # taken off the reward of an invalid action
    sparse: bool = False  # the observation has the trees of PMs and their VMs


class RescheduleEnv(gym.Env[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64]]):
    """VM rescheduling, one move per step.

    ## Description
    A cluster of PMs with NUMA nodes and VMs on them; each step moves one VM to a place (a PM and node, or a pair of
    nodes for a VM that spans two) so that more 16-core requests fit. Nothing is random after the reset.

    ## Action space
    `MultiDiscrete([V, P])`: a VM and a place. Stage one's mask is `info["vm_mask"]`; stage two's is
    `place_mask(vm)`. An invalid action changes nothing, counts as a step and sets `info["invalid"]`.

    ## Observation space
    | key | shape | meaning |
    |---|---|---|
    | vm | (V, 14) | features of each VM (`observe.Observer`) |
    | pm | (M, 9) | features of each PM |
    | members | (M, L) | only in Sparse: VMs of each PM, -1 beyond their number |

    ## Reward
    Value gained by the move (slots, for the default objective) times 16 / 128; an invalid action costs `penalty` in the
    penalty environment and 0 elsewhere.

    ## Start
    A generated mapping (`shape`), drawn by the seed of `reset`; V, M and the places are the shape's.

    ## Episode end
    Truncated after `mnl` steps; terminated when no legal move is left.

    ## Arguments
    `kind`: see `Kind`; `shape`: what mappings to draw; `mnl`; `objective` as on the command line.

    ## Version history
    v0: first.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        kind: Kind = Kind(),
        shape: Shape | None = None,
        mnl: int = 10,
        objective: str = "fr",
    ) -> None:
        base = shape or Shape(pms=12, vms=90, affinity_sets=12 if kind.affinity else 0, pms_per_rack=4)
        self.kind, self.shape, self.mnl, self.goal = kind, base, mnl, parse_objective(objective)
        nodes = base.nodes_per_pm
        self.places = base.pms * (nodes + nodes * (nodes - 1) // 2)
        self.action_space = spaces.MultiDiscrete([base.vms, self.places])
        parts: dict[str, spaces.Space[Any]] = {
            "vm": spaces.Box(-np.inf, np.inf, (base.vms, VM_FEATURES), np.float32),
            "pm": spaces.Box(-np.inf, np.inf, (base.pms, PM_FEATURES), np.float32),
        }
        if kind.sparse:
            parts["members"] = spaces.Box(-1, base.vms - 1, (base.pms, self._most_members()), np.int64)
        self.observation_space: spaces.Space[Any] = spaces.Dict(parts)
        self.walk: Walk | None = None
        self.steps = 0

    def _most_members(self) -> int:
        """VMs of the smallest size that one PM could hold."""
        return self.shape.nodes_per_pm * self.shape.node_cores // 2

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """A new mapping; the same for the same seed."""
        super().reset(seed=seed)
        mapping = generate(self.shape, int(self.np_random.integers(2**31)))
        self.walk = Walk(Problem(mapping, self.goal, Limits(self.mnl)))
        self.observer = Observer(self.walk, net=False)
        self.steps = 0
        self.seen = self.observer.observe()
        return self._observation(), self._info(False)

    def step(
        self, action: npt.NDArray[np.int64]
    ) -> tuple[dict[str, npt.NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """Make one move, or none if it is not legal."""
        assert self.walk is not None, "reset first"
        vm, place = int(action[0]), int(action[1])
        before = self.walk.value()
        legal = bool(self.place_mask(vm)[place])
        if legal:
            source = int(self.walk.state.vm_place[vm])
            self.walk.go(vm, place)
            self.observer.moved(vm, source, place)
        self.steps += 1
        self.seen = self.observer.observe()
        reward = (self.walk.value() - before) * REWARD_SCALE if legal else -self.kind.penalty
        stuck = not self.seen.vm_mask.any()
        return self._observation(), float(reward), stuck, self.steps >= self.mnl, self._info(not legal)

    def place_mask(self, vm: int) -> npt.NDArray[np.bool_]:
        """(P,) places that VM may go to now."""
        assert self.walk is not None, "reset first"
        mask = np.zeros(self.places, dtype=np.bool_)
        if self.seen.vm_mask[vm]:
            places, _, legal = self.observer.places(vm)
            mask[places.start : places.stop] = legal
        return mask

    def _observation(self) -> dict[str, npt.NDArray[Any]]:
        seen: Observation = self.seen
        parts: dict[str, npt.NDArray[Any]] = {"vm": seen.vm, "pm": seen.pm}
        if self.kind.sparse:
            table = np.full((self.shape.pms, self._most_members()), -1, dtype=np.int64)
            for pm, vms in enumerate(self.observer.members):
                table[pm, : len(vms)] = vms
            parts["members"] = table
        return parts

    def _info(self, invalid: bool) -> dict[str, Any]:
        assert self.walk is not None
        rate = self.walk.valuation.objective(self.walk.value())
        return {"invalid": invalid, "vm_mask": self.seen.vm_mask, "fragment_rate": rate}


KINDS = {
    "Reschedule": Kind(),
    "RescheduleAffinity": Kind(affinity=True),
    "ReschedulePenalty": Kind(penalty=0.1),
    "RescheduleSparse": Kind(sparse=True),
}


def register_envs() -> list[str]:
    """Register all of them with Gymnasium; their ids."""
    names = []
    for name, kind in KINDS.items():
        full = f"fabricpilot/{name}-v0"
        if full not in gym.registry:
            gym.register(full, entry_point="central.planner.learned.envs:RescheduleEnv", kwargs={"kind": kind})
        names.append(full)
    return names
