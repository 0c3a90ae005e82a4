"""Daemons die under traffic, and the traffic does not notice.

One trace of 20 s: an agent is killed (SIGKILL) and comes back 5 s later, central is killed and comes back after 10 s.
All packets of all senders are captured from the first to the last, and each must carry the DSCP that its flow's bytes
demand: through the agent's death (tagging goes on) and after its return (it adopts flow table and thresholds).
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.capture.oracle import check
from testbed.capture.packets import read_packets
from testbed.capture.ring import RingCapture
from testbed.daemons import Daemons
from testbed.flows.recorded import Recipe, make_trace
from testbed.flows.replay import replay
from testbed.netns.programs import Programs
from testbed.netns.registry import Run
from testbed.netns.star import BOTTLENECK_PORT, StarPlan
from testbed.schemes import DSCP, FABRICPILOT, in_force, ranks_by_more_than_sent

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root (CAP_BPF, CAP_NET_ADMIN)"),
]

RATE_BPS = 40_000_000
RECIPE = Recipe(
    workload="websearch_dctcp_bytes_trafficgenerator",
    load=0.6,
    rate_bps=RATE_BPS,
    scale=0.05,
    duration_s=20.0,
    senders=2,
    seed=3,
)


def until_true(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.2)


@pytest.mark.timeout(120)
def test_traffic_does_not_notice_that_daemons_die(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs")
    try:
        star = StarPlan(run, RECIPE.senders)
        star.build()
        programs = Programs(run, tmp_path / "logs")
        with in_force(FABRICPILOT, star, programs, RATE_BPS, 128_000, decision_s=2.0) as daemons:
            assert daemons is not None
            faults = Faults(star, daemons)
            ring = RingCapture(star.switch, (BOTTLENECK_PORT, "br0"), 200_000)
            results = replay(star, programs, make_trace(RECIPE), tmp_path, drain_s=20, progress=faults.at)
            ring.stop()
            assert faults.done == ["kill agent", "kill central", "start agent", "start central"]
            until_true(lambda: [h["state"] for h in daemons.central_status()["hosts"]] == ["up", "up"])
            until_true(lambda: all(daemons.agent_status(h)["link"]["connected"] for h in star.sender_hosts))
            told = daemons.agent_status(star.sender_hosts[0])
            history = {host.address: daemons.history(host) for host in star.sender_hosts}
        assert results.lost == 0
        assert told["datapath"]["adopted"] is True
        assert faults.thresholds_before_kill == faults.thresholds_after_return
        ring.save(tmp_path / "capture.pcap")
        written = ranks_by_more_than_sent(FABRICPILOT)
        verdict = check(read_packets(tmp_path / "capture.pcap"), history, DSCP, written=written)
        assert ring.missed == 0
        ring.close()
        assert verdict.flows == len(results.trace)
        assert verdict.incomplete_flows == 0
        assert verdict.checked > 40_000
        assert verdict.correct == verdict.checked, verdict.wrong
    finally:
        run.remove()


class Faults:
    """Kills and restarts at their times, driven by the replay's progress."""

    def __init__(self, star: StarPlan, daemons: Daemons) -> None:
        self.daemons = daemons
        self.host = star.sender_hosts[0]
        self.done: list[str] = []
        self.thresholds_before_kill: list[int] = []
        self.thresholds_after_return: list[int] = []
        self._plan = [
            (5.0, "kill agent", self._kill_agent),
            (6.0, "kill central", self._kill_central),
            (10.0, "start agent", self._start_agent),
            (16.0, "start central", daemons.start_central),
        ]

    def at(self, _flows: int, elapsed_s: float) -> None:
        while self._plan and elapsed_s >= self._plan[0][0]:
            _, name, act = self._plan.pop(0)
            act()
            self.done.append(name)

    def _kill_agent(self) -> None:
        self.thresholds_before_kill = self.daemons.agent_status(self.host)["datapath"]["thresholds"]
        assert self.daemons.agents[self.host.name].stop(signal.SIGKILL) == -signal.SIGKILL

    def _kill_central(self) -> None:
        assert self.daemons.central is not None
        assert self.daemons.central.stop(signal.SIGKILL) == -signal.SIGKILL

    def _start_agent(self) -> None:
        """Central is away, so what the agent comes back with can only be what it adopted."""
        self.daemons.start_agent(self.host)
        until_true(lambda: self.daemons.agents[self.host.name].alive and self._thresholds())
        self.thresholds_after_return = self._thresholds()

    def _thresholds(self) -> list[int]:
        try:
            told: list[int] = self.daemons.agent_status(self.host)["datapath"]["thresholds"]
        except Exception:  # not up yet
            return []
        return told
