"""The long-flow environment: every action is a level and a route for each of the long flows under way."""

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from fabricpilot.errors import UsageError
from fabricpilot.levels import check_levels, default_thresholds
from simulator.engine import Simulation
from simulator.envs import rewards
from simulator.envs.observations import Features, log_size, log_time
from simulator.longflows import on_links, paper_reward, throughputs, told, traffic
from simulator.results import ActiveFlows, FlowResults
from simulator.schemes import scheme
from simulator.topology import leaf_spine
from simulator.workloads.arrivals import mean_gap_s
from simulator.workloads.distribution import SizeDistribution

REWARD_CAP = 3.0
_OWN_FEATURES = 9  # besides the two per route


class LongFlows(gym.Env[Features, npt.NDArray[np.int64]]):
    """Choose priority and route of every long flow (AuTO's lRLA).

    ## Description
    Hosts of a leaf-spine fabric exchange Poisson traffic. Short flows follow K levels by bytes sent and take a route by
    hash. A flow that has sent more than the last threshold is long: every `interval_s` the agent gives each long flow a
    level and a route (a spine). Long flows beyond `slots` are left alone, the oldest first served.

    ## Action Space
    `MultiDiscrete([K, routes] * slots)`: level and route of the flow in each slot. Entries of empty slots do nothing;
    `action_masks()` and `info["occupied"]` say which are in use.

    ## Observation Space
    `Box(0, 1, (slots, 9 + 2 * routes), float32)`, one row per slot, zeros where empty

    | column | meaning |
    |---|---|
    | 0 | 1: there is a flow |
    | 1, 2 | bytes sent; backlog in the send buffer (log2 of bytes over 30) |
    | 3 | age (log10, 1 us to 100 s) |
    | 4 | mean rate so far over the link's |
    | 5, 6 | level over K-1; route over the number of routes |
    | 7, 8 | other flows of its sender, of its receiver, over 16 |
    | 9... | flows on the way up from its leaf, per route, over 16; then on the way down to its receiver's leaf |

    lRLA's own network sees any number of flows (`central/lrla`); traffic and the paper's reward are the same there.

    ## Rewards
    `reward="ratio"` (the paper's): sum of size/FCT of the long flows that ended, over the same of the step before, at
    most 3 and 1 where that has none. `reward="slowdown"` (default): minus the log of the mean slowdown of all flows
    that ended.

    ## Starting State
    The fabric after `warm_up_s` of traffic from idle.

    ## Episode End
    Truncated after `steps` steps; it never terminates.

    ## Arguments
    - `cdf`, `load` (of every host's link, below 1), `levels`, `link_rate_bps`. - `leaves`, `spines`, `hosts_per_leaf`,
      `oversubscription`. - `slots`: most long flows seen. - `interval_s`, `steps`, `warm_up_s`. - `reward`: as above.
    - `send_buffer_bytes`: how much backlog is visible. - `control_delay_s`: verdicts take effect so much later.

    ## Version History
    - v1: a flow is long as soon as it has reached the last threshold; a step in which none ends has the ratio 0.
    - v0: first version.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own form

    def __init__(
        self,
        cdf: str = "websearch_dctcp_bytes_trafficgenerator",
        load: float = 0.5,
        levels: int = 4,
        link_rate_bps: float = 1e9,
        leaves: int = 2,
        spines: int = 2,
        hosts_per_leaf: int = 4,
        oversubscription: float = 2.0,
        slots: int = 11,
        interval_s: float = 0.1,
        steps: int = 100,
        warm_up_s: float = 1.0,
        reward: str = "slowdown",
        send_buffer_bytes: float = 4e6,
        control_delay_s: float = 0.0,
        render_mode: str | None = None,
    ) -> None:
        check_levels(levels)
        if reward not in ("ratio", "slowdown"):
            raise UsageError(f"reward '{reward}' is unknown; choose ratio or slowdown")
        if slots < 1 or steps < 1 or not interval_s > 0:
            raise UsageError(f"{slots} slots, {steps} steps, interval {interval_s} s: each must be above 0")
        self.render_mode = render_mode
        self._distribution = SizeDistribution.load(cdf)
        mean_gap_s(self._distribution, load, link_rate_bps)  # refuses an impossible load
        self._topology = leaf_spine(leaves, spines, hosts_per_leaf, link_rate_bps, oversubscription)
        self._load, self._rate_bps, self._levels = load, link_rate_bps, levels
        self._slots, self._interval_s, self._steps = slots, interval_s, steps
        self._long_bytes = float(default_thresholds(levels).bytes[-1])
        self._warm_up_s = warm_up_s
        self._reward, self._delay_s = reward, control_delay_s
        self._buffer_bytes = send_buffer_bytes
        features = _OWN_FEATURES + 2 * self._topology.routes
        self.observation_space = gym.spaces.Box(0.0, 1.0, (slots, features), np.float32)
        self.action_space = gym.spaces.MultiDiscrete(np.array([levels, self._topology.routes] * slots))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Features, dict[str, Any]]:
        """An idle fabric, then `warm_up_s` of traffic, one interval at least."""
        super().reset(seed=seed)
        ranks = scheme("mlfq", thresholds=default_thresholds(self._levels))
        self._simulation = Simulation(ranks, self._topology, control_delay_s=self._delay_s)
        self._begin_s = 0.0
        self._done = 0
        results = self._traffic()
        while self._begin_s < self._warm_up_s:
            results = self._traffic()
        self._before = self._throughput(results)
        observation = self._observe()
        return observation, self._info(results)

    def step(self, action: npt.NDArray[np.int64]) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """Give the long flows their verdicts and let an interval pass."""
        for slot, flow in enumerate(self._long.flow.tolist()):
            level, route = int(action[2 * slot]), int(action[2 * slot + 1])
            self._simulation.set_verdict(flow, level=level, route=route)
        results = self._traffic()
        now = self._throughput(results)
        if self._reward == "ratio":
            reward = float(paper_reward(self._before, now, REWARD_CAP))
        else:
            reward = rewards.mean_slowdown(results)
        self._before = now
        self._done += 1
        observation = self._observe()
        return observation, reward, False, self._done >= self._steps, self._info(results)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which choices mean something, in the order of the flattened action: all of a used slot, else the first."""
        per_slot = self._levels + self._topology.routes
        masks = np.zeros((self._slots, per_slot), np.bool_)
        masks[:, 0] = masks[:, self._levels] = True
        masks[: len(self._long)] = True
        return masks.ravel()

    def _traffic(self) -> FlowResults:
        kind = self._distribution, self._load, self._topology, self._rate_bps
        if (trace := traffic(*kind, self._begin_s, self._interval_s, self.np_random)) is not None:
            self._simulation.add(trace)
        self._begin_s += self._interval_s
        return self._simulation.run_until(self._begin_s)

    def _throughput(self, results: FlowResults) -> float:
        return float(throughputs(results.rows(results.size_bytes > self._long_bytes), self._topology.hosts).sum())

    def _observe(self) -> Features:
        active = self._simulation.active()
        chosen = np.flatnonzero(told(active, self._long_bytes))[: self._slots]
        self._long = ActiveFlows(*(getattr(active, name)[chosen] for name in active.__dataclass_fields__))
        rows = np.zeros((self._slots, _OWN_FEATURES + 2 * self._topology.routes), np.float32)
        n, now_s, long = len(chosen), self._simulation.now_s, self._long
        if n:
            age_s = now_s - long.start_s
            rows[:n, 0] = 1
            rows[:n, 1] = log_size(long.attained_bytes)
            rows[:n, 2] = log_size(np.minimum(long.backlog_bytes, self._buffer_bytes))
            rows[:n, 3] = log_time(age_s)
            rows[:n, 4] = long.attained_bytes * 8 / np.maximum(age_s, 1e-9) / self._rate_bps
            rows[:n, 5] = long.level / (self._levels - 1)
            rows[:n, 6] = long.route / self._topology.routes
            rows[:n, 7] = (np.bincount(active.host, minlength=self._topology.hosts)[long.host] - 1) / 16
            rows[:n, 8] = (np.bincount(active.destination, minlength=self._topology.hosts)[long.destination] - 1) / 16
            rows[:n, _OWN_FEATURES:] = self._route_counts(active, long) / 16
        return np.clip(rows, 0.0, 1.0)

    def _route_counts(self, active: ActiveFlows, long: ActiveFlows) -> npt.NDArray[np.int64]:
        """Flows per route on the uplinks of each flow's leaf, then on the downlinks of its receiver's."""
        leaf = self._topology.leaf
        up, down = on_links(self._topology, active.host, active.destination, active.route)
        return np.concatenate([up[leaf[long.host]], down[leaf[long.destination]]], axis=1)

    def _info(self, results: FlowResults) -> dict[str, Any]:
        occupied = np.arange(self._slots) < len(self._long)
        info: dict[str, Any] = {"flows": len(results), "occupied": occupied}
        if len(results):
            info["mean_fct_us"] = float(results.fct_s.mean()) * 1e6
            info["mean_slowdown"] = float(results.slowdown.mean())
        return info
