"""Scenarios: every scheme meets the same flows, central's loop adapts, and what is reported adds up."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from simulator.schemes import scheme
from testbed.scenarios.catalogue import DATA_MINING, SCENARIOS, WEB_SEARCH, Hour, PortGroup, scenario
from testbed.scenarios.cell import Cell, CellPlace
from testbed.scenarios.cli import scenario as command
from testbed.scenarios.contenders import CONTENDERS, contenders, mixture
from testbed.scenarios.loop import Run, play
from testbed.scenarios.outcome import confidence, measure

GROUP = PortGroup("web", 2, (Hour(WEB_SEARCH, 0.8), Hour(WEB_SEARCH, 0.6)))
SHORT = replace(SCENARIOS["websearch"], groups=(GROUP,), hour_s=20.0, interval_s=5.0)


def run(name, seed=1, what=SHORT):
    return play(Run(what, CONTENDERS[name], seed, 4))


def test_all_schemes_meet_the_same_flows_and_a_seed_decides():
    fair, srpt, again, other = run("fair"), run("srpt"), run("fair"), run("fair", seed=2)
    for hour in range(2):
        sizes = [np.sort(trail.hours[hour].size_bytes) for trail in (fair, srpt, again, other)]
        assert np.array_equal(sizes[0], sizes[1])
        assert np.array_equal(sizes[0], sizes[2])
        assert len(sizes[0]) != len(sizes[3]) or not np.array_equal(sizes[0], sizes[3])
    assert np.array_equal(fair.hours[0].fct_s, again.hours[0].fct_s)
    assert srpt.hours[0].fct_s.mean() < fair.hours[0].fct_s.mean()


def test_flows_belong_to_the_hour_they_start_in():
    for hour, flows in enumerate(run("fair").hours):
        assert (flows.start_s >= hour * SHORT.hour_s).all()
        assert (flows.start_s < (hour + 1) * SHORT.hour_s).all()


def test_the_optimiser_learns_from_reports_and_beats_thresholds_for_another_workload():
    # Data mining through thresholds meant for web search: what is reported must move them.
    group = PortGroup("dm", 2, (Hour(DATA_MINING, 0.8),))
    what = replace(SHORT, groups=(group,), hour_s=200.0, interval_s=10.0)
    adaptive, fixed = run("optimiser", what=what), run("qlas", what=what)
    assert adaptive.decisions >= 1
    assert adaptive.thresholds[-1][0]
    assert adaptive.hours[0].slowdown.mean() < fixed.hours[0].slowdown.mean()


def test_reports_account_for_every_byte_and_flow():
    cell = Cell(CellPlace(1, 0, 0), GROUP, 20.0, 1e9, scheme("mlfq"))
    cell.begin_hour(0)
    reports, ended = [], []
    for end_s in (5.0, 10.0, 15.0, 20.0, float("inf")):
        ended.append(cell.run_until(end_s))
        reports.append(cell.report(ended[-1], 5.0))
    assert [report.sequence for report in reports] == [1, 2, 3, 4, 5]
    assert sum(report.finished for report in reports) == sum(map(len, ended))
    total = sum(flows.size_bytes.sum() for flows in ended)
    assert sum(report.sent_bytes for report in reports) == pytest.approx(total, abs=len(reports))
    assert sum(LogHistogram.from_sparse(report.sizes).total for report in reports) == sum(map(len, ended))
    assert reports[-1].long == reports[-1].active == 0


def test_a_mixture_has_the_mean_of_its_flows():
    group = PortGroup("both", 1, (Hour(WEB_SEARCH, 0.6), Hour(DATA_MINING, 0.8)))
    # Flows per second are load over mean size, so the mean size of all is total load over total flows.
    found = mixture(group).mean_bytes
    web, mining = 1_711_250, 12_658_199
    assert found == pytest.approx(1.4 / (0.6 / web + 0.8 / mining), rel=0.03)


def test_the_document_has_every_scheme_hour_and_bucket():
    found = measure(SHORT, "fair,qlas", (1, 2, 3), 4, 1, lambda name: None)
    assert list(found["schemes"]) == ["fair", "qlas"]
    for numbers in found["schemes"].values():
        assert len(numbers["hours"]) == 2
        assert {"mean_us", "p99_us", "mean_slowdown", "buckets"} <= set(numbers)
        assert numbers["flows"] == sum(hour["flows"] for hour in numbers["hours"])
        low, high = numbers["mean_us_interval"]
        assert low < numbers["mean_us"] < high
    assert found["schemes"]["fair"]["mean_change"]["mean"] == 0
    assert found["schemes"]["qlas"]["mean_slowdown_change"]["mean"] < 0
    json.dumps(found, allow_nan=False)


def test_confidence_is_students():
    # 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt 3.
    mean, low, high = confidence([1, 2, 3])
    assert (mean, low, high) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), rel=1e-5)
    assert confidence([5]) == (5, None, None)


def test_overload_ends_and_says_how_bad_it_was():
    hours = (Hour(WEB_SEARCH, 1.2), Hour(WEB_SEARCH, 0.5))
    what = replace(SHORT, groups=(PortGroup("over", 1, hours),))
    first, second = run("fair", what=what).hours
    assert first.slowdown.mean() > second.slowdown.mean() > 1


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_whole(name):
    found = scenario(name)
    assert len({len(group.hours) for group in found.groups}) == 1
    assert found.interval_s < found.hour_s


def test_wrong_names_are_told():
    with pytest.raises(UsageError, match="choose from: websearch"):
        scenario("nothing")
    with pytest.raises(UsageError, match="choose from: fair"):
        contenders("fair,nothing")
    result = CliRunner().invoke(command, ["run", "websearch", "--seeds", "0"])
    assert isinstance(result.exception, UsageError)


def test_list_names_all():
    found = json.loads(CliRunner().invoke(command, ["list", "--json"]).output)
    assert set(found["scenarios"]) == set(SCENARIOS)
    assert set(found["schemes"]) == set(CONTENDERS)


def test_long_flows_in_turn_shorten_the_mean_and_the_tail():
    what = replace(SHORT, groups=(PortGroup("web", 2, (Hour(WEB_SEARCH, 0.8),)),), hour_s=100.0)
    levels, turns, fair = (
        run(name, what=what).hours[0].fct_s for name in ("fabricpilot-levels", "fabricpilot", "fair")
    )
    assert turns.mean() < 0.95 * levels.mean() < 0.9 * fair.mean()
    assert np.quantile(turns, 0.99) < np.quantile(fair, 0.99)


def test_larger_send_buffers_show_more_and_central_is_told():
    what = replace(SHORT, groups=(PortGroup("web", 1, (Hour(WEB_SEARCH, 0.8),)),), hour_s=40.0)
    small, large = (run("fabricpilot", what=replace(what, send_buffer_bytes=shown)) for shown in (1e6, 16e6))
    assert large.hours[0].fct_s.mean() < 0.95 * small.hours[0].fct_s.mean()
    assert large.thresholds != small.thresholds
    fair, same = (run("fair", what=replace(what, send_buffer_bytes=shown)) for shown in (1e6, 16e6))
    assert np.array_equal(fair.hours[0].fct_s, same.hours[0].fct_s)
