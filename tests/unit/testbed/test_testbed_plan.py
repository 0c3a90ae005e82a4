"""Parameters, the star's commands, and the agent's log: what needs no kernel."""

import json

import pytest
from click.testing import CliRunner

from central.policy.schemes import SCHEMES
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from testbed.cli import testbed as group
from testbed.daemons import read_history
from testbed.flows.protocol import Transport
from testbed.netns.registry import Run
from testbed.netns.star import StarPlan
from testbed.netns.switch_port import parse_counters
from testbed.plan import RunPlan
from testbed.schemes import runnable, thresholds_of, transport_of


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load": 1.2}, "--load 1.2 must be 0.01 to 0.99"),
        ({"duration_s": 0.1}, "--duration"),
        ({"senders": 0}, "--senders"),
        ({"rate_bps": 1}, "--rate"),
        ({"buffer_bytes": 100}, "--buffer"),
        ({"scale": float("nan")}, "--scale"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_out_of_bounds_name_their_option(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunPlan(**values)  # type: ignore[arg-type]


def test_thresholds_that_stay_are_those_of_the_workload_at_the_traces_scale() -> None:
    recipe = RunPlan(scale=0.1, load=0.8).recipe
    assert thresholds_of("pias-published", recipe) == Thresholds((7_168, 182_784, 325_632))  # 70, 1785, 3180 KiB
    assert thresholds_of("pias-mismatched", recipe) == Thresholds((102, 922, 17_101))  # data mining: 1, 9, 167 KiB
    las = thresholds_of("las", recipe)
    assert las is not None
    assert las.levels == 8
    assert thresholds_of("fabricpilot", recipe) is None
    assert thresholds_of("fifo", recipe) is None


def test_ends_are_set_up_as_the_scheme_wants() -> None:
    assert transport_of("fair").congestion_control == "bpf_dctcp"
    assert transport_of("qsjf").hints
    for name in runnable():
        assert Transport.of(transport_of(name).arguments) == transport_of(name)
    assert Transport.of([]) == transport_of("fifo")


def test_every_scheme_is_listed_with_what_is_different_here() -> None:
    listed = json.loads(CliRunner().invoke(group, ["schemes", "--json"]).output)
    assert set(listed) == set(SCHEMES)
    assert not listed["las"]["refusal"]
    assert listed["srpt"]["refusal"]
    assert "qsjf" in CliRunner().invoke(group, ["schemes"]).output


def test_capture_fits_its_ring_on_any_link() -> None:
    for rate_bps in (10_000_000, 200_000_000, 2_000_000_000):
        plan = RunPlan(rate_bps=rate_bps)
        assert plan.capture_packets <= 1_000_000
        assert plan.capture_packets >= rate_bps / 8 / 1500 * plan.capture_s


def test_dry_run_says_everything_and_needs_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    result = CliRunner().invoke(group, ["demo", "--dry-run", "--senders", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert sum(line.startswith("ip netns add fp-RUN-") for line in lines) == 6
    assert any("tc_scripts/switch rx --rate 200000000bit --buffer 256000 --fifo" in line for line in lines)
    assert "8,769 flows of websearch_dctcp_bytes_trafficgenerator x 0.1" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "sjf"], "scheme 'sjf' is unknown; choose from: fair, fifo, fq"),
        (["run", "fifo", "srpt"], "scheme 'srpt' cannot run on a network: it needs a switch"),
        (["run", "fifo", "--send-buffer", "1KB"], "--send-buffer 1000 must be 4096"),
        (["demo", "--workload", "nope"], "flow-size distribution 'nope' is unknown"),
        (["demo", "--rate", "fast"], "rate 'fast' is not understood"),
        (["demo", "--load", "2"], "--load 2 must be"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], error: str) -> None:
    result = CliRunner().invoke(group, arguments)
    assert isinstance(result.exception, UsageError)
    assert error in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize("command", [["demo"], ["run", "fair", "qsjf", "--json"]])
def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    result = CliRunner().invoke(group, command)
    assert result.stdout == ""
    assert getattr(result.exception, "exit_code", None) == 3
    assert "needs root" in str(result.exception)


def test_every_host_of_the_star_knows_every_other() -> None:
    star = StarPlan(Run("x"), 3)
    commands = dict(star.commands())
    for host in star.hosts:
        neighbours = [line for line in commands[host.namespace] if line.startswith("neighbour add")]
        assert len(neighbours) == 2 * 3  # IPv4 and IPv6 of the three others
        assert not any(host.mac in line for line in neighbours)
    addresses = [h.address for h in star.hosts] + [h.management_address for h in star.hosts]
    assert len({*addresses, star.controller_address}) == 9


def test_history_is_read_from_an_agents_log() -> None:
    log = [
        "2026-11-21 14:41:32,680 INFO hostagent.lifecycle: ebpf data path attached on eth0, "
        "thresholds [20480, 414486, 8388608]",
        "2026-11-21 14:41:32,683 INFO hostagent.link: connected to central at tcp://10.20.0.1:5555",
        "2026-11-21 14:41:37,808 INFO hostagent.agent: policy 1795272097774: thresholds [13437, 125717, 1051946] "
        "(first for 387 flows at load 0.30)",
    ]
    first, second = read_history(log)
    assert first.thresholds.bytes == (20480, 414486, 8388608)
    assert second.thresholds.bytes == (13437, 125717, 1051946)
    assert second.latest_ns - first.latest_ns == 5_128_000_000
    assert second.earliest_ns < second.latest_ns


def test_port_counters_are_read_from_tc() -> None:
    text = "qdisc htb fab: root refcnt 3\n Sent 340580580 bytes 233909 pkt (dropped 5529, overlimits 222699 requeues 0)"
    counters = parse_counters(text)
    assert (counters.packets, counters.sent_bytes, counters.dropped) == (233909, 340580580, 5529)
