"""Verdicts on their way: what is malformed, what the agent hands on, and what it says when its data path takes none."""

import msgspec
import pytest

from fabricpilot.wire import MAX_VERDICTS, FlowVerdict, Verdicts, decode_from_central, encode
from hostagent.datapath.verdicts import VERDICT_DTYPE, expired, verdict_words

GOOD = FlowVerdict("10.0.0.1", "2001:db8::1", 40000, 80, 6, 2, 1, 30.0)


def test_a_verdict_survives_the_wire():
    message = Verdicts(verdicts=[GOOD, msgspec.structs.replace(GOOD, level=-1, route=0, ttl_s=0.0)])
    assert decode_from_central(encode(message)) == message


@pytest.mark.parametrize(
    "change",
    [
        {"source": "nowhere"},
        {"destination": "10.0.0.256"},
        {"source_port": 65536},
        {"destination_port": -1},
        {"protocol": 256},
        {"level": 8},
        {"level": -2},
        {"route": 32},
        {"ttl_s": -1.0},
        {"ttl_s": 1e9},
        {"ttl_s": float("nan")},
    ],
    ids=str,
)
def test_malformed_verdicts_are_no_message(change):
    fields = {name: getattr(GOOD, name) for name in GOOD.__struct_fields__} | change
    raw = msgspec.msgpack.encode([1, {"type": "verdicts", "verdicts": [list(fields.values())]}])
    assert decode_from_central(raw) is None


def test_their_number_is_bounded_and_fits_a_message():
    longest = FlowVerdict(
        "2001:db8:1111:2222:3333:4444:5555:6666", "2001:db8:1111:2222:3333:4444:5555:7777", 1, 2, 6, 1, 1, 1.5
    )
    assert decode_from_central(encode(Verdicts(verdicts=[longest] * MAX_VERDICTS))) is not None
    assert decode_from_central(encode(Verdicts(verdicts=[longest] * (MAX_VERDICTS + 1)))) is None


def test_a_verdict_ends_up_to_a_second_late_and_never_early():
    words = verdict_words([GOOD], now_ns=5_400_000_000)
    assert words.dtype == VERDICT_DTYPE
    assert words["until_s"].tolist() == [36]
    assert (words["level"].tolist(), words["route"].tolist()) == ([3], [1])
    assert not expired(words, 35_999_999_999)[0]
    assert expired(words, 36_000_000_000)[0]
