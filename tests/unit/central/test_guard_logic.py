"""The guard's parts: bounds, evidence, the choice of canaries, contrasts, and one trial from report to verdict."""

import math

import numpy as np
import pytest

from central.guard.bounds import Bounds, InadmissibleError, admissible
from central.guard.canaries import canaries
from central.guard.contrast import bucket_weights, cell, contrast
from central.guard.evidence import Evidence
from central.guard.trial import MAX_BLIND, Rules, Trial
from central.outcomes import Experienced
from central.policy.base import Outcome
from fabricpilot.levels import Thresholds

INCUMBENT = Thresholds((10_000, 100_000, 1_000_000))
BOUNDS = Bounds(1_000, 10**9, 16.0)
WEIGHTS = np.array([0.5, 0.5, 0.0, 0.0, 0.0])


def flows(slowdown, n=20, bucket=0):
    """Flows of one size bucket with this mean log-slowdown."""
    return Experienced(np.full(n, bucket), np.full(n, math.exp(slowdown)), np.full(n, 1e-3))


class TestBounds:
    def test_what_is_valid_passes(self):
        assert admissible((20_000, 90_000, 2_000_000), 4, INCUMBENT, BOUNDS).bytes == (20_000, 90_000, 2_000_000)

    @pytest.mark.parametrize(
        ("proposed", "moved"),
        [
            ((1, 2, 3), (1_000, 6_250, 62_500)),
            ((1e12, 2e12, 3e12), (160_000, 1_600_000, 16_000_000)),
            ((159_999, 160_000, 160_001), (159_999, 160_000, 160_001)),
            ((200_000, 300_000, 300_001), (160_000, 300_000, 300_001)),
            ((5_000.4, 5_000.45, 62_500), (5_000, 6_250, 62_500)),
        ],
    )
    def test_what_is_out_of_bounds_is_moved(self, proposed, moved):
        assert admissible(proposed, 4, INCUMBENT, BOUNDS).bytes == moved

    def test_values_that_meet_are_kept_apart(self):
        near = Thresholds((1_000, 1_001, 1_002))
        assert admissible((1.0, 2.0, 3.0), 4, near, Bounds(1_000, 10**9, 1.1)).bytes == (1_000, 1_001, 1_002)

    @pytest.mark.parametrize(
        "proposed",
        [
            (math.nan, math.nan, math.nan),
            (1_000, math.inf, math.inf),
            (3, 2, 1),
            (5, 5, 5),
            (1, 2),
            (1, 2, 3, 4),
            "abc",
            7,
            None,
            (1, None, 3),
            (1, "x", 3),
            (10**400, 2, 3),
        ],
    )
    def test_what_is_no_vector_is_refused(self, proposed):
        with pytest.raises(InadmissibleError):
            admissible(proposed, 4, INCUMBENT, BOUNDS)

    def test_nothing_but_bounded_ascending_vectors_comes_out(self):
        rng = np.random.default_rng(5)
        for _ in range(2_000):
            levels = int(rng.integers(2, 9))
            incumbent = Thresholds.of(sorted(rng.choice(10**9, levels - 1, replace=False).tolist()))
            proposed = np.sort(np.exp(rng.uniform(-5, 50, levels - 1))).tolist()
            moved = admissible(proposed, levels, incumbent, BOUNDS)
            for value, now in zip(moved.bytes, incumbent.bytes, strict=True):
                assert value >= min(BOUNDS.lowest_bytes, now)
                assert value <= max(BOUNDS.highest_bytes, now) + levels
                assert now / 16 - levels <= max(value, BOUNDS.lowest_bytes)
                assert value <= max(BOUNDS.lowest_bytes, now * 16) + levels


class TestEvidence:
    def test_mean_and_error_by_hand(self):
        evidence = Evidence()
        for value in (1.0, 2.0, 6.0):
            evidence.add(value)
        assert evidence.mean == pytest.approx(3.0)
        assert evidence.error == pytest.approx(math.sqrt(7.0 / 3))

    def test_radius_is_where_the_bayes_factor_reaches_its_bound(self):
        evidence = Evidence()
        values = np.random.default_rng(1).normal(0, 1, 12)
        for value in values:
            evidence.add(value)
        m = evidence.mean + evidence.radius(0.05)
        n, g = 12, 1.0
        u = n * (evidence.mean - m) ** 2 / ((values - values.mean()) ** 2).sum()
        factor = math.sqrt(g / (g + n)) * ((1 + u) / (1 + u * g / (g + n))) ** (n / 2)
        assert factor == pytest.approx(1 / 0.05)

    def test_too_few_say_nothing(self):
        evidence = Evidence()
        for value in (5.0, 5.1, 5.2):
            assert evidence.interval(0.05) == (-math.inf, math.inf)
            evidence.add(value)

    @pytest.mark.parametrize("tails", ["normal", "t5"])
    def test_looking_after_every_observation_is_wrong_as_seldom_as_alpha_says(self, tails):
        rng = np.random.default_rng(7)
        wrong = 0
        for _ in range(600):
            evidence = Evidence()
            for value in rng.normal(size=60) if tails == "normal" else rng.standard_t(5, 60):
                evidence.add(value)
                low, high = evidence.interval(0.05)
                if low > 0 or high < 0:
                    wrong += 1
                    break
        assert wrong / 600 < 0.05

    def test_it_finds_what_is_there(self):
        rng = np.random.default_rng(8)
        found = []
        for _ in range(100):
            evidence = Evidence()
            while evidence.interval(0.05)[1] > 0 and evidence.n < 60:
                evidence.add(rng.normal(-1.0, 1.0))
            found.append(evidence.n)
        assert max(found) < 60
        assert np.median(found) < 20


class TestCanaries:
    HOSTS = tuple(f"host-{n}" for n in range(50))

    def test_share_and_bounds(self):
        assert len(canaries(self.HOSTS, 0.1, 1)) == 5
        assert len(canaries(self.HOSTS, 0.0, 1)) == 1
        assert len(canaries(self.HOSTS[:2], 0.5, 1)) == 1
        assert canaries(self.HOSTS[:1], 0.5, 1) == frozenset()
        assert canaries([], 0.5, 1) == frozenset()

    def test_the_same_for_a_trial_and_others_for_the_next(self):
        assert canaries(self.HOSTS, 0.1, 1) == canaries(reversed(self.HOSTS), 0.1, 1)
        drawn = frozenset().union(*(canaries(self.HOSTS, 0.1, trial) for trial in range(100)))
        assert drawn == set(self.HOSTS)


class TestContrast:
    def test_another_mix_of_sizes_is_no_difference(self):
        fast, slow = flows(0.5, n=90, bucket=0), flows(2.0, n=10, bucket=1)
        these = cell(fast) + cell(slow)
        others = cell(flows(0.5, n=10, bucket=0)) + cell(flows(2.0, n=90, bucket=1))
        assert contrast([these], [others], WEIGHTS) == pytest.approx(0.0)

    def test_a_difference_counts_as_much_as_its_bucket(self):
        these = cell(flows(0.7, bucket=0)) + cell(flows(2.0, bucket=1))
        others = cell(flows(0.5, bucket=0)) + cell(flows(2.0, bucket=1))
        assert contrast([these], [others], WEIGHTS) == pytest.approx(0.1)

    def test_nothing_in_common(self):
        assert contrast([cell(flows(1.0, bucket=0))], [cell(flows(1.0, bucket=1))], WEIGHTS) is None
        assert contrast([], [cell(flows(1.0))], WEIGHTS) is None

    @pytest.mark.parametrize("lie", [-2.7, 8.3])
    def test_one_host_in_five_that_lies(self, lie):
        honest = [cell(flows(1.0 + 0.02 * n)) for n in range(4)]
        liar = cell(flows(lie, n=100))
        true = contrast(honest, honest, WEIGHTS)
        assert contrast([*honest, liar], honest, WEIGHTS) == pytest.approx(true, abs=0.03)

    @pytest.mark.parametrize("objective", ["slowdown", "fct", "tail"])
    def test_weights_are_the_objectives_derivative(self, objective):
        outcome = Outcome(100, (0.4, 0.3, 0.2, 0.1, 0.0), (1.5, 2.0, 4.0, 9.0, 0.0), 1.0, 1.0, 1.0)
        sizes = np.array([10 ** (3.5 + b) for b in range(5)])

        def value(slowdown):
            y = {"slowdown": slowdown, "tail": slowdown**2, "fct": slowdown * sizes}[objective]
            return math.log(np.array(outcome.shares) @ y)

        slowdown, power = np.array(outcome.slowdown), 2 if objective == "tail" else 1
        for bucket, weight in enumerate(bucket_weights(outcome, objective)):
            more = slowdown.copy()
            more[bucket] *= 1 + 1e-6
            assert power * weight == pytest.approx((value(more) - value(slowdown)) / 1e-6, abs=1e-4)


class TestTrial:
    RULES = Rules(canary_rounds=4, slice_rounds=2, max_pairs=8)

    def run(self, hosts, canary_hosts, effect, noise=0.02, rounds=200, seed=1):
        """Rounds until the verdict; hosts on the challenger take exp(effect) times as long."""
        rng = np.random.default_rng(seed)
        own = {host: rng.normal(0, 0.3) for host in hosts}  # hosts differ
        trial = Trial(Thresholds((1, 2, 3)), hosts, frozenset(canary_hosts), WEIGHTS, self.RULES, seed)
        for done in range(1, rounds + 1):
            on = trial.on_challenger
            for host in hosts:
                trial.observe(host, flows(1 + own[host] + effect * (host in on) + rng.normal(0, noise)))
            verdict = trial.close_round()
            if verdict is not None:
                return verdict, done, trial
        raise AssertionError("it never ended")

    def test_better_is_promoted(self):
        verdict, _, trial = self.run("abcd", "a", -0.2)
        assert verdict.promoted
        assert "better beyond chance" in verdict.reason
        assert trial.effect()[0] == pytest.approx(-0.2, abs=0.05)

    def test_much_worse_ends_after_two_rounds_on_the_canary_host(self):
        verdict, done, trial = self.run("abcd", "a", 1.0)
        assert not verdict.promoted
        assert (done, trial.phase) == (4 + 2, "canary")

    def test_somewhat_worse_ends_before_others_get_it(self):
        verdict, _, trial = self.run("abcd", "a", 0.25)
        assert not verdict.promoted
        assert trial.phase == "canary"

    @pytest.mark.parametrize("seed", range(5))
    def test_no_better_is_rolled_back_in_a_bounded_time(self, seed):
        verdict, done, _ = self.run("abcd", "a", 0.0, seed=seed)
        assert not verdict.promoted
        assert done <= 4 + 4 + 8 * 2 * 2

    def test_a_host_alone_compares_with_itself(self):
        assert self.run("a", "", -0.2)[0].promoted
        verdict, done, _ = self.run("a", "", 0.6)
        assert not verdict.promoted
        assert done == 4  # one pair

    def test_what_is_good_for_canaries_at_the_cost_of_others_is_not_promoted(self):
        """Thresholds that put all on top: with them a host gains from those without; when all have them all lose."""
        trial = Trial(Thresholds((1, 2, 3)), "abcd", frozenset("a"), WEIGHTS, self.RULES, 1)
        rng = np.random.default_rng(2)
        for _ in range(200):
            on = trial.on_challenger
            for host in "abcd":
                harm = 0.3 * len(on) / 4 - (0.4 if host in on and len(on) < 4 else 0.0)
                trial.observe(host, flows(1 + harm + rng.normal(0, 0.02)))
            verdict = trial.close_round()
            if verdict is not None:
                break
        assert trial.phase == "slices"
        assert not verdict.promoted

    def test_slices_share_the_time_evenly(self):
        trial = Trial(Thresholds((1, 2, 3)), "a", frozenset(), WEIGHTS, Rules(slice_rounds=1, max_pairs=20), 3)
        order = []
        rng = np.random.default_rng(3)
        for _ in range(20):
            order.append(bool(trial.on_challenger))
            trial.observe("a", flows(1.0 + rng.normal(0, 0.01) - 0.001))
            if trial.close_round():
                break
        pairs = [order[i : i + 2] for i in range(0, len(order) - 1, 2)]
        assert all(sorted(pair) == [False, True] for pair in pairs)
        assert len({tuple(pair) for pair in pairs}) == 2  # in either order

    @pytest.mark.parametrize("canary_hosts", ["a", ""])
    def test_silence_ends_it(self, canary_hosts):
        trial = Trial(Thresholds((1, 2, 3)), "ab", frozenset(canary_hosts), WEIGHTS, self.RULES, 1)
        for _ in range(MAX_BLIND * 2 * self.RULES.slice_rounds):
            verdict = trial.close_round()
            if verdict is not None:
                break
        assert not verdict.promoted
        assert "no comparable flows" in verdict.reason

    def test_strangers_have_no_say(self):
        trial = Trial(Thresholds((1, 2, 3)), "ab", frozenset("a"), WEIGHTS, self.RULES, 1)
        trial.observe("z", flows(5.0))
        assert not trial.heard("z")
