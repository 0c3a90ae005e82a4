"""Netlink dumps into columns: hand-made messages of several shapes, malformed ones, and an independent reader."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.datapath import conntrack_flows
from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_START
from hostagent.datapath.conntrack_flows import (
    CONNECTION_DTYPE,
    SENDER_DTYPE,
    connections,
    contained,
    flow_table,
    senders,
)
from hostagent.datapath.netlink_dump import Entries, attribute, nested, shapes

NESTED = 0x8000
BE_LIBERAL, CLOSE_INIT = 8, 4


def entries(*messages: bytes) -> Entries:
    offsets = np.cumsum([0, *(len(message) for message in messages[:-1])], dtype=np.intp)
    return Entries(np.frombuffer(b"".join(messages), np.uint8), offsets, np.array([len(m) for m in messages], np.intp))


def message(*attributes: bytes) -> bytes:
    return bytes(20) + b"".join(attributes)


def nest(kind: int, *attributes: bytes, flag: int = NESTED) -> bytes:
    return attribute(kind | flag, b"".join(attributes))


def tuple_of(kind: int, source: bytes, destination: bytes, ports: tuple[int, int], protocol: int) -> bytes:
    base = 1 if len(source) == 4 else 3
    addresses = nest(1, attribute(base, source), attribute(base + 1, destination))
    numbers = [attribute(1, bytes([protocol]))] + [attribute(2 + n, struct.pack("!H", p)) for n, p in enumerate(ports)]
    return nest(kind, addresses, nest(2, *numbers))


def connection(
    ident: int,
    *,
    protocol=6,
    size=4,
    state=3,
    flags=(0, 0),
    counters=((10, 5000), (7, 400)),
    start=7_000,
    ports=(9, 80),
) -> bytes:
    ours, theirs = bytes(range(size)), bytes(range(100, 100 + size))
    parts = [tuple_of(1, ours, theirs, ports, protocol), tuple_of(2, theirs, ours, ports[::-1], protocol)]
    if protocol == 6:
        tcp = [attribute(1, bytes([state]))]
        tcp += [attribute(kind, bytes([given, 0xFF])) for kind, given in zip((4, 5), flags, strict=True)]
        parts.append(nest(4, nest(1, *tcp)))
    if counters:
        parts += [
            nest(9 + side, attribute(1, struct.pack("!Q", packets)), attribute(2, struct.pack("!Q", count)))
            for side, (packets, count) in enumerate(counters)
        ]
    if start:
        parts.append(nest(20, attribute(1, struct.pack("!Q", start))))
    return message(*parts, attribute(12, struct.pack("!I", ident)))


class Canned:
    """A dump that answers what it was given."""

    def __init__(self, found: Entries) -> None:
        self.found = found

    def read(self, *_: object) -> Entries:
        return self.found


def test_shapes_group_what_is_alike_wherever_it_stands():
    one = [message(attribute(1, struct.pack("!I", value))) for value in (5, 6, 7)]
    other = [message(attribute(2, struct.pack("!I", value))) for value in (50, 60)]
    longer = message(attribute(1, struct.pack("!I", 8)), attribute(3, b"x"))
    found = entries(one[0], other[0], one[1], longer, other[1], one[2])
    seen = {}
    for shape in shapes(found, 20):
        [path] = [path for path in ((1,), (2,)) if path in shape]
        seen[tuple(shape.rows.tolist())] = (path, shape.number(path, 4).tolist())
    assert seen == {(0, 2, 5): ((1,), [5, 6, 7]), (1, 4): ((2,), [50, 60]), (3,): ((1,), [8])}


def test_an_attribute_shorter_than_expected_is_an_error():
    [shape] = shapes(entries(message(attribute(1, b"ab"))), 20)
    assert shape.octets((1,)).tobytes() == b"ab"
    with pytest.raises(OSError, match="message"):
        shape.number((1,), 4)


@given(st.binary(min_size=4, max_size=64).map(lambda data: data + bytes(-len(data) % 4)))
def test_malformed_messages_end_in_an_error_or_in_rows_never_in_a_hang(data):
    try:
        rows = [shape.rows for shape in shapes(entries(message(data)), 20)]
    except OSError:
        return
    assert np.concatenate(rows).tolist() == [0]


@pytest.mark.parametrize("values", [[1, 2, 3], [7], []], ids=str)
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "mixed"])
def test_list_elements(values, uniform):
    elements = [nest(1, attribute(9, bytes(4 if uniform or n else 8)), flag=0) for n, _ in enumerate(values)]
    found = nested(entries(message(attribute(1, b"t\0"), nest(3, *elements, flag=0))), (3,))
    assert found.lengths.tolist() == [len(element) for element in elements]
    for offset, element in zip(found.offsets.tolist(), elements, strict=True):
        assert found.buffer[offset : offset + len(element)].tobytes() == element


def test_connections_of_all_kinds():
    rows = connections(
        Canned(
            entries(
                connection(30, protocol=17, size=16),
                connection(10),
                connection(20, flags=(BE_LIBERAL, BE_LIBERAL)),
                connection(40, counters=()),
                connection(50, start=0),
                connection(60, protocol=132),
                connection(10),
            )
        )
    )
    assert rows.dtype == CONNECTION_DTYPE
    assert rows["id"].tolist() == [10, 20, 30, 40, 50]
    assert rows["saw_start"].tolist() == [True, False, True, False, True]
    assert rows["start_realtime_ns"].tolist() == [7000, 7000, 7000, 7000, 0]
    first = rows["sides"][0]
    assert first["packets"].tolist() == [10, 7]
    assert first["ip_bytes"].tolist() == [5000, 400]
    assert first["payload_bytes"].tolist() == [5000 - 520 - 8, 400 - 364 - 8]
    assert first["key"]["source"][0].tobytes() == bytes(10) + b"\xff\xff" + bytes(range(4))
    assert first["key"]["destination"][0].tobytes() == bytes(10) + b"\xff\xff" + bytes(range(100, 104))
    assert first["key"]["source_port"].tolist() == [9, 80]
    assert rows["sides"]["key"]["source"][2, 0].tobytes() == bytes(range(16))
    assert rows["sides"]["packets"][3].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("state", "flags", "ended"),
    [
        (1, (0, 0), [False, False]),
        (3, (0, 0), [False, False]),
        (4, (CLOSE_INIT, 0), [True, False]),
        (5, (0, CLOSE_INIT), [False, True]),
        (6, (CLOSE_INIT, 0), [True, True]),
        (7, (CLOSE_INIT, 0), [True, True]),
        (8, (0, 0), [True, True]),
    ],
)
def test_who_has_ended_by_tcp_state(state, flags, ended):
    [row] = connections(Canned(entries(connection(1, state=state, flags=flags))))
    assert row["sides"]["ended"].tolist() == ended


def element(ident: int, timeout_ms: int, left_ms: int) -> bytes:
    key = nest(1, attribute(1, struct.pack("!I", ident)), flag=0)
    return nest(1, key, attribute(4, struct.pack("!Q", timeout_ms)), attribute(5, struct.pack("!Q", left_ms)), flag=0)


def test_senders_have_the_time_they_last_sent():
    found = message(nest(3, element(9, 90_000, 89_000), element(3, 50_000, 49_500), element(9, 1, 1), flag=0))
    rows = senders(Canned(entries(found)), "fabricpilot", "original", now_ns=10_000_000_000)
    assert rows["id"].tolist() == [3, 9]
    assert rows["last_sent_ns"].tolist() == [9_500_000_000, 9_000_000_000]


def test_join_takes_the_direction_that_left_and_turns_clocks():
    known = connections(Canned(entries(connection(1, start=1_005_000), connection(2), connection(3, start=0))))
    original = np.array([(1, 9_000), (3, 9_100), (77, 1)], SENDER_DTYPE)
    reply = np.array([(1, 100)], SENDER_DTYPE)
    flows = flow_table(known, (original, reply), realtime_offset_ns=1_000_000, since_ns=42)
    assert flows.codes.tolist() == [2, 6, 3]
    assert flows.states["first_seen_ns"].tolist() == [5_000, 42, 5_000]
    assert flows.states["last_seen_ns"].tolist() == [9_000, 9_100, 5_000]
    assert flows.states["attained_bytes"].tolist() == [4472, 4472, 28]
    assert set(flows.states["flags"].tolist()) == {FLAG_SAW_START}
    assert not any(flows.states["flags"] & FLAG_ENDED)
    assert flows.keys["source_port"].tolist() == [9, 9, 80]


@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 50)))
def test_contained_is_what_numpy_says(values, among):
    one, other = np.array(values, np.uint64), np.array(among, np.uint64)
    assert contained(one, other).tolist() == np.isin(one, other).tolist()


def test_the_attribute_numbers_are_pyroute2s():
    """An independent description of the same wire format."""
    from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

    names = [name for name, *_ in nfct_msg.nla_map]
    assert names[conntrack_flows._ID[0]] == "CTA_ID"
    assert names[conntrack_flows._START[0]] == "CTA_TIMESTAMP"
    assert [names[number] for number in conntrack_flows._COUNTERS] == ["CTA_COUNTERS_ORIG", "CTA_COUNTERS_REPLY"]
    assert [names[number] for number in conntrack_flows._TUPLE] == ["CTA_TUPLE_ORIG", "CTA_TUPLE_REPLY"]
