"""Schemes by name over real TCP: each runs, loses nothing, and its packets carry what it demands."""

import subprocess
from pathlib import Path

import pytest

from fabricpilot.errors import KernelError
from hostagent.datapath.cgroup_links import cgroup_mount
from testbed.capture.packets import FlowKey, SeenPacket, read_packets
from testbed.experiment import Outcome, run_experiment
from testbed.netns.programs import Programs
from testbed.netns.registry import Run
from testbed.netns.star import StarPlan
from testbed.netns.switch_port import shape, shape_fair_queues
from testbed.plan import RunPlan
from testbed.schemes import dscp_of, has_agents, runnable, thresholds_of

PLAN = RunPlan(duration_s=3, senders=2, rate_bps=100_000_000, scale=0.02, decision_s=1, load=0.7)
IN_SHORT = ("fair", "qsjf")  # what others have not: another transport and a marking port; hints and cgroups


class Quiet:
    """Nobody watches the progress."""

    def begin(self, step: str, total: float) -> None:
        pass

    def advance(self, done: float, note: str = "") -> None:
        pass


def ran(name: str, tmp_path: Path) -> Outcome:
    return run_experiment(PLAN, [name], tmp_path / "out", Quiet(), tmp_path / "runs")


@pytest.mark.parametrize(
    "name",
    [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in runnable() if name != "fq"],
)
def test_scheme_runs_by_name(name: str, tmp_path: Path) -> None:
    outcome = ran(name, tmp_path)
    found = outcome.schemes[name]
    assert found.results.lost == 0
    assert len(found.results.trace) > 300
    assert (found.capture is not None) == has_agents(name)
    if found.capture is not None:
        verdict = found.capture.verdict
        assert verdict.wrong == []
        assert verdict.correct == verdict.checked > 100
        dscp = dscp_of(name)
        assert dscp is not None
        assert set(verdict.by_dscp) <= set(dscp)
        assert dscp[0] in verdict.by_dscp
    kept = thresholds_of(name, PLAN.recipe)
    if kept is not None:
        assert [tuple(entry["thresholds"]) for entry in found.thresholds] in ([kept.bytes], [kept.bytes] * 2)
    if name == "qsjf":
        assert kept is not None
        assert found.capture is not None
        assert_on_the_level_of_their_size(list(read_packets(found.capture.pcap)), kept.level_of, dscp_of(name))
    if name == "fair":
        assert found.port.dropped == 0  # marks come long before the buffer is full
        assert outcome.environment["tcp_congestion_control"] == "bpf_dctcp"


def assert_on_the_level_of_their_size(packets, level_of, dscp) -> None:
    """Flows seen from SYN to FIN and sent once: their first payload is on the level of all they have."""
    flows: dict[FlowKey, list[SeenPacket]] = {}
    for packet in packets:
        flows.setdefault(packet.flow, []).append(packet)
    seen = {
        sum(packet.payload_bytes for packet in flow): next(packet.dscp for packet in flow if packet.payload_bytes)
        for flow in flows.values()
        if flow[0].syn and any(packet.fin for packet in flow)
    }
    wrong = {size for size, code in seen.items() if code != dscp[level_of(size - 1)]}
    assert len(seen) > 20
    assert len(wrong) <= len(seen) // 10  # a flow sent in part again looks larger than it is
    assert len(set(seen.values())) >= 2


@pytest.fixture
def run(tmp_path: Path):
    made = Run.create(tmp_path / "runs")
    yield made
    made.remove()


def test_a_queue_per_flow_or_the_name_of_what_is_missing(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 1)
    star.build()
    programs = Programs(run, tmp_path / "logs")
    shape(programs, star, 100_000_000, 256_000, None)
    try:
        shape_fair_queues(programs, star, 256_000)
        said = programs.run_in(star.switch, ["tc", "qdisc", "show", "dev", "rx"])
    except KernelError as error:
        said = str(error)
    assert "qdisc fq" in said or "CONFIG_NET_SCH_FQ or CONFIG_NET_SCH_FQ_CODEL" in said


def test_a_cgroup_of_a_run_goes_with_the_processes_in_it(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 1)
    star.build()
    name = run.make_cgroup("s0")
    assert run.make_cgroup("s0") == name
    inside = cgroup_mount() / name[1:] / "cgroup.procs"
    program = Programs(run, tmp_path / "logs").start("inside", star.controller, ["sleep", "60"], cgroup=name)
    while str(program.pid) not in inside.read_text().split():
        assert program.alive
    assert run.contents().cgroups == [name]
    run.remove()
    assert not inside.parent.exists()
    assert program.popen.wait(5) != 0
    assert name[1:] not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
