"""The whole loop in simulation: hosts with links of their own, reports, guard, policies; good, bad and lying parts."""

import math

import msgspec
import numpy as np
import pytest
from guard_kit import Loop, SimulatedHost

from central.guard.memory import GuardMemory
from fabricpilot.levels import Thresholds

WEB_SEARCH = "websearch_dctcp_bytes_trafficgenerator"
GOOD = Thresholds((135_134, 2_000_000, 10_000_000))
BAD = Thresholds((1_000, 2_000, 3_000))
ANY_STEP = 1e6
BOUND_S = 12 * 2 + 20 * 2 * 8 + 30  # phases of a trial in seconds: a round takes one report, a change one more


def fleet(count, seconds=400, load=0.7, liars=0, lie=None):
    return [SimulatedHost(f"h{n}", n, WEB_SEARCH, load, seconds, lie=lie if n < liars else None) for n in range(count)]


def verdicts(loop):
    guard = loop.steering.guards.get(("web", 4))
    return guard.tally.promoted + guard.tally.rolled_back if guard else 0


def run_one_trial(loop):
    assert loop.until(lambda: verdicts(loop) == 1, BOUND_S), "the trial never ended"
    loop.second()  # for what the verdict sends
    for host in loop.hosts.values():
        assert host.thresholds == loop.guard.incumbent
        assert [policy.epoch for policy in host.received] == sorted(policy.epoch for policy in host.received)


@pytest.mark.parametrize(("hosts", "exposed"), [(6, 6), (1, 12)])
def test_a_bad_actor_is_rolled_back_within_a_few_reports(hosts, exposed):
    loop = Loop(fleet(hosts), GOOD, lambda _summary: BAD.bytes, max_step=ANY_STEP)
    run_one_trial(loop)
    assert loop.guard.tally.rolled_back == 1
    assert loop.guard.incumbent == GOOD
    assert sum(loop.exposed) <= exposed  # host-seconds under it
    assert max(loop.exposed) == 1  # the canary host, or the only one


@pytest.mark.parametrize("hosts", [4, 1])
def test_what_is_better_is_promoted(hosts):
    loop = Loop(fleet(hosts), BAD, lambda _summary: GOOD.bytes, max_step=ANY_STEP)
    run_one_trial(loop)
    assert loop.guard.tally.promoted == 1
    assert loop.guard.incumbent == GOOD
    assert loop.guard.effect[0] < math.log(0.8)


@pytest.mark.slow
def test_the_shipped_learner_replaces_poor_thresholds():
    from central.srla.online import OnlineSrla
    from fabricpilot.config import PolicySection

    learner = OnlineSrla(PolicySection(objective="slowdown"))

    def propose(summary):
        return getattr(learner.propose(summary).thresholds, "bytes", None)

    loop = Loop(fleet(4, load=0.8), Thresholds((20_000, 60_000, 200_000)), propose)
    assert loop.until(lambda: loop.steering.guards and loop.guard.tally.promoted >= 1, 390)
    assert loop.guard.effect[0] < math.log(0.9)


@pytest.mark.parametrize(
    "proposal",
    [(9_000, 5_000, 1_000), (math.nan,) * 3, (1.0, math.inf, math.inf), (5, 6), ()],
    ids=["reversed", "nan", "infinite", "wrong K", "empty"],
)
def test_what_is_no_vector_reaches_no_host(proposal):
    loop = Loop(fleet(2, seconds=60), GOOD, lambda _summary: proposal, rest_s=0)
    for _ in range(40):
        loop.second()
    assert loop.guard.tally.refused >= 3
    assert loop.guard.tally.trials == 0
    assert {tuple(p.thresholds) for host in loop.hosts.values() for p in host.received} == {GOOD.bytes}


def test_wild_vectors_are_bounded_before_any_host_sees_them():
    rng = np.random.default_rng(4)
    loop = Loop(fleet(3, seconds=200), GOOD, lambda _summary: tuple(np.sort(np.exp(rng.uniform(-3, 40, 3)))), rest_s=0)
    for _ in range(200):
        loop.second()
    sent = {tuple(p.thresholds) for host in loop.hosts.values() for p in host.received}
    assert loop.guard.tally.trials >= 2
    for vector in sent:
        assert list(vector) == sorted(set(vector))
        assert all(1_000 <= value <= 10**9 for value in vector)
        assert all(now / 16 - 1 <= value <= now * 16 + 1 for value, now in zip(vector, GOOD.bytes, strict=True))


def slower(factor):
    def change(flow):
        return msgspec.structs.replace(flow, duration_us=int(flow.duration_us * factor) + 1)

    return change


def praise_the_challenger(host, report):
    """A host that has an interest in the bad thresholds: with them all is fast, with others all is slow."""
    tell = slower(0.01 if host.thresholds == BAD else 100.0)
    return msgspec.structs.replace(report, finished_sample=[tell(flow) for flow in report.finished_sample])


def condemn_the_challenger(host, report):
    tell = slower(100.0 if host.thresholds == GOOD else 0.01)
    return msgspec.structs.replace(report, finished_sample=[tell(flow) for flow in report.finished_sample])


def random_numbers(host, report):
    flows = [
        msgspec.structs.replace(
            flow, size_bytes=int(host.rng.integers(0, 2**63 - 1)), duration_us=int(host.rng.integers(0, 2**63 - 1))
        )
        for flow in report.finished_sample
    ]
    return msgspec.structs.replace(report, finished_sample=flows, sent_bytes=2**62, interval_ns=1, long=2**60)


def random_epochs(host, report):
    return msgspec.structs.replace(report, epoch=report.epoch + int(host.rng.integers(0, 10**6)))


@pytest.mark.parametrize(
    ("lie", "liars", "hosts"),
    [(praise_the_challenger, 2, 8), (random_numbers, 1, 4), (random_epochs, 1, 4)],
    ids=["praise", "random numbers", "random epochs"],
)
def test_poisoned_reports_do_not_get_bad_thresholds_promoted(lie, liars, hosts):
    loop = Loop(fleet(hosts, 250, liars=liars, lie=lie), GOOD, lambda _summary: BAD.bytes, max_step=ANY_STEP)
    for _ in range(3):  # whoever is drawn as canary host, one of the liars too
        done = verdicts(loop)
        loop.until(lambda done=done: verdicts(loop) > done, BOUND_S)
        loop.guard._rest_until_s = 0.0
    assert loop.guard.tally.trials >= 3
    assert loop.guard.tally.promoted == 0
    assert loop.guard.incumbent == GOOD


def test_liars_do_not_keep_better_thresholds_out():
    loop = Loop(fleet(8, liars=2, lie=condemn_the_challenger), BAD, lambda _s: GOOD.bytes, max_step=ANY_STEP, rest_s=0)
    assert loop.until(lambda: loop.guard.promoted is not None if loop.steering.guards else False, 390)
    assert loop.guard.incumbent == GOOD


def test_a_learner_that_is_always_wrong_costs_less_and_less():
    loop = Loop(fleet(2, seconds=600), GOOD, lambda _summary: BAD.bytes, max_step=ANY_STEP)
    for _ in range(600):
        loop.second()
    assert 3 <= loop.guard.tally.rolled_back <= 5
    early, late = sum(loop.exposed[:300]), sum(loop.exposed[300:])
    assert late < early


def test_a_new_decision_of_the_scheme_ends_trial_and_promotion():
    loop = Loop(fleet(4), BAD, lambda _summary: GOOD.bytes, max_step=ANY_STEP)
    run_one_trial(loop)
    loop.baseline = Thresholds((50_000, 500_000, 5_000_000))
    assert loop.until(lambda: loop.guard.incumbent == loop.baseline, 6)
    loop.propose = lambda _summary: BAD.bytes
    assert loop.until(lambda: loop.guard.phase == "canary", 60)
    loop.baseline, loop.propose = GOOD, lambda _summary: None
    assert loop.until(lambda: loop.guard.trial is None, 6)
    loop.second()
    assert {host.thresholds for host in loop.hosts.values()} == {GOOD}


def test_what_was_promoted_is_tried_again_and_withdrawn_if_traffic_has_changed():
    loop = Loop(fleet(4, seconds=500), BAD, lambda _summary: GOOD.bytes, max_step=ANY_STEP, recheck_s=20)
    run_one_trial(loop)
    assert loop.until(lambda: loop.guard.trial is not None, 60)
    assert loop.guard.trial.challenger == BAD
    assert loop.until(lambda: loop.guard.trial is None, BOUND_S)
    assert loop.guard.last.startswith("kept")
    loop.guard.baseline, loop.guard.promoted = GOOD, BAD  # as if the worse ones had been promoted then
    loop.propose, loop.baseline = lambda _summary: None, GOOD
    assert loop.until(lambda: loop.guard.last.startswith("withdrawn"), BOUND_S)
    loop.second()
    assert {host.thresholds for host in loop.hosts.values()} == {GOOD}
    assert loop.guard.resting_s(float(loop.now_s)) == 0.0


def test_in_shadow_mode_nothing_is_tried():
    loop = Loop(fleet(2, seconds=60), BAD, lambda _summary: GOOD.bytes, max_step=ANY_STEP, learn="shadow")
    for _ in range(40):
        loop.second()
    assert loop.steering.proposals["web", 4].thresholds == GOOD.bytes
    assert loop.guard.tally.trials == 0
    assert {host.thresholds for host in loop.hosts.values()} == {BAD}


@pytest.mark.parametrize("mode", ["optimiser", "frozen"])
def test_the_kill_switch(mode):
    loop = Loop(fleet(4), BAD, lambda _summary: GOOD.bytes, max_step=ANY_STEP)
    run_one_trial(loop)
    loop.steering.switch(mode, float(loop.now_s))
    assert {host.thresholds for host in loop.hosts.values()} == {BAD}  # at once
    loop.baseline = Thresholds((50_000, 500_000, 5_000_000))
    for _ in range(20):
        loop.second()
    assert loop.guard.tally.trials == 1
    follows = mode == "optimiser"
    assert {host.thresholds for host in loop.hosts.values()} == {loop.baseline if follows else BAD}
    loop.steering.switch("learning", float(loop.now_s))
    assert loop.until(lambda: loop.guard.trial is not None, 60)


def test_it_is_switched_off_in_mid_trial():
    loop = Loop(fleet(4), BAD, lambda _summary: GOOD.bytes, max_step=ANY_STEP)
    assert loop.until(lambda: loop.steering.guards and loop.guard.phase == "canary" and loop.exposed[-1] == 1, 60)
    loop.steering.switch("optimiser", float(loop.now_s))
    assert {host.thresholds for host in loop.hosts.values()} == {BAD}


def test_what_was_promoted_survives_a_restart(tmp_path):
    loop = Loop(fleet(4, seconds=500), BAD, lambda _summary: GOOD.bytes, folder=tmp_path, max_step=ANY_STEP)
    run_one_trial(loop)
    loop.steering.switch("frozen", float(loop.now_s))
    loop.steering.switch("learning", float(loop.now_s))
    assert loop.until(lambda: verdicts(loop) == 2, BOUND_S)
    hosts = list(loop.hosts.values())
    before = max(host.epoch for host in hosts)
    again = Loop(hosts, BAD, lambda _summary: None, folder=tmp_path)
    assert again.guard.promoted == loop.guard.promoted
    assert again.guard.incumbent == loop.guard.incumbent
    for host in hosts:
        assert host.epoch > before
        assert host.thresholds == loop.guard.incumbent


def test_a_restart_in_mid_trial_returns_to_the_incumbent(tmp_path):
    loop = Loop(fleet(4), GOOD, lambda _summary: (50_000, 500_000, 5_000_000), folder=tmp_path)
    assert loop.until(lambda: loop.steering.guards and loop.exposed and loop.exposed[-1] == 1, 60)
    hosts = list(loop.hosts.values())
    Loop(hosts, GOOD, lambda _summary: None, folder=tmp_path)
    assert {host.thresholds for host in hosts} == {GOOD}


def test_with_learning_off_a_restart_drops_what_was_promoted(tmp_path):
    loop = Loop(fleet(2), BAD, lambda _summary: GOOD.bytes, folder=tmp_path, max_step=ANY_STEP)
    run_one_trial(loop)
    assert loop.guard.promoted == GOOD
    hosts = list(loop.hosts.values())
    Loop(hosts, BAD, lambda _summary: None, folder=tmp_path, learn="off")
    assert {host.thresholds for host in hosts} == {BAD}


def test_groups_that_are_away_are_not_forgotten(tmp_path):
    here, there = fleet(1), [SimulatedHost("other", 9, WEB_SEARCH, 0.7, 100, group="other")]
    loop = Loop(here + there, GOOD, lambda _summary: None, folder=tmp_path)
    for _ in range(10):
        loop.second()
    again = Loop(here, BAD, lambda _summary: None, folder=tmp_path)  # the other host is not back yet
    for _ in range(10):
        again.second()
    kept = {group.group: group.baseline for group in GuardMemory(tmp_path).read().groups}
    assert kept == {"web": list(BAD.bytes), "other": list(GOOD.bytes)}


def test_many_groups_are_written_down_at_once(tmp_path, monkeypatch):
    written = []
    write = GuardMemory.write
    monkeypatch.setattr(GuardMemory, "write", lambda self, memory: (written.append(memory), write(self, memory)))
    others = [SimulatedHost(f"o{n}", n, WEB_SEARCH, 0.5, 20, group=f"g{n}") for n in range(20)]
    hosts = fleet(1, seconds=20) + others
    loop = Loop(hosts, GOOD, lambda _summary: None, folder=tmp_path)
    for _ in range(5):  # the scheme decides at the fifth
        loop.second()
    assert written == []
    loop.steering.advance(5.2)
    assert len(written) == 1
    assert {kept.group for kept in GuardMemory(tmp_path).read().groups} == {"web", *(f"g{n}" for n in range(20))}
    loop.steering.switch("frozen", 5.3)
    assert GuardMemory(tmp_path).read().mode == "frozen"  # the kill switch does not wait


def test_a_group_that_comes_back_gets_what_it_had():
    loop = Loop(fleet(2, seconds=100), GOOD, lambda _summary: None)
    for _ in range(10):
        loop.second()
    loop.registry.hosts.clear()
    loop.registry.sweep(10.0)
    loop.steering.advance(10.0)
    assert loop.registry.groups == {}
    assert loop.steering.guards == {}
    (host, _) = loop.hosts.values()
    host.epoch, host.thresholds = 0, BAD
    loop.steering.joined(loop.registry.hello(host.name, host.name.encode(), host.hello(), 11.0), 11.0)
    assert host.thresholds == GOOD


@pytest.mark.parametrize("content", [b"", b"{", b'{"groups":[{"group":"web","levels":4,"baseline":[3,2,1]}]}'])
def test_a_memory_that_is_broken_is_set_aside(tmp_path, content):
    (tmp_path / "guard.json").write_bytes(content)
    loop = Loop(fleet(1, seconds=20), GOOD, lambda _summary: None, folder=tmp_path)
    assert loop.steering.mode == "learning"
    assert (tmp_path / "guard.unreadable").read_bytes() == content
    for _ in range(10):
        loop.second()
    assert (tmp_path / "guard.json").exists()


def test_a_host_that_joins_in_mid_trial_gets_the_incumbent():
    loop = Loop(fleet(4), GOOD, lambda _summary: (50_000, 500_000, 5_000_000))
    assert loop.until(lambda: loop.exposed and loop.exposed[-1] >= 1, 60)
    late = SimulatedHost("late", 99, WEB_SEARCH, 0.7, 400)
    loop.hosts["late"] = late
    loop.steering.joined(loop.registry.hello("late", b"late", late.hello(), float(loop.now_s)), float(loop.now_s))
    assert late.thresholds == GOOD
