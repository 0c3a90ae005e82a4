"""The simulated world sRLA trains in: thresholds are tried on traffic, beside the base on the same traffic.

`training` steps many of these side by side; stable-baselines3 takes one as it is. Each situation
(`simulator.workloads.situations`) lasts `steps` steps; every step draws fresh flows, simulates them under the action's
thresholds, and, for the relative reward, once more under the base's. Both see the same flows, so the luck of the draw
cancels. The ratio is AuTO's reward.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from central.policy.base import GroupSummary, Outcome
from central.srla.encoding import ACTIONS, Encoding, Singles, mask_of
from central.thresholds.simulated import Link, results
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from fabricpilot.wire import FlowSummary
from simulator.arrays import Floats
from simulator.envs import rewards
from simulator.envs.observations import PAPER_FLOWS, Experience
from simulator.envs.thresholds import REWARD_CAP
from simulator.results import FlowResults
from simulator.statistics import BUCKETS
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.situations import Range, Situation, draw
from simulator.workloads.trace import Trace

RewardKind = Literal["relative", "ratio"]


@dataclass(frozen=True)
class Settings:
    """Every parameter of the training environment.

    Attributes:
        range: what situations are drawn from.
        reward: `relative`: log of the objective under the base over that under the action, same flows, times 100 (so
            about the gain in percent); `ratio`: the paper's, the last step's mean FCT over this one's, less 1.
        cap: bound of the relative reward both ways, so that very bad trials do not outweigh the rest.
        objective: of the relative reward: mean completion time, or mean slowdown.
        flows: flows per step.
        reported: fewest and most flows behind the histogram that the agent sees.
        steps: per situation.
        situations: kept per environment and met again; finding the exact base of a new one takes a third of a second.
    """

    range: Range = field(default_factory=Range)
    reward: RewardKind = "relative"
    cap: float = 20.0
    objective: Literal["fct", "slowdown"] = "fct"
    flows: int = 10_000
    reported: tuple[int, int] = (2_000, 100_000)
    steps: int = 4
    situations: int = 40


@dataclass(frozen=True, eq=False)
class Met:
    """A situation, and what its hosts report of it whatever the thresholds: sizes and load, hence the base."""

    situation: Situation
    sizes: LogHistogram
    base: Floats

    def under(self, thresholds: Thresholds, trace: Trace) -> FlowResults:
        """What the flows of `trace` experience under `thresholds`."""
        return results(trace, thresholds, Link.real(self.situation.rate_bps), self.situation.visible_bytes)

    def summary(self, thresholds: Thresholds | None = None, seen: FlowResults | None = None) -> GroupSummary:
        """What a policy is told when `seen` is what flows experienced under `thresholds`."""
        some = seen is not None and len(seen) > 0
        return GroupSummary(
            self.situation.sizes.name,
            self.situation.levels,
            1,
            float(len(seen)) if seen is not None else 0.0,
            self.situation.load,
            self.sizes,
            thresholds,
            self.situation.rate_bps,
            outcome_of(seen) if some and seen is not None else None,
            sample_of(seen, thresholds) if some and seen is not None and thresholds is not None else (),
        )


def meet(situation: Situation, reported: int, encoding: Encoding, random: np.random.Generator) -> Met:
    """A situation of which `reported` flows have been reported."""
    sizes = LogHistogram.of(situation.sizes.sample(random, reported))
    blank = Met(situation, sizes, np.zeros(ACTIONS))
    return Met(situation, sizes, encoding.base_for(blank.summary()))


def outcome_of(seen: FlowResults) -> Outcome:
    """What central would be told of these flows; at least one."""
    felt = Experience.of(seen)
    bucket = np.searchsorted([edge for _, edge in BUCKETS], seen.size_bytes, side="left")
    shares = np.bincount(bucket, minlength=len(BUCKETS)) / len(seen)
    return Outcome(
        float(len(seen)),
        tuple(shares.tolist()),
        tuple(felt.slowdown),
        float(seen.fct_s.mean()),
        felt.mean_slowdown,
        felt.p99_slowdown,
    )


def sample_of(seen: FlowResults, thresholds: Thresholds) -> tuple[FlowSummary, ...]:
    """The last finished short flows, as reports hold them."""
    rows = np.flatnonzero(seen.size_bytes < thresholds.bytes[-1])[-PAPER_FLOWS:]
    return tuple(
        FlowSummary(
            f"10.0.0.{1 + int(seen.host[row]) % 250}",
            f"10.0.0.{1 + int(seen.destination[row]) % 250}",
            32_768 + int(seen.flow[row]) * 7919 % 28_232,  # as a kernel draws ephemeral ports: of no meaning
            5001,
            6,
            int(seen.size_bytes[row]),
            round(float(seen.fct_s[row]) * 1e6),
            0,
        )
        for row in rows
    )


def objective_of(seen: FlowResults, objective: str) -> float:
    """What is to be small: mean completion time in seconds, or mean slowdown."""
    return float(seen.fct_s.mean() if objective == "fct" else seen.slowdown.mean())


class ThresholdTrials(gym.Env[Singles, Singles]):
    """Try thresholds on random traffic.

    ## Description
    A group of hosts meets a situation: flow sizes, load, link rate, K. Each step sets thresholds, lets fresh flows
    pass one link under them, and tells what they experienced.

    ## Action Space
    `Box(-1, 1, (7,), float32)`: shifts of the thresholds around the encoding's base on a log scale
    (`central.srla.encoding`); elements beyond K-1 are ignored.

    ## Observation Space
    `Box(0, 1, (encoding.features,), float32)`: the compact summary and the base, or AuTO's 700 features.

    ## Rewards
    `relative`: 100 times the log of the objective under the base over that under the action, on the same flows, cut.
    `ratio`: the last step's mean FCT over this one's, at most 3, less 1.

    ## Starting State
    A situation whose hosts have used the base or, as often, thresholds somewhere around it.

    ## Episode End
    Truncated after `steps` steps; it never terminates.

    ## Arguments
    - `settings`, `encoding`. - `seed`: of everything, until `reset` is given another.

    ## Version History
    - v0: first version.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, settings: Settings, encoding: Encoding, seed: int = 0) -> None:
        self.settings, self.encoding = settings, encoding
        self.observation_space = gym.spaces.Box(0.0, 1.0, (encoding.features,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)
        self.render_mode = None
        self._known: list[Met] = []
        self._random = np.random.default_rng(seed)

    @property
    def mask(self) -> Singles:
        """Which elements of an action count in this situation."""
        return mask_of(self._met.situation.levels)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Singles, dict[str, Any]]:
        """Another situation, or one met before."""
        super().reset(seed=seed)
        if seed is not None:
            self._random = np.random.default_rng(seed)
            self._known = []
        s, random = self.settings, self._random
        # Situations come one by one, each third reset, so that learning starts before all have been found.
        if not self._known or (len(self._known) < s.situations and random.random() < 1 / 3):
            reported = round(float(np.exp(random.uniform(*np.log(s.reported)))))
            self._known.append(meet(draw(s.range, random), reported, self.encoding, random))
            self._met = self._known[-1]
        else:
            self._met = self._known[int(random.integers(len(self._known)))]
        self._done = 0
        spread = 0.0 if random.random() < 0.5 else 0.5
        self._seen = self._pass(self._at(random.normal(0, spread, ACTIONS)))[0]
        return self._observe(), {}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Singles, float, bool, bool, dict[str, Any]]:
        """Set thresholds and let flows pass."""
        before = self._seen
        self._seen, beside = self._pass(self._at(action), beside=self.settings.reward == "relative")
        if beside is None:
            reward = rewards.ratio(float(before.fct_s.mean()), float(self._seen.fct_s.mean()), REWARD_CAP) - 1
        else:
            objective = self.settings.objective
            gain = 100 * float(np.log(objective_of(beside, objective) / objective_of(self._seen, objective)))
            reward = min(max(gain, -self.settings.cap), self.settings.cap)
        self._done += 1
        return self._observe(), reward, False, self._done >= self.settings.steps, {}

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on exactly."""
        return {
            "known": [_kept(met) for met in self._known],
            "met": self._known.index(self._met),
            "done": self._done,
            "thresholds": list(self._thresholds.bytes),
            "seen": [getattr(self._seen, name) for name in FlowResults.__dataclass_fields__],
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._known = [_again(kept) for kept in state["known"]]
        self._met = self._known[state["met"]]
        self._done = state["done"]
        self._thresholds = Thresholds.of(state["thresholds"])
        self._seen = FlowResults(*state["seen"])
        self._random.bit_generator.state = state["random"]

    def _at(self, action: npt.ArrayLike) -> Thresholds:
        return self.encoding.thresholds_at(self._met.base, action)

    def _pass(self, thresholds: Thresholds, beside: bool = False) -> tuple[FlowResults, FlowResults | None]:
        """Fresh flows under `thresholds`; `beside`: the same ones also under the base."""
        met = self._met
        self._thresholds = thresholds
        trace = met.situation.trace(self.settings.flows, self._random)
        seen = met.under(thresholds, trace)
        return seen, met.under(self._at(np.zeros(ACTIONS)), trace) if beside else None

    def _observe(self) -> Singles:
        return self.encoding.state_of(self._met.summary(self._thresholds, self._seen), self._met.base)


def _kept(met: Met) -> dict[str, Any]:
    there = met.situation
    return {
        "points": [there.sizes.name, there.sizes.sizes_bytes, there.sizes.cdf],
        "values": [there.load, there.rate_bps, there.levels, there.sigma, there.visible_bytes],
        "sizes": met.sizes.counts,
        "base": met.base,
    }


def _again(kept: dict[str, Any]) -> Met:
    situation = Situation(SizeDistribution(*kept["points"]), *kept["values"])
    return Met(situation, LogHistogram(kept["sizes"]), kept["base"])
