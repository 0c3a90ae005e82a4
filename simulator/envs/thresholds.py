"""The threshold environment: every action is one vector of thresholds, every step some traffic under it."""

from typing import Any, Literal

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds, check_levels, default_thresholds
from simulator.engine import Simulation
from simulator.envs import rewards
from simulator.envs.observations import COMPACT, PAPER_FEATURES, PAPER_FLOWS, Experience, Features, compact, paper
from simulator.results import FlowResults, p99
from simulator.schemes import scheme
from simulator.topology import star
from simulator.workloads.arrivals import mean_gap_s, poisson
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import to_one

LOWEST_BYTES = 1_000.0  # of a threshold: action -1
HIGHEST_BYTES = 100e6  # action 1
REWARD_CAP = 3.0  # of the paper's ratio


def thresholds_of(action: npt.ArrayLike) -> Thresholds:
    """Thresholds of an action in [-1, 1]: sorted, on a log scale from 1 KB to 100 MB, ascending by at least 1 byte."""
    exponent = (np.sort(np.clip(np.asarray(action, np.float64), -1, 1)) + 1) / 2
    values = np.rint(LOWEST_BYTES * (HIGHEST_BYTES / LOWEST_BYTES) ** exponent).astype(np.int64)
    for i in range(1, len(values)):
        values[i] = max(values[i], values[i - 1] + 1)
    return Thresholds.of(values.tolist())


def action_of(thresholds: Thresholds) -> npt.NDArray[np.float32]:
    """The action that sets `thresholds` (within 1 KB to 100 MB); inverse of `thresholds_of`."""
    share = np.log(np.array(thresholds.bytes) / LOWEST_BYTES) / np.log(HIGHEST_BYTES / LOWEST_BYTES)
    action: npt.NDArray[np.float32] = np.clip(2 * share - 1, -1, 1).astype(np.float32)
    return action


class MLFQThresholds(gym.Env[Features, npt.NDArray[np.float32]]):
    """Choose the demotion thresholds of a host group (AuTO's sRLA).

    ## Description
    Senders around one switch send Poisson traffic of a given flow-size distribution and load to one receiver. Switch
    and hosts serve K strict priorities; a flow starts in the first and is demoted as its bytes sent reach the
    thresholds. Each step sets thresholds, lets `flows_per_step` further flows arrive, and observes those that ended.

    ## Action Space
    `Box(-1, 1, (K-1,), float32)`: thresholds on a log scale, -1 is 1 KB and 1 is 100 MB. They are sorted, so every
    action is valid.

    ## Observation Space
    `observation="compact"` (default): `Box(0, 1, (90,), float32)`, the table of `simulator.envs.observations.compact`:
    flow sizes, load, K, link rate, thresholds in force and what flows experienced, of the same length for every K.

    `observation="paper"`: `Box(0, 1, (700,), float32)`: the last 100 finished short flows (below the last threshold) of
    the step, 7 features each: source, destination, ports, protocol, FCT and size (log scale), zero-padded.

    ## Rewards
    `reward="mean_fct"` (default): minus the log of mean FCT over the mean FCT of the same flows alone. `slowdown`,
    `p99`: minus the log of the mean, or the 99th percentile, of slowdown. `ratio`: the paper's, mean FCT of the step
    before over this one's, at most 3.

    ## Starting State
    An idle fabric with the default thresholds; one step of traffic under them has been observed.

    ## Episode End
    Truncated after `steps` steps; it never terminates.

    ## Arguments
    - `cdf`: flow-size distribution by name or file. - `load`: of the receiver's link, below 1. - `levels`: K, 2 to 8.
    - `flows_per_step`, `steps`. - `link_rate_bps`, `hosts`. - `observation`, `reward`: as above.
    - `control_delay_s`: thresholds take effect so much later. - `scheme_name`: `mlfq` or `backlog`.

    ## Version History
    - v1: the compact observation has the same length for every K, sizes relative to their mean. - v0: first version.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own form

    def __init__(
        self,
        cdf: str = "websearch_dctcp_bytes_trafficgenerator",
        load: float = 0.8,
        levels: int = 4,
        flows_per_step: int = 500,
        steps: int = 50,
        link_rate_bps: float = 1e9,
        hosts: int = 16,
        observation: Literal["compact", "paper"] = "compact",
        reward: Literal["mean_fct", "slowdown", "p99", "ratio"] = "mean_fct",
        control_delay_s: float = 0.0,
        scheme_name: Literal["mlfq", "backlog"] = "mlfq",
        render_mode: str | None = None,
    ) -> None:
        check_levels(levels)
        if observation not in ("compact", "paper"):
            raise UsageError(f"observation '{observation}' is unknown; choose compact or paper")
        if reward != "ratio" and reward not in rewards.KINDS:
            raise UsageError(f"reward '{reward}' is unknown; choose from: ratio, {', '.join(rewards.KINDS)}")
        if flows_per_step < 1 or steps < 1:
            raise UsageError(f"{flows_per_step} flows per step, {steps} steps; both must be at least 1")
        self.render_mode = render_mode
        self._distribution = SizeDistribution.load(cdf)
        mean_gap_s(self._distribution, load, link_rate_bps)  # refuses an impossible load
        self._load, self._rate_bps, self._hosts = load, link_rate_bps, hosts
        self._flows, self._steps = flows_per_step, steps
        self._scheme = scheme(scheme_name, thresholds=default_thresholds(levels))
        self._delay_s = control_delay_s
        self._observation, self._reward = observation, reward
        length = PAPER_FLOWS * PAPER_FEATURES if observation == "paper" else COMPACT
        self.observation_space = gym.spaces.Box(0.0, 1.0, (length,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (levels - 1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Features, dict[str, Any]]:
        """An idle fabric, then one step of traffic under the default thresholds."""
        super().reset(seed=seed)
        self._thresholds = default_thresholds(self._scheme.levels)
        topology = star(self._hosts, self._rate_bps)
        initial = self._scheme.with_thresholds(self._thresholds)
        self._simulation = Simulation(initial, topology, receiver=0, control_delay_s=self._delay_s)
        self._last_s = 0.0
        self._done = 0
        results, load = self._traffic()
        self._before_s = float(results.fct_s.mean()) if len(results) else 0.0
        return self._observe(results, load), self._info(results)

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """Set thresholds and let traffic pass."""
        self._thresholds = thresholds_of(action)
        self._simulation.set_thresholds(self._thresholds)
        results, load = self._traffic()
        now_s = float(results.fct_s.mean()) if len(results) else 0.0
        if self._reward == "ratio":
            reward = rewards.ratio(self._before_s, now_s, REWARD_CAP)
        else:
            reward = rewards.KINDS[self._reward](results)
        self._before_s = now_s or self._before_s
        self._done += 1
        return self._observe(results, load), reward, False, self._done >= self._steps, self._info(results)

    def _traffic(self) -> tuple[FlowResults, float]:
        """Finished flows of the next step, and the load that was offered in it."""
        rng = self.np_random
        trace = poisson(self._distribution, self._load, self._rate_bps, rng, count=self._flows)
        trace = to_one(trace.shifted(self._last_s), self._hosts, rng)
        span_s = float(trace.start_s[-1]) - self._last_s
        self._last_s = float(trace.start_s[-1])
        self._simulation.add(trace)
        return self._simulation.run_until(self._last_s), trace.total_bytes * 8 / (span_s * self._rate_bps)

    def _observe(self, results: FlowResults, load: float) -> Features:
        if self._observation == "compact":
            sizes = LogHistogram.of(results.size_bytes)
            seen = Experience.of(results) if len(results) else None
            return compact(sizes, load, self._rate_bps, self._thresholds, seen)
        short = results.size_bytes < self._thresholds.bytes[-1]
        chosen = results.rows(short)
        ports = 32_768 + chosen.flow * 7919 % 28_232  # as a kernel draws ephemeral ports: of no meaning
        return paper(chosen, ports, self._hosts)

    def _info(self, results: FlowResults) -> dict[str, Any]:
        info: dict[str, Any] = {"flows": len(results), "thresholds": self._thresholds.bytes}
        if len(results):
            info["mean_fct_us"] = float(results.fct_s.mean()) * 1e6
            info["p99_fct_us"] = p99(results.fct_s) * 1e6
            info["mean_slowdown"] = float(results.slowdown.mean())
        return info
