"""Outcomes from samples of finished flows: right where hosts are honest, and hardly moved where some are not."""

import numpy as np
import pytest

from central.outcomes import MAX_SLOWDOWN, Experience, even_weights, experienced, middle_mean, outcome_of
from central.policy.base import SAMPLE_FLOWS
from central.registry import Registry
from fabricpilot.wire import FlowSummary
from simulator.physics import Physics, ideal_s

RATE_BPS = 10**9


def flow(size_bytes, duration_us):
    return FlowSummary("10.0.0.1", "10.0.0.2", 1, 2, 6, size_bytes, duration_us, 0)


def slowed(size_bytes, slowdown):
    """A flow that took `slowdown` times what it takes alone, as its sender sees it."""
    alone_s = float(ideal_s(Physics(), np.array([size_bytes], float), Physics().goodput(RATE_BPS))[0])
    return flow(size_bytes, round((slowdown * alone_s - Physics().base_latency_s) * 1e6))


def host(*flows, window_s=60.0, now_s=0.0):
    made = Experience(window_s)
    made.add(experienced(flows, RATE_BPS), now_s)
    return made


def honest(rng, slowdown=3.0, n=100):
    sizes = np.exp(rng.uniform(np.log(2e3), np.log(5e7), n)).astype(int)
    return host(*(slowed(int(size), slowdown * np.exp(rng.normal(0, 0.2))) for size in sizes))


def test_slowdown_and_bucket_of_single_flows():
    told = experienced([slowed(10_000, 2.0), slowed(10_001, 3.0), slowed(50_000_000, 1.5)], RATE_BPS)
    assert told.bucket.tolist() == [0, 1, 4]
    assert told.slowdown == pytest.approx([2.0, 3.0, 1.5], rel=1e-3)


def test_nothing_a_flow_says_is_out_of_bounds():
    told = experienced([flow(0, 0), flow(2**63 - 1, 2**63 - 1), flow(1, 2**63 - 1), flow(2**63 - 1, 0)], 0)
    assert np.isfinite(told.slowdown).all()
    assert np.isfinite(told.fct_s).all()
    assert told.slowdown.max() <= MAX_SLOWDOWN


def test_an_outcome_by_hand():
    outcome = outcome_of([host(slowed(5_000, 2.0), slowed(5_000, 4.0), slowed(500_000, 6.0))], 0.0)
    assert outcome.flows == pytest.approx(3)
    assert outcome.shares == pytest.approx((2 / 3, 0, 1 / 3, 0, 0))
    assert outcome.slowdown == pytest.approx((3.0, 0, 6.0, 0, 0), rel=1e-2)
    assert outcome.mean_slowdown == pytest.approx(4.0, rel=1e-2)
    assert outcome.p99_slowdown == pytest.approx(6.0, rel=0.1)


def test_no_flows_no_outcome():
    assert outcome_of([], 0.0) is None
    assert outcome_of([Experience(60.0)], 0.0) is None


def test_what_is_old_fades():
    told = host(slowed(5_000, 100.0), window_s=10.0)
    told.add(experienced([slowed(5_000, 2.0)], RATE_BPS), 100.0)
    assert outcome_of([told], 100.0).mean_slowdown == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("lie", [1 / 16, 4000.0])
def test_lying_hosts_hardly_move_it(lie):
    rng = np.random.default_rng(3)
    hosts = [honest(rng) for _ in range(8)]
    before = outcome_of(hosts, 0.0)
    liars = [host(*[slowed(5_000, lie)] * 50, *[slowed(20_000_000, lie)] * 50) for _ in range(2)]
    after = outcome_of([*hosts, *liars], 0.0)
    for name in ("mean_slowdown", "p99_slowdown", "mean_fct_s"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=0.25), name


def test_a_host_with_many_flows_weighs_as_the_median_host():
    assert even_weights(np.array([0.0, 10.0, 20.0, 1e9])).tolist() == [0.0, 10.0, 20.0, 20.0]
    assert even_weights(np.zeros(3)).tolist() == [0.0] * 3


def test_the_middle_half():
    assert middle_mean(np.array([5.0]), np.array([2.0])) == 5.0
    assert middle_mean(np.array([4.0, 1.0, 2.0, 1e9]), np.ones(4)) == 3.0
    assert middle_mean(np.array([0.0, 8.0]), np.array([1.0, 3.0])) == 8.0
    assert middle_mean(np.array([1.0]), np.array([0.0])) == 0.0


def test_a_summary_has_rate_outcome_and_sample(hello, report):
    registry = Registry(60.0, 5.0, "1Gbit")
    for name in ("a", "b"):
        registry.hello(name, b"p", hello(name, link_rate_bps=10**10), 0.0)
    list(registry.summaries(0.0))  # from here on each host has its part of the sample
    for name, size in (("a", 1000), ("b", 2000)):
        flows = [flow(size, 100)] * 100
        registry.report(name, b"p", report(name, finished_sample=flows), 0.0)
    (summary,) = registry.summaries(0.0)
    assert summary.link_rate_bps == 10**9
    assert summary.outcome.shares[0] == 1.0
    assert len(summary.sample) == SAMPLE_FLOWS
    assert sum(f.size_bytes == 1000 for f in summary.sample) == SAMPLE_FLOWS // 2


def test_a_host_that_reports_a_thousand_times_has_no_more_of_the_sample(hello, report):
    registry = Registry(60.0, 5.0, "1Gbit")
    for name in ("a", "b", "c", "liar"):
        registry.hello(name, b"p", hello(name, link_rate_bps=10**10), 0.0)
    list(registry.summaries(0.0))
    for name, size, times in (("a", 1000, 1), ("b", 1000, 1), ("c", 1000, 1), ("liar", 7, 1000)):
        for sequence in range(times):
            flows = [flow(size, 100)] * 100
            registry.report(name, b"p", report(name, sequence=sequence + 1, finished_sample=flows), 0.0)
    (summary,) = registry.summaries(0.0)
    assert sum(f.size_bytes == 7 for f in summary.sample) == SAMPLE_FLOWS // 4
    registry.report("liar", b"p", report("liar", sequence=2000, finished_sample=[flow(7, 100)] * 100), 1.0)
    (summary,) = registry.summaries(1.0)
    assert sum(f.size_bytes == 7 for f in summary.sample) == SAMPLE_FLOWS // 4 + SAMPLE_FLOWS // 4
