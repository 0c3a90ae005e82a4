"""The qdiscs, classes and filters the plan is made of: each as tc words for people and as option bytes for the kernel.

A `TcObject` is one of them. What this project builds comes from the constructors below, which write both forms side by
side (a kernel test holds that they mean the same); what was read from the kernel carries bytes only.

Layouts: `struct tc_htb_glob`, `tc_htb_opt`, `tc_prio_qopt`, `tc_fifo_qopt`, `tc_u32_sel` of linux/pkt_sched.h and
linux/pkt_cls.h; attributes are `struct nlattr` (length, type, value padded to 4 bytes), native byte order.
"""

import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Noun = Literal["qdisc", "class", "filter"]

ROOT = 0xFFFF_FFFF  # TC_H_ROOT, as a parent
HANDLE = 0x0FAB_0000  # "fab:", ours on every NIC; below 8000:, where the kernel gives handles out by itself
TRUNK = HANDLE | 0x10  # "fab:10", the htb class at the link rate; the levels are fab:1 .. fab:8
_FIRST_LEAF = 0x0FA1_0000  # "fa1:", the queue of level 0

# Attributes of a tc message that belong to the object itself, beyond kind and options (linux/rtnetlink.h):
# size table, chain, ingress and egress block. All others are statistics.
KEPT_ATTRIBUTES = (8, 11, 13, 14)

ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
_PROTOCOL_WORDS = {ETH_P_IP: "ip", ETH_P_IPV6: "ipv6"}

# With one class per priority the deficit round robin never has a choice: any quantum that is at least an MTU and not
# beyond 200000 serves, and naming one keeps the kernel from warning about r2q.
_QUANTUM_BYTES = 60_000
_TRICKLE_BPS = 8_000  # the guaranteed rate of each level: one packet a second or less, whatever is above it
_TRICKLE_BURST_BYTES = 1_600
_BURSTS_PER_S = 1_000  # a bucket of 1 ms: what a late timer may catch up with
_TICKS_PER_US = 15.625  # the unit of HTB's bucket depths is 64 ns (PSCHED_SHIFT)

_HTB_PARMS, _HTB_INIT, _HTB_RATE64, _HTB_CEIL64 = 1, 2, 6, 7
_U32_CLASSID, _U32_SEL, _U32_PCNT, _U32_FLAGS = 1, 5, 9, 11


@dataclass(frozen=True)
class TcObject:
    """One qdisc, class or filter.

    Attributes:
        noun: which of the three.
        kind: `htb`, `bfifo`, `u32`, ...
        handle: of the qdisc or class; 0 lets the kernel choose (filters).
        parent: handle it hangs on; `ROOT` at the top.
        options: TCA_OPTIONS as the kernel takes it; None where the kind needs none.
        info: filters: preference << 16 | protocol in network order; else 0.
        extra: further attributes that belong to the object, (type, value).
        words: the options as one types them after `tc ... KIND`.
    """

    noun: Noun
    kind: str
    handle: int
    parent: int
    options: bytes | None = None
    info: int = 0
    extra: tuple[tuple[int, bytes], ...] = ()
    words: str = field(default="", compare=False)

    def command(self, interface: str) -> str:
        """The tc command that makes this object on `interface`."""
        at = "root" if self.parent == ROOT else f"parent {handle_text(self.parent)}"
        if self.noun == "qdisc":
            # `replace` for the root, as the kernel's own default is in its place.
            verb = "replace" if self.parent == ROOT else "add"
            text = f"tc qdisc {verb} dev {interface} {at} handle {handle_text(self.handle)} {self.kind} {self.words}"
        elif self.noun == "class":
            text = f"tc class add dev {interface} {at} classid {handle_text(self.handle)} {self.kind} {self.words}"
        else:
            protocol = _PROTOCOL_WORDS[socket.ntohs(self.info & 0xFFFF)]
            which = f"protocol {protocol} prio {self.info >> 16}"
            text = f"tc filter add dev {interface} {at} {which} {self.kind} {self.words}"
        return text.rstrip()


def handle_text(handle: int) -> str:
    """A handle as tc writes it: `fab:1`, `fab:`."""
    minor = handle & 0xFFFF
    return f"{handle >> 16:x}:{f'{minor:x}' if minor else ''}"


def level_class(level: int) -> int:
    """The class of a level under our root, which is also the `skb->priority` that both htb and prio read directly."""
    return HANDLE | (level + 1)


def burst_bytes(rate_bps: int) -> int:
    """HTB's bucket for a link of `rate_bps`: what it carries in a millisecond."""
    return -(-rate_bps // (8 * _BURSTS_PER_S))


def htb_root(default_level: int | None) -> TcObject:
    """The htb root; what no filter claims goes to `default_level`."""
    minor = 0 if default_level is None else level_class(default_level) & 0xFFFF
    version, r2q = 3, 10
    options = attribute(_HTB_INIT, struct.pack("=5I", version, r2q, minor, 0, 0))
    return TcObject("qdisc", "htb", HANDLE, ROOT, options, words=f"default {minor:x}")


def htb_trunk(rate_bps: int) -> TcObject:
    """The class all levels share: the link itself."""
    return _htb_class(TRUNK, HANDLE, rate_bps, burst_bytes(rate_bps), rate_bps, 0)


def htb_level(level: int, rate_bps: int) -> TcObject:
    """A level: next to no rate of its own, all of the link's when nobody before it wants it."""
    return _htb_class(level_class(level), TRUNK, _TRICKLE_BPS, _TRICKLE_BURST_BYTES, rate_bps, level)


def prio_root(levels: int, priomap: Sequence[int]) -> TcObject:
    """The prio root with K bands; `priomap` (16 bands) is for what carries no level and no filter claims."""
    words = f"bands {levels} priomap {' '.join(map(str, priomap))}"
    return TcObject("qdisc", "prio", HANDLE, ROOT, struct.pack("=i16B", levels, *priomap), words=words)


def pfifo_fast_root() -> TcObject:
    """The kernel's own three strict bands."""
    return TcObject("qdisc", "pfifo_fast", HANDLE, ROOT)


def fq_codel_leaf(level: int) -> TcObject:
    """The queue of a level, flows fair among themselves and kept short."""
    return TcObject("qdisc", "fq_codel", _leaf_handle(level), level_class(level))


def bfifo_leaf(level: int, limit_bytes: int) -> TcObject:
    """The queue of a level, first come first served, bounded in bytes."""
    options = struct.pack("=I", limit_bytes)
    return TcObject("qdisc", "bfifo", _leaf_handle(level), level_class(level), options, words=f"limit {limit_bytes}")


def u32_filter(preference: int, protocol: int, match: tuple[int, int, int], match_words: str, level: int) -> TcObject:
    """Send packets of `protocol` whose 32-bit word at `offset` equals `value` under `mask` to a level.

    Args:
        preference: filters of lower preference are asked first; one protocol per preference.
        protocol: Ethernet protocol.
        match: value, mask, offset from the network header.
        match_words: the same as tc words.
        level: where the packets go.
    """
    value, mask, offset = match
    terminal = 1
    selector = struct.pack("=BBBxHHhhI", terminal, 0, 1, 0, 0, 0, 0, 0) + struct.pack(
        "=4s4sii", mask.to_bytes(4, "big"), value.to_bytes(4, "big"), offset, 0
    )
    target = level_class(level)
    options = attribute(_U32_CLASSID, struct.pack("=I", target)) + attribute(_U32_SEL, selector)
    info = preference << 16 | socket.htons(protocol)
    words = f"match {match_words} flowid {handle_text(target)}"
    return TcObject("filter", "u32", 0, HANDLE, options, info, words=words)


def signature(obj: TcObject) -> tuple[object, ...]:
    """What of an object decides what it does: equal for what we sent and what the kernel then shows of it.

    For the kinds built here; the others compare whole.
    """
    place = (obj.noun, obj.kind, obj.parent, obj.info, 0 if obj.noun == "filter" else obj.handle)
    fields = dict(attributes(obj.options or b"")) if obj.kind in ("htb", "u32") else {}
    if obj.kind == "htb" and obj.noun == "qdisc":
        _, r2q, default, _, _ = struct.unpack("=5I", fields[_HTB_INIT])
        return (*place, r2q, default)
    if obj.kind == "htb":
        parms = struct.unpack("=BBHhHIBBHhHIIIIII", fields[_HTB_PARMS])
        rate, ceil, buffer, cbuffer, quantum, priority = parms[5], parms[11], parms[12], parms[13], parms[14], parms[16]
        wide = fields.get(_HTB_RATE64), fields.get(_HTB_CEIL64)
        # tc versions round bucket depths differently, by a microsecond at most.
        return (*place, rate, ceil, *wide, quantum, priority, round(buffer / 160), round(cbuffer / 160))
    if obj.kind == "u32":
        return (*place, fields.get(_U32_CLASSID), fields.get(_U32_SEL))
    if obj.kind in ("fq_codel", "pfifo_fast"):
        return place
    return (*place, obj.options)


def same_tree(found: Iterable[TcObject], wanted: Iterable[TcObject]) -> bool:
    """Whether what was read from the kernel is what the plan builds; filters in order, as the first match wins."""
    return _comparable(found) == _comparable(wanted)


# Offload flags the kernel adds to what it shows and refuses to take back: in_hw, not_in_hw (TCA_CLS_FLAGS_*).
_FLAGS_ATTRIBUTE = {"u32": _U32_FLAGS, "flower": 22, "matchall": 3}
_SETTABLE_FLAGS = 0b11
_COUNTER_ATTRIBUTE = {"u32": _U32_PCNT, "matchall": 4}


def replayable(obj: TcObject) -> TcObject:
    """The object without what changes by itself (counters) and what the kernel does not take back."""
    if obj.options is None:
        return obj
    if obj.kind == "htb" and obj.noun == "qdisc":
        # Asked for as version 3, shown as 0x30011; direct_pkts is a counter.
        init = struct.pack("=I", 3)
        kept = [(t, init + v[4:16] + bytes(4) if t == _HTB_INIT else v) for t, v in attributes(obj.options)]
        return replace(obj, options=b"".join(attribute(t, v) for t, v in kept))
    if obj.noun == "filter" and obj.kind in _FLAGS_ATTRIBUTE:
        kept = []
        for number, value in attributes(obj.options):
            if number == _COUNTER_ATTRIBUTE.get(obj.kind):
                continue
            if number == _FLAGS_ATTRIBUTE[obj.kind]:
                value = struct.pack("=I", struct.unpack("=I", value)[0] & _SETTABLE_FLAGS)
            kept.append((number, value))
        return replace(obj, options=b"".join(attribute(t, v) for t, v in kept))
    return obj


def attribute(number: int, value: bytes) -> bytes:
    """One netlink attribute."""
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> Iterable[tuple[int, bytes]]:
    """The netlink attributes in `data`, (type, value)."""
    offset = 0
    while offset + 4 <= len(data):
        length, number = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield number & 0x3FFF, data[offset + 4 : offset + length]
        offset += length + (-length % 4)


def is_u32_root_table(obj: TcObject) -> bool:
    """Whether a filter is really the hash table (`800:`) that the kernel makes for each preference."""
    return obj.kind == "u32" and obj.handle & 0xFFFFF == 0 and obj.handle >> 20 >= 0x800


def _comparable(objects: Iterable[TcObject]) -> tuple[list[str], list[str]]:
    tree, filters = [], []
    for obj in objects:
        if obj.noun == "filter":
            if not is_u32_root_table(obj):
                filters.append(repr(signature(obj)))
        else:
            tree.append(repr(signature(obj)))
    return sorted(tree), filters


def _leaf_handle(level: int) -> int:
    return _FIRST_LEAF + (level << 16)


def _htb_class(handle: int, parent: int, rate_bps: int, burst: int, ceil_bps: int, priority: int) -> TcObject:
    cburst = burst_bytes(ceil_bps)
    words = (
        f"rate {rate_bps}bit ceil {ceil_bps}bit burst {burst} cburst {cburst} quantum {_QUANTUM_BYTES} prio {priority}"
    )
    rate, ceil = rate_bps // 8, ceil_bps // 8
    parms = (
        _ratespec(rate)
        + _ratespec(ceil)
        + struct.pack("=5I", _ticks(rate, burst), _ticks(ceil, cburst), _QUANTUM_BYTES, 0, priority)
    )
    options = attribute(_HTB_PARMS, parms)
    if rate >= 1 << 32:
        options += attribute(_HTB_RATE64, struct.pack("=Q", rate))
    if ceil >= 1 << 32:
        options += attribute(_HTB_CEIL64, struct.pack("=Q", ceil))
    return TcObject("class", "htb", handle, parent, options, words=words)


def _ratespec(rate_bytes_per_s: int) -> bytes:
    ethernet = 1  # TC_LINKLAYER_ETHERNET: the kernel computes from the rate and wants no rate table
    return struct.pack("=BBHhHI", 0, ethernet, 0, 0, 0, min(rate_bytes_per_s, (1 << 32) - 1))


def _ticks(rate_bytes_per_s: int, size_bytes: int) -> int:
    return int(1_000_000 * size_bytes // rate_bytes_per_s * _TICKS_PER_US)
