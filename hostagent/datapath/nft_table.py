"""What stands in our nftables table, read by netlink: the notes in chain `state`, the counters.

libnftables fetches every element of every set before it lists anything, a quarter of a second with 50,000 flows;
these dumps cost less than a millisecond whatever the sets hold.
"""

import struct
from dataclasses import dataclass
from typing import Final

from hostagent.datapath.netlink_dump import MESSAGE_HEADER_BYTES, Entries, NetfilterDump, attribute, shapes
from hostagent.datapath.nft_rules import TABLE

# linux/netfilter/nf_tables.h
_NFTABLES: Final = 10
_GET_TABLE, _GET_RULE, _GET_OBJECT = 1, 7, 19
_NFPROTO_INET: Final = 1
_TABLE_NAME: Final = (1,)
_RULE_TABLE, _RULE_CHAIN = 1, 2
_RULE_USERDATA: Final = (7,)
_OBJECT_TABLE: Final = 1
_OBJECT_NAME: Final = (2,)
_OBJECT_DATA: Final = (4,)
_COUNTER_BYTES: Final = (4, 1)
_COUNTER_PACKETS: Final = (4, 2)
_USERDATA_COMMENT: Final = 0  # libnftnl/udata.h: type, length, text


@dataclass(frozen=True)
class Counted:
    """One counter."""

    packets: int
    ip_bytes: int


def exists(dump: NetfilterDump) -> bool:
    """Whether our table is in the network namespace of `dump`; also False where the kernel has no nftables."""
    try:
        tables = dump.read(_NFTABLES, _GET_TABLE, _NFPROTO_INET)
    except OSError:
        return False
    wanted = _text(TABLE)
    found = (shape for shape in shapes(tables, MESSAGE_HEADER_BYTES) if _TABLE_NAME in shape)
    return any(name.tobytes() == wanted for shape in found for name in shape.octets(_TABLE_NAME))


def exists_here() -> bool:
    """Whether a netfilter data path is in the current network namespace; needs no library and no right."""
    try:
        dump = NetfilterDump()
    except OSError:  # a kernel without netfilter's netlink
        return False
    try:
        return exists(dump)
    finally:
        dump.close()


def comments(dump: NetfilterDump, chain: str) -> list[str]:
    """The comments of a chain's rules, in no particular order.

    Raises:
        OSError: what the kernel answered.
    """
    wanted = attribute(_RULE_TABLE, _text(TABLE)) + attribute(_RULE_CHAIN, _text(chain))
    rules = dump.read(_NFTABLES, _GET_RULE, _NFPROTO_INET, wanted)
    found = (shape for shape in shapes(rules, MESSAGE_HEADER_BYTES) if _RULE_USERDATA in shape)
    return [_comment(userdata.tobytes()) for shape in found for userdata in shape.octets(_RULE_USERDATA)]


def counters(dump: NetfilterDump) -> dict[str, Counted]:
    """Our table's counters by name.

    Raises:
        OSError: what the kernel answered.
    """
    objects: Entries = dump.read(_NFTABLES, _GET_OBJECT, _NFPROTO_INET, attribute(_OBJECT_TABLE, _text(TABLE)))
    counted: dict[str, Counted] = {}
    for shape in shapes(objects, MESSAGE_HEADER_BYTES, frozenset({_OBJECT_DATA})):
        if _COUNTER_BYTES not in shape:
            continue
        names = [name.tobytes().rstrip(b"\0").decode() for name in shape.octets(_OBJECT_NAME)]
        packets, ip_bytes = shape.number(_COUNTER_PACKETS, 8).tolist(), shape.number(_COUNTER_BYTES, 8).tolist()
        counted |= {name: Counted(*row) for name, *row in zip(names, packets, ip_bytes, strict=True)}
    return counted


def _text(name: str) -> bytes:
    return name.encode() + b"\0"


def _comment(userdata: bytes) -> str:
    position = 0
    while position + 2 <= len(userdata):
        kind, length = struct.unpack_from("BB", userdata, position)
        if kind == _USERDATA_COMMENT:
            return userdata[position + 2 : position + 2 + length].rstrip(b"\0").decode(errors="replace")
        position += 2 + length
    return ""
