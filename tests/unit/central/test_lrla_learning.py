"""The long-flow policy and its learning: masks, order of flows, hand-computed values, exact checkpoints, a toy task."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lrla_kit import assert_goes_on_exactly

from central.long_flows import start_scheduler
from central.lrla.flow_set import MAX_PRIORITIES, UNKNOWN_ROUTE
from central.lrla.inference import Inference
from central.lrla.laboratory import EARLY, Lab, run
from central.lrla.learned import LearnedScheme
from central.lrla.network import MASKED, PolicyNetwork, batch_of, log_probability
from central.lrla.paper import PaperNetwork, PaperSettings
from central.lrla.process import scheme_of
from central.lrla.reinforce import (
    Rollout,
    Sampler,
    Settings,
    advantages,
    gradient,
    multiplied,
    plain_costs,
    returns,
    step,
    weights_of,
)
from central.lrla.rules import RULES
from central.lrla.synthetic import random_flows
from central.lrla.training import LrlaTrainer
from central.lrla.weights import RATED, SHIPPED, Stored, stored
from central.training import checkpoint
from central.training.cli import train
from central.training.settings import as_record, read
from fabricpilot.config import LongFlowsSection
from fabricpilot.errors import UsageError

TINY = Settings(iterations=2, runs=2, traffic_s=0.3, thresholds=EARLY, short_limit=1.0)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # as in training


@pytest.fixture
def network():
    torch.manual_seed(1)
    made = PolicyNetwork()
    for head in (made.route, made.priority):
        torch.nn.init.normal_(head[-1].weight)
    return made


def some_flows(n=40, seed=2, **changed):
    return replace(random_flows(n, np.random.default_rng(seed)), **changed)


def deciding(network):
    """What a running central makes of this network."""
    values = {name: value.numpy() for name, value in network.state_dict().items()}
    return LearnedScheme(Stored(values, {"rates": network.rates}))


@pytest.mark.parametrize("rates", [(), (0.25, 0.5)])
@pytest.mark.parametrize(("n", "routes"), [(1, 1), (40, 4), (1000, 2)])
def test_what_decides_is_what_was_trained(n, routes, rates):
    torch.manual_seed(n)
    network = PolicyNetwork(rates)
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.3)
    inference = Inference({name: value.numpy() for name, value in network.state_dict().items()})
    for asked in (np.arange(n), np.arange(0, n, 3), np.arange(n)[::-1].copy()):  # kept arrays change their size
        known = random_flows(n, np.random.default_rng(len(asked)), routes=routes)
        with torch.no_grad():
            wanted = network.corrections(batch_of(known, asked))
        found = inference.corrections(known, asked)
        assert len(found) == len(wanted) == 3 if rates else 2
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-4, atol=2e-5)


def test_an_untrained_network_decides_as_the_rule():
    known, asked = some_flows(), np.arange(0, 40, 3)
    mine, rule = deciding(PolicyNetwork()).decide(known, asked), RULES["young-first"].decide(known, asked)
    assert mine.priority.tolist() == rule.priority.tolist()
    assert mine.route.tolist() == rule.route.tolist()


def test_the_order_of_flows_does_not_matter(network):
    known = some_flows()
    order = np.random.default_rng(3).permutation(len(known))
    columns = {name: value[order] for name, value in vars(known).items() if isinstance(value, np.ndarray)}
    place = np.argsort(order)
    with torch.no_grad():
        before = network(batch_of(known, np.arange(40)))
        after = network(batch_of(replace(known, **columns), place))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_it_takes_any_number_of_flows_and_routes(network):
    for n, routes in ((1, 1), (11, 2), (3000, 7)):
        known = random_flows(n, np.random.default_rng(1), routes=routes)
        route, priority = network(batch_of(known, np.arange(n)))
        assert route.shape == (n, routes)
        assert priority.shape == (n, MAX_PRIORITIES)


def test_hosts_without_routes_get_priorities(network):
    known = random_flows(5, np.random.default_rng(1), routes=1)
    known = replace(known, usable=np.zeros((5, 0), np.bool_), route=np.full(5, UNKNOWN_ROUTE))
    choice = deciding(network).decide(known, np.arange(5))
    assert choice.route.tolist() == [UNKNOWN_ROUTE] * 5
    assert choice.priority.max() < MAX_PRIORITIES


def test_what_is_masked_is_never_chosen(network):
    usable = np.tile([True, False, True, False], (40, 1))
    known = some_flows(usable=usable, priorities=np.full(40, 2), route=np.full(40, UNKNOWN_ROUTE))
    for scheme in (deciding(network), Sampler(network, torch.Generator().manual_seed(1))):
        choice = scheme.decide(known, np.arange(40))
        assert choice.priority.max() <= 1
        assert set(choice.priority[known.migration].tolist()) <= {0}
        assert set(choice.route[known.crosses].tolist()) <= {0, 2}
        assert set(choice.route[~known.crosses].tolist()) <= {UNKNOWN_ROUTE}


def test_returns_by_hand():
    # What a tick costs came before its decision: the last decision has nothing to answer for.
    assert returns(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == [-(2 + 0.5 * 4), -4.0, 0.0]


def test_advantages_are_what_the_decisions_made_of_the_same_traffic():
    costs = ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 1.0], [0.0, 1.0]])  # the second column counts twice
    rollouts = [Rollout(np.array(each), np.zeros((0, 0)), [], [], []) for each in costs]
    one, other = advantages(rollouts, 1.0, 2.0)
    # Returns (-2, 0, 0) and (-6, -2, 0): less their means (2, 1, 0) and (-2, -1, 0), deviation sqrt(10 / 6).
    scale = np.sqrt(10 / 6)
    np.testing.assert_allclose(one, [2 / scale, 1 / scale], rtol=1e-6)
    np.testing.assert_allclose(other, [-2 / scale, -1 / scale, 0], rtol=1e-6, atol=1e-9)


def test_log_probability_by_hand():
    routes, ranks = torch.tensor([[0.0, 0.0, MASKED]]), torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32)
    logs, entropy = log_probability((routes, ranks), (torch.tensor([1]), torch.tensor([0])))
    assert logs.item() == pytest.approx(np.log(0.5) + np.log(0.75), rel=1e-6)
    assert entropy.item() == pytest.approx(np.log(2) - 0.75 * np.log(0.75) - 0.25 * np.log(0.25), rel=1e-5)
    only = torch.full((1, 3), MASKED)
    alone = log_probability((only, ranks), (torch.tensor([-1]), torch.tensor([0])))[0].item()
    assert alone == pytest.approx(np.log(0.75))


def test_a_limit_weighs_more_while_it_is_broken():
    settings = Settings(short_limit=0.9, limit_rate=2.0)
    assert multiplied(1.0, 100.0, 100.0, settings) == pytest.approx(np.exp(2 * 0.1))
    assert multiplied(1.0, 80.0, 100.0, settings) == pytest.approx(np.exp(-2 * 0.1))
    assert multiplied(1.0, 1e9, 100.0, settings) == pytest.approx(np.exp(2 * 0.25))  # one run turns only so much


def test_what_flows_cost_by_themselves_can_be_divided_by():
    nothing = plain_costs(Lab(cdf="datamining_vl2_bytes_trafficgenerator", traffic_s=0.02), 1)
    assert nothing.tolist() == [0.01, 0.01]
    assert (plain_costs(Lab(traffic_s=0.5), 1) > 1).all()


@pytest.mark.parametrize("kind", [PolicyNetwork, PaperNetwork])
def test_rates_are_chosen_only_where_there_are_any(kind):
    torch.manual_seed(1)
    known, asked = some_flows(), np.arange(40)
    plain, rated = kind(), kind(rates=(0.25, 0.5))
    assert Sampler(plain, torch.Generator().manual_seed(1)).decide(known, asked).rate is None
    rate = Sampler(rated, torch.Generator().manual_seed(1)).decide(known, asked).rate
    assert set(rate.tolist()) == {0.25, 0.5, np.inf}
    assert (rate == np.inf).sum() > 20


def test_rates_reach_the_laboratory_and_no_running_central(tmp_path):
    network = PolicyNetwork((0.01,))
    torch.nn.init.constant_(network.rate[-1].bias, 0.0)
    with torch.no_grad():
        network.rate[-1].bias[0] = 10.0  # all are held to a hundredth
    lab = Lab(traffic_s=0.5, warm_up_s=0.0)
    held, plain = (run(lab, deciding(each), seed=3) for each in (network, PolicyNetwork()))
    assert held.long_fct_us > 2 * plain.long_fct_us
    settings = as_record(Settings(rates=(0.01,)))
    checkpoint.save(tmp_path / "w.npz", {"network": dict(network.state_dict()), "record": {"settings": settings}})
    section = LongFlowsSection(scheme="learned", weights=str(tmp_path / "w.npz"))
    for use in (scheme_of, start_scheduler):
        with pytest.raises(UsageError, match="no data path"):
            use(section)


def test_the_gradient_by_hand():
    known = some_flows(source_rack=np.zeros(40, np.int64), destination_rack=np.ones(40, np.int64))
    plain, batch = PolicyNetwork(), batch_of(known, np.array([5]))
    logits = plain(batch)
    log_probability(logits, (torch.tensor([2]), torch.tensor([0])))[0].sum().backward()
    chance = torch.softmax(logits[0][0], 0)
    # Logits are -weight * cost: the gradient of the log of a softmax is the chosen one less the expected one.
    expected = -(batch.costs[0, 2] - (chance * batch.costs[0]).sum())
    assert plain.load_weight.grad.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_toy_task_is_learned_in_seconds():
    """Flows of which something is known to remain are to get priority 3, the others 0: each wrong one costs 1."""
    torch.manual_seed(0)
    plain, rng, chances = PolicyNetwork(), np.random.default_rng(0), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(plain.parameters(), lr=2e-2)
    settings = Settings(horizon_s=1e-6, entropy=0.0)

    def wrong(known, priority):
        return float((priority != np.where(np.isnan(known.known_bytes), 0, 3)).sum())

    for _ in range(40):
        situations = [some_flows(12, int(rng.integers(2**31)), migration=np.zeros(12, np.bool_)) for _ in range(4)]
        rollouts = []
        for _ in range(4):
            sampler, costs = Sampler(plain, chances), [(0.0, 0.0)]
            for known in situations:
                costs.append((0.0, wrong(known, sampler.decide(known, np.arange(12)).priority)))
            senders = [known.source for known in situations]
            rollouts.append(Rollout(np.array(costs), np.zeros((0, 0)), list(range(4)), senders, sampler.decisions))
        weights = weights_of(rollouts, settings, 1e-3, 1.0)
        pairs = zip(rollouts, weights, strict=True)
        step(plain, optimiser, [gradient(plain, rollout.decisions, its, 0.0) for rollout, its in pairs], 1.0)
    fresh = some_flows(200, 99, migration=np.zeros(200, np.bool_))
    assert wrong(fresh, deciding(plain).decide(fresh, np.arange(200)).priority) < 20


def test_same_seed_same_run_and_a_checkpoint_goes_on_exactly(tmp_path):
    other, later = assert_goes_on_exactly(TINY, tmp_path)
    later.export(tmp_path / "weights.npz", {"seed": 7, "settings": as_record(TINY)})
    known, asked = some_flows(), np.arange(40)
    loaded = LearnedScheme.load(tmp_path / "weights.npz").decide(known, asked)
    assert loaded.route.tolist() == deciding(other.network).decide(known, asked).route.tolist()


def test_the_same_weights_with_two_processes():
    one, two = LrlaTrainer(replace(TINY, runs=3), 7), LrlaTrainer(replace(TINY, runs=3), 7, 2)
    try:
        for _ in range(TINY.iterations):
            assert one.advance() == two.advance()
    finally:
        two.close()
    before = LrlaTrainer(TINY, 7).network.state_dict()
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, two.network.state_dict()[name])
    assert any(not torch.equal(value, before[name]) for name, value in one.network.state_dict().items())


@pytest.mark.scale
def test_the_same_weights_on_ray():
    pytest.importorskip("ray", reason="needs the extra scale")
    one, cluster = LrlaTrainer(TINY, 7), LrlaTrainer(TINY, 7, 2, "local")
    try:
        for _ in range(TINY.iterations):
            assert one.advance() == cluster.advance()
    finally:
        cluster.close()
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, cluster.network.state_dict()[name])


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_wrong_number_of_workers_is_refused(tmp_path, workers):
    told = CliRunner().invoke(train, ["lrla", "--workers", workers, "--out", str(tmp_path / "run")])
    assert told.exit_code == 2
    assert "--workers" in told.output
    assert not (tmp_path / "run").exists()


def test_the_record_of_a_run_holds_every_value():
    record = as_record(read(Settings, None, {"network": "paper", "paper": {"cap": 3.0}}))
    assert set(record) == set(Settings.__dataclass_fields__)
    assert record["iterations"] == Settings.iterations
    assert record["paper"] == {"layers": [128, 128], "step_s": 1.0, "cap": 3.0}
    assert read(Settings, None, record) == Settings(network="paper", paper=PaperSettings(cap=3.0))


def test_the_shipped_weights_are_small_and_say_how_they_were_made():
    assert SHIPPED.stat().st_size < 5_000_000
    record = checkpoint.load(SHIPPED)["record"]
    assert record["agent"] == "lrla"
    assert {"seed", "seconds", "settings"} <= set(record)
    choice = LearnedScheme.load().decide(some_flows(1000), np.arange(1000))
    assert set(choice.route.tolist()) <= set(range(UNKNOWN_ROUTE, 4))


def test_the_ablation_has_weights_with_the_same_rates():
    ours, papers = stored(RATED["learned"], "sets"), stored(RATED["auto"], "paper")
    assert ours.rates == papers.rates == (0.1, 0.25, 0.5)
    assert set(LearnedScheme(ours).decide(some_flows(), np.arange(40)).rate.tolist()) <= {*ours.rates, np.inf}


@pytest.mark.parametrize("tree", [{"network": {}}, {"other": 1}, [1]])
def test_foreign_or_broken_weights_are_refused(tmp_path, tree):
    checkpoint.save(tmp_path / "w.npz", tree)
    with pytest.raises(UsageError):
        LearnedScheme.load(tmp_path / "w.npz")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    broken = PolicyNetwork()
    torch.nn.init.constant_(broken.flow[0].weight, float("nan"))
    record = {"settings": as_record(Settings())}
    checkpoint.save(tmp_path / "w.npz", {"network": dict(broken.state_dict()), "record": record})
    with pytest.raises(UsageError, match="finite"):
        LearnedScheme.load(tmp_path / "w.npz")
