"""Encoding round trips; nothing a peer sends raises."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabricpilot.histogram import BINS
from fabricpilot.levels import Thresholds
from fabricpilot.wire import (
    MAX_FINISHED_SAMPLE,
    MAX_LONG_FLOWS,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Ack,
    FlowSummary,
    Hello,
    Identify,
    LongFlows,
    Policy,
    Refused,
    Report,
    decode_from_central,
    decode_from_host,
    encode,
)

counts = st.integers(0, 2**63 - 1)
names = st.text(min_size=1, max_size=30)
texts = st.text(max_size=60)
histograms = st.dictionaries(st.integers(0, BINS - 1), counts, max_size=40)
flows = st.builds(FlowSummary, texts, texts, counts, counts, counts, counts, counts, counts)
thresholds = st.sets(st.integers(1, 2**62), min_size=1, max_size=7).map(sorted)
hellos = st.builds(
    Hello,
    host=names,
    group=names,
    levels=counts,
    backend=texts,
    queues=texts,
    link_rate_bps=counts,
    epoch=counts,
    thresholds=thresholds,
    version=texts,
)
reports = st.builds(
    Report,
    host=names,
    sequence=counts,
    interval_ns=counts,
    epoch=counts,
    sent_bytes=counts,
    sizes=histograms,
    durations=histograms,
    finished=counts,
    finished_sample=st.lists(flows, max_size=5),
    long=counts,
    long_flows=st.lists(flows, max_size=5),
    active=counts,
    counters=st.dictionaries(texts, counts, max_size=10),
)
policies = st.builds(
    Policy, epoch=st.integers(1, 2**63 - 1), thresholds=thresholds, expiry_s=st.floats(0.001, 1e9), reason=texts
)
told = st.builds(LongFlows, host=names, flows=st.lists(flows, max_size=5), ended=st.lists(flows, max_size=5))
from_host = hellos | reports | told
from_central = policies | st.builds(Refused, reason=texts) | st.just(Identify()) | st.builds(Ack, epoch=counts)


@given(from_host)
def test_host_messages_come_back_as_they_were(message):
    assert decode_from_host(encode(message)) == message
    assert decode_from_central(encode(message)) is None


@given(from_central)
def test_central_messages_come_back_as_they_were(message):
    assert decode_from_central(encode(message)) == message
    assert decode_from_host(encode(message)) is None


@given(st.binary(max_size=300))
def test_garbage_is_no_message(frame):
    assert decode_from_host(frame) is None
    assert decode_from_central(frame) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | st.integers(0, 500), inner, max_size=4),
    max_leaves=12,
)


@given(from_host | from_central, st.data())
def test_a_message_with_one_wrong_field_is_valid_or_nothing(message, data):
    fields = msgspec.to_builtins(message)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(values)
    frame = msgspec.msgpack.encode([PROTOCOL_VERSION, fields])
    for decoded in (decode_from_host(frame), decode_from_central(frame)):
        if isinstance(decoded, Policy):
            Thresholds.of(decoded.thresholds)
            assert math.isfinite(decoded.expiry_s)


@given(from_host, st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_damaged_frames_do_not_raise(message, place, junk):
    frame = encode(message)
    decode_from_host(frame[:place] + junk + frame[place + len(junk) :])
    decode_from_host(frame[: place % len(frame)])


@pytest.mark.parametrize(
    "fields",
    [
        {"thresholds": []},
        {"thresholds": [3, 2]},
        {"thresholds": [5, 5]},
        {"thresholds": [0, 2]},
        {"thresholds": list(range(1, 9))},
        {"thresholds": [1, 2**63]},
        {"expiry_s": math.nan},
        {"expiry_s": math.inf},
        {"expiry_s": 0.0},
        {"epoch": 0},
        {"epoch": 1.5},
        {"reason": "x" * 300},
    ],
    ids=str,
)
def test_impossible_policies_are_malformed(fields):
    valid = {"type": "policy", "epoch": 1, "thresholds": [1, 2], "expiry_s": 1.0, "reason": ""}
    assert decode_from_central(msgspec.msgpack.encode([PROTOCOL_VERSION, valid])) is not None
    assert decode_from_central(msgspec.msgpack.encode([PROTOCOL_VERSION, valid | fields])) is None


def test_other_versions_are_not_read():
    frame = msgspec.msgpack.encode([PROTOCOL_VERSION + 1, {"type": "identify"}])
    assert decode_from_central(frame) is None


def test_later_fields_are_passed_over():
    """A newer peer of the same protocol version may say more."""
    frame = msgspec.msgpack.encode([PROTOCOL_VERSION, {"type": "ack", "epoch": 3, "mood": "good"}])
    assert decode_from_central(frame) == Ack(epoch=3)


def test_deep_nesting_is_no_message():
    assert decode_from_host(b"\x91" * 60_000) is None
    assert decode_from_host(b"\x92\x01" + b"\x91" * 60_000) is None


def largest_report(flow):
    return Report(
        host="h" * 128,
        sequence=2**63 - 1,
        interval_ns=2**63 - 1,
        epoch=2**63 - 1,
        sent_bytes=2**63 - 1,
        sizes=dict.fromkeys(range(BINS), 2**40),
        durations=dict.fromkeys(range(BINS), 2**40),
        finished=2**63 - 1,
        finished_sample=[flow] * MAX_FINISHED_SAMPLE,
        long=2**63 - 1,
        long_flows=[flow] * MAX_LONG_FLOWS,
        active=2**63 - 1,
        counters={f"counter number {n}, with a long name": 2**63 - 1 for n in range(64)},
    )


def test_the_largest_report_fits():
    address = "2001:0db8:1111:2222:3333:4444:5555:6666"
    flow = FlowSummary(address, address, 65535, 65535, 17, 2**63 - 1, 2**63 - 1, 7)
    frame = encode(largest_report(flow))
    assert len(frame) < MAX_MESSAGE_BYTES
    assert decode_from_host(frame) is not None


def test_more_flows_than_allowed_are_malformed():
    flow = FlowSummary("a", "b", 1, 2, 6, 1, 1, 0)
    report = largest_report(flow)
    for field, most in (("finished_sample", MAX_FINISHED_SAMPLE), ("long_flows", MAX_LONG_FLOWS)):
        over = msgspec.structs.replace(report, **{field: [flow] * (most + 1)})
        assert decode_from_host(encode(over)) is None
