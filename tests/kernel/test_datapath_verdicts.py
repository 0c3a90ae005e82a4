"""Verdicts on the real program: before the thresholds, behind the rules, ending by themselves, never lost."""

import threading
import time

import numpy as np
import pytest
from agent_kit import wait_for
from datapath_kit import flow_key

from fabricpilot.config import Rule
from fabricpilot.levels import Thresholds
from fabricpilot.wire import FlowVerdict
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import Settings
from hostagent.datapath.rules import compile_rules, parse_rules
from hostagent.datapath.steering import Steering
from hostagent.datapath.verdicts import MAX_VERDICTS, VERDICT_DTYPE, flow_keys

DSCP = (32, 24, 16, 8)
SETTINGS = Settings(Thresholds((1000, 5000, 20000)), DSCP, (11, 12, 13, 14))
FLOW = flow_key()


@pytest.fixture
def sender(kernel_sender):
    kernel_sender.datapath.apply(SETTINGS)
    yield kernel_sender
    Steering(kernel_sender.datapath).clear()


@pytest.fixture
def steering(sender):
    return Steering(sender.datapath)


def verdict(level=-1, route=0, ttl_s=60.0, port=40000):
    return FlowVerdict("10.0.0.1", "10.0.0.2", port, 80, 6, level, route, ttl_s)


def test_it_names_the_flow_that_the_kernel_names(steering):
    six = FlowVerdict("2001:db8::1", "2001:db8::2", 1, 2, 17, 0, 0, 1.0)
    keys = flow_keys([verdict(), six])
    assert keys[0].tobytes() == FLOW.tobytes()
    assert keys[1].tobytes() == flow_key("2001:db8::1", "2001:db8::2", 1, 2, 17).tobytes()


def test_a_verdict_holds_from_the_next_packet_and_is_replaced_and_withdrawn(sender, steering):
    sender.send(FLOW, syn=True)
    assert sender.send(FLOW, 100).dscp == 32
    for level in (3, 1, 2):
        steering.add_verdicts([verdict(level)])
        assert sender.send(FLOW, 100).dscp == DSCP[level]
        assert sender.datapath.flows().states["level"].tolist() == [level]
    assert sender.send(FLOW).dscp == 32  # a pure acknowledgement stays on top
    steering.add_verdicts([verdict(ttl_s=0)])
    assert sender.send(FLOW, 100).dscp == 32


def test_a_verdict_reaches_a_flow_that_comes_later(sender, steering):
    steering.add_verdicts([verdict(3)])
    assert sender.send(FLOW, 10, syn=True).dscp == 8
    assert sender.send(flow_key(source_port=40001), 10, syn=True).dscp == 32


def test_a_verdict_raises_a_long_flow_and_a_verdict_without_level_does_not(sender, steering):
    sender.send(FLOW, syn=True)
    for _ in range(8):
        sender.send(FLOW, 3000)
    assert sender.send(FLOW, 100).dscp == 8
    steering.add_verdicts([verdict(-1, route=5)])
    assert sender.send(FLOW, 100).dscp == 8
    steering.add_verdicts([verdict(0)])
    assert sender.send(FLOW, 100).dscp == 32


def test_it_ends_by_itself_and_then_leaves_the_table(sender, steering):
    sender.send(FLOW, syn=True)
    steering.add_verdicts([verdict(3, ttl_s=2), verdict(3, ttl_s=60, port=5)])
    assert sender.send(FLOW, 100).dscp == 8
    wait_for(lambda: sender.send(FLOW, 1).dscp == 32)  # no agent has to do anything
    assert steering.drop_expired() == 1
    steering.add_verdicts([verdict(ttl_s=0, port=5)])
    assert steering.drop_expired() == 0
    assert sender.send(FLOW, 100).dscp == 32


def test_an_operators_rule_comes_first(sender, steering):
    parsed = parse_rules([Rule(action="pin", level=1)], 4)
    steering.set_rules(compile_rules(parsed, [None]), 1)
    steering.add_verdicts([verdict(3)])
    assert sender.send(FLOW, 100, syn=True).dscp == 24


def test_a_level_beyond_k_is_the_last_one(sender, steering):
    steering.add_verdicts([verdict(7)])
    assert sender.send(FLOW, 100, syn=True).dscp == 8


def test_a_full_table_refuses_and_says_how_many(sender, steering):
    many = [verdict(3, port=port) for port in range(1, MAX_VERDICTS + 101)]
    refused = sum(steering.add_verdicts(many[start : start + 512]) for start in range(0, len(many), 512))
    assert refused == 100
    assert len(steering.verdicts()[0]) == MAX_VERDICTS


def test_no_verdict_is_lost_while_packets_of_the_flow_run_on_all_cpus(sender, steering):
    """Two senders hammer one flow while its verdict changes; after each change every packet obeys it."""
    sender.send(FLOW, syn=True)
    program = bpf.obj_get(sender.pin_dir / "egress")
    frame = sender.send(FLOW, 100).frame
    stop = threading.Event()

    def hammer():
        while not stop.is_set():
            bpf.prog_test_run(program, frame, repeat=2000)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(60):
            level = round_ % 4
            steering.add_verdicts([verdict(level)])
            time.sleep(0.001)
            for _ in range(3):
                assert sender.send(FLOW, 10).dscp == DSCP[level], round_
            kept = sender.datapath.flows().states["verdict"].view(VERDICT_DTYPE)
            assert kept["level"].tolist() == [level + 1]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert np.all(sender.datapath.flows().states["verdict"] != 0)
