"""Scenarios made small for real hosts: the load of every hour is exact, groups keep to themselves, refusals say why."""

import numpy as np
import pytest
from click.testing import CliRunner

from fabricpilot.errors import UsageError
from simulator.workloads.distribution import SizeDistribution
from testbed.flows.protocol import MIN_FLOW_BYTES
from testbed.scenarios.catalogue import SCENARIOS, scenario
from testbed.scenarios.cli import scenario as command
from testbed.scenarios.contenders import CONTENDERS
from testbed.scenarios.real import fit_for_hosts
from testbed.scenarios.small import small, trace_of


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_hour_of_every_group_has_its_load_and_one_scale_per_group(name: str) -> None:
    here = small(scenario(name), 60.0)
    trace = trace_of(here, seed=3)
    group_of, hour_of = trace.sender % here.ports, trace.start_ns // 60_000_000_000
    for number, group in enumerate(here.scenario.groups):
        busiest = 0.0
        for hour, now in enumerate(group.hours):
            inside = (group_of == number) & (hour_of == hour)
            capacity_bytes = here.rate_bps / 8 * 60.0
            # What is rounded up to the smallest flow that can be sent is the scaling's, not the draw's.
            floor = (trace.size_bytes[inside] == MIN_FLOW_BYTES).sum() * MIN_FLOW_BYTES / capacity_bytes
            load = trace.size_bytes[inside].sum() / capacity_bytes
            assert load == pytest.approx(now.load, rel=0.02, abs=floor)
            busiest = max(busiest, inside.sum() / 60.0)
        assert busiest == pytest.approx(200 / here.ports, rel=0.01)


def test_sizes_are_the_workloads_at_the_groups_scale() -> None:
    here = small(scenario("spatial"), 120.0)
    trace = trace_of(here, seed=1)
    for number, group in enumerate(here.scenario.groups):
        sizes = np.sort(trace.size_bytes[trace.sender % here.ports == number]) / here.scales[number]
        wanted = SizeDistribution.load(group.hours[0].workload)
        for share in (0.5, 0.9):  # strata: quantiles are met to one slice
            low, high = wanted.quantile(np.array([share - 0.01, share + 0.01]))
            assert low * 0.98 <= np.quantile(sizes, share) <= max(high * 1.02, MIN_FLOW_BYTES / here.scales[number])


def test_same_seed_same_flows_another_seed_others() -> None:
    here = small(scenario("dynamic"), 5.0)
    first, again, other = trace_of(here, 1), trace_of(here, 1), trace_of(here, 2)
    assert (first.start_ns == again.start_ns).all()
    assert (first.size_bytes == again.size_bytes).all()
    assert (np.diff(first.start_ns) >= 0).all()
    assert len(first) == len(other)
    assert not (first.start_ns == other.start_ns).all()


def test_what_no_network_can_run_is_left_out_with_the_reason() -> None:
    chosen, refused = fit_for_hosts("")
    assert {c.name for c in chosen} == set(CONTENDERS) - {"srpt"}
    assert "priorities" in refused["srpt"]
    result = CliRunner().invoke(command, ["run", "websearch", "--on", "testbed", "--scheme", "srpt"])
    assert isinstance(result.exception, UsageError)
    assert "'srpt' cannot run on a network" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--hour", "5"], "--hour is of no meaning with --on simulator"),
        (["--on", "testbed", "--workers", "2"], "--workers is of no meaning with --on testbed"),
        (["--on", "testbed", "--send-buffer", "4MB"], "--send-buffer is of no meaning with --on testbed"),
        (["--on", "testbed", "--hour", "0.5"], "an hour of 0.5 s"),
        (["--on", "testbed", "--scheme", "nothing"], "choose from: fair"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_made(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(command, ["run", "websearch", *arguments])
    assert isinstance(result.exception, UsageError)
    assert told in str(result.exception)
