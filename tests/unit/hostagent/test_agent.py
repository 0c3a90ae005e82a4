"""The agent's loop over a data path in memory: reports, policies, status; and that it stops when told."""

import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest

from fabricpilot.config import AgentConfig, load
from fabricpilot.control import ControlServer, ask
from fabricpilot.levels import Thresholds, default_dscp
from fabricpilot.wire import Policy, Refused
from hostagent.agent import Agent, sent_bytes
from hostagent.datapath.base import FLOW_KEY_DTYPE, Settings
from hostagent.datapath.fake import FakeDatapath
from hostagent.lifecycle import Scheduled
from hostagent.qdisc import make_plan


def flow_key(port=40_000):
    """A TCP flow between two IPv4 hosts."""
    key = np.zeros((), FLOW_KEY_DTYPE)
    for field, last in (("source", 1), ("destination", 2)):
        key[field] = np.frombuffer(bytes(10) + b"\xff\xff" + bytes([10, 0, 0, last]), "u1")
    key["source_port"], key["destination_port"], key["protocol"] = port, 80, 6
    return key


@pytest.fixture
def agent(tmp_path):
    config = load(AgentConfig, None, {"host.name": "h1", "host.run_dir": str(tmp_path)}, {})
    datapath = FakeDatapath()
    settings = Settings(Thresholds((1000, 20_000, 300_000)), default_dscp(4), (0, 0, 0, 0))
    datapath.attach("eth0")
    datapath.apply(settings)
    scheduled = Scheduled(
        datapath, {"eth0": make_plan("none", frozenset(), 4)}, settings, adopted=False, link_rate_bps=10**9
    )
    with ControlServer(tmp_path / "agent.sock") as control:
        yield Agent(config, scheduled, control, link=None)


class Sent:
    """A link that keeps what the agent sends."""

    connected = True
    trouble = ""
    silent_s = 0.0
    follows_long_flows = False

    def __init__(self):
        self.counters = {}
        self.messages = []

    def send(self, message):
        self.messages.append(message)
        return True


def policy(epoch, thresholds=(2000, 30_000, 400_000), **changes):
    return Policy(**{"epoch": epoch, "thresholds": list(thresholds), "expiry_s": 60.0, **changes})


@pytest.mark.parametrize(("buffer_bytes", "visible"), [(2_000_000, 2_000_000), (0, 65_536)])
def test_central_is_told_what_ranking_sees(agent, monkeypatch, tmp_path, buffer_bytes, visible):
    assert agent.hello().visible_bytes == 0  # it ranks by bytes sent
    (tmp_path / "tcp_wmem").write_text("4096\t65536\t4194304\n")
    monkeypatch.setattr("hostagent.agent._TCP_WMEM", tmp_path / "tcp_wmem")
    monkeypatch.setattr(agent.datapath, "sees_backlog", lambda: True)
    agent.settings = replace(agent.settings, use_backlog=True)
    agent.config = load(AgentConfig, None, {"datapath.send_buffer_bytes": buffer_bytes}, {})
    assert agent.hello().visible_bytes == visible


def test_a_policy_reaches_the_data_path_and_a_lower_epoch_does_not(agent):
    agent.handle(policy(5))
    assert agent.datapath.settings().thresholds.bytes == (2000, 30_000, 400_000)
    agent.handle(policy(4, (1, 2, 3)))
    assert agent.datapath.settings().thresholds.bytes == (2000, 30_000, 400_000)
    assert agent.hello().epoch == 5


def test_a_policy_for_another_number_of_levels_never_reaches_the_data_path(agent):
    before = agent.datapath.settings()
    agent.handle(policy(7, (5,)))
    assert agent.datapath.settings() == before
    assert agent.epoch == 0
    assert "2 levels" in agent.status()["policy"]["refused"]
    agent.handle(policy(8))
    assert agent.status()["policy"]["refused"] == ""


def test_an_expired_policy_is_kept_and_said_to_be_stale(agent):
    agent.link = link = Sent()
    agent.handle(policy(5, expiry_s=30))
    link.silent_s = 29
    assert not agent.status()["policy"]["stale"]
    link.silent_s = 31
    assert agent.status()["policy"]["stale"]
    assert agent.datapath.settings().thresholds.bytes == (2000, 30_000, 400_000)


def test_central_refusing_this_host_is_shown(agent):
    agent.handle(Refused(reason="identity is not its key's"))
    assert "identity" in agent.status()["policy"]["refused"]


def test_reports_tell_differences_and_finished_flows_once(agent):
    agent.link = link = Sent()
    key = flow_key()
    agent.datapath.send(key, 0, syn=True)
    agent.datapath.send(key, 5000)
    agent.report()
    agent.datapath.send(key, 700, fin=True)
    agent.report()
    agent.report()
    first, second, third = link.messages
    assert (first.sent_bytes, first.finished, first.active) == (5000, 0, 1)
    assert (second.sent_bytes, second.finished, second.active) == (700, 1, 0)
    assert second.finished_sample[0].size_bytes == 5700
    assert (third.sent_bytes, third.finished) == (0, 0)
    assert [m.sequence for m in link.messages] == [1, 2, 3]


def test_runs_until_sigterm_and_answers_status_meanwhile(agent, tmp_path):
    told = {}
    agent.control.answer = lambda _request: agent.status()

    def ask_and_stop():
        told.update(ask(tmp_path / "agent.sock", "status", timeout_s=5))
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask_and_stop)
    asking.start()
    agent.run()
    asking.join()
    assert told["host"] == "h1"
    assert told["datapath"]["thresholds"] == [1000, 20_000, 300_000]


def test_sent_bytes_sums_levels_only():
    assert sent_bytes({"bytes_level_0": 3, "bytes_level_7": 4, "packets_level_0": 9, "untracked_vlan": 1}) == 7


def test_a_flood_of_new_flows_is_told_of_once(agent, caplog):
    for packets in (0, 7, 8, 8, 9):
        agent.datapath._counted["over_share"] = packets
        agent.report()
    assert caplog.text.count("begins more than 20000 flows/s") == 1
