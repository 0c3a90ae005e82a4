"""From what the kernel has and what is on the NIC to the queues to build. Pure: nothing is changed here.

1. Choose the kind: `prio`, else HTB priorities at the link rate, else the three bands of `pfifo_fast`.
2. List its objects: root, one class and one queue per level, filters for packets that carry no level.
3. Say which `skb->priority` reaches which level: htb and prio read `handle_major << 16 | minor` as the class itself,
   pfifo_fast reads the low 4 bits through a priomap of its own.

A packet that carries no level (nobody counted it) is not short: IP goes to the last level. Control traffic goes to the
first, or it would starve behind a full link and take the network with it: what is not IP (ARP, LLDP, LACP), ICMPv6
(neighbour discovery is IPv6's ARP) and the class selectors CS6 and CS7 (routing daemons, IGMP; RFC 4594).
"""

from dataclasses import dataclass
from typing import Literal

from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import check_levels
from hostagent.qdisc.objects import (
    ETH_P_IP,
    ETH_P_IPV6,
    TcObject,
    bfifo_leaf,
    fq_codel_leaf,
    htb_level,
    htb_root,
    htb_trunk,
    level_class,
    pfifo_fast_root,
    prio_root,
    u32_filter,
)

Kind = Literal["prio", "htb", "pfifo_fast", "none"]

# What can be missing in a kernel, and the option that brings it.
KERNEL_OPTION = {
    "prio": "CONFIG_NET_SCH_PRIO",
    "htb": "CONFIG_NET_SCH_HTB",
    "fq_codel": "CONFIG_NET_SCH_FQ_CODEL",
    "bfifo": "CONFIG_NET_SCH_FIFO",
    "u32": "CONFIG_NET_CLS_U32",
}

LEAF_LIMIT_BYTES = 32 << 20  # per level; what fq_codel allows itself by default (memory_limit)

MIN_RATE_BPS = 1_000_000  # below it the trickle each level is guaranteed would matter

_TC_PRIO_CONTROL = 7
_PRIOMAP_ENTRIES = 16
# pfifo_fast's priomap is fixed in the kernel: priorities 6 and 7 read as band 0, 2 as band 2, 0 as band 1.
_PFIFO_FAST_PRIORITY = (7, 0, 2)


@dataclass(frozen=True)
class QueuePlan:
    """The queues of one NIC.

    Attributes:
        kind: the qdisc at the root; `none` leaves the NIC alone.
        why: one line for a person: what was chosen and for what reason.
        levels: K.
        priority: `skb->priority` per level, in the form that qdisc reads.
        objects: what to build, parents first.
        rate_bps: the rate HTB shapes to, bit/s; None for the others.
        replace_foreign: whether a qdisc that somebody configured may be put aside.
    """

    kind: Kind
    why: str
    levels: int
    priority: tuple[int, ...]
    objects: tuple[TcObject, ...]
    rate_bps: int | None = None
    replace_foreign: bool = False

    def commands(self, interface: str) -> tuple[str, ...]:
        """The plan as the tc commands that build it, one per object."""
        return tuple(obj.command(interface) for obj in self.objects)


def choose_kind(wanted: str, supported: frozenset[str]) -> Kind:
    """The kind to build: the wanted one, or for `auto` the best the kernel has.

    Raises:
        KernelError: the wanted kind is not in this kernel; names the option.
    """
    if wanted == "none":
        return "none"
    if wanted == "auto":
        return "prio" if "prio" in supported else "htb" if "htb" in supported else "pfifo_fast"
    if wanted not in ("prio", "htb", "pfifo_fast"):
        raise UsageError(f"queues.kind = '{wanted}'; it must be auto, prio, htb, pfifo_fast or none")
    if wanted not in supported:
        raise KernelError(
            f"this kernel has no {wanted} qdisc ({KERNEL_OPTION.get(wanted, 'CONFIG_NET_SCHED')}); "
            f"set queues.kind to auto or one of: {', '.join(sorted(supported & {'prio', 'htb', 'pfifo_fast'}))}, none"
        )
    return wanted  # type: ignore[return-value]


def make_plan(
    wanted: str,
    supported: frozenset[str],
    levels: int,
    *,
    rate_bps: int | None = None,
    rate_source: str = "configured",
    replace_foreign: bool = False,
) -> QueuePlan:
    """The queues for one NIC.

    Args:
        wanted: `queues.kind` of the configuration.
        supported: qdiscs and classifiers this kernel has, by name.
        levels: K, 2 to 8.
        rate_bps: link rate, bit/s; needed for HTB only.
        rate_source: where that rate comes from, for the reason.
        replace_foreign: carried into the plan.

    Raises:
        UsageError: K outside 2..8; HTB without a rate, or with one below `MIN_RATE_BPS`.
        KernelError: the wanted kind is not in this kernel.
    """
    check_levels(levels)
    kind = choose_kind(wanted, supported)
    chosen = "configured" if wanted != "auto" else "the best this kernel has"
    if kind == "none":
        return QueuePlan(
            "none", "none: configured; packets are tagged, qdiscs are left alone", levels, (0,) * levels, ()
        )
    if kind == "pfifo_fast":
        return _pfifo_fast(
            levels, chosen if wanted != "auto" else f"{_lacks('prio')} and {_lacks('htb')}", replace_foreign
        )
    leaves, leaf_reason = _leaves(levels, supported)
    filters, filter_reason = _filters(levels, supported)
    priority = tuple(level_class(level) for level in range(levels))
    if kind == "prio":
        objects = (prio_root(levels, _priomap(levels, bool(filters))), *leaves, *filters)
        why = f"prio ({chosen}): {levels} strict bands, {leaf_reason}{filter_reason}"
        return QueuePlan("prio", why, levels, priority, objects, None, replace_foreign)
    if rate_bps is None:
        raise UsageError(
            "htb needs the link rate and the NIC reports none; set queues.link_rate, for example "
            'link_rate = "10Gbit" (or FABRICPILOT_QUEUES_LINK_RATE=10Gbit)'
        )
    if rate_bps < MIN_RATE_BPS:
        raise UsageError(f"queues.link_rate = {rate_bps} bit/s; htb needs at least 1Mbit")
    classes = tuple(htb_level(level, rate_bps) for level in range(levels))
    root = htb_root(0 if filters else levels - 1)
    objects = (root, htb_trunk(rate_bps), *classes, *leaves, *filters)
    reason = _lacks("prio") if wanted == "auto" else "configured"
    why = f"htb ({reason}): {levels} priorities at {rate_text(rate_bps)} ({rate_source}), {leaf_reason}{filter_reason}"
    return QueuePlan("htb", why, levels, priority, objects, rate_bps, replace_foreign)


def fold(levels: int) -> tuple[int, ...]:
    """The pfifo_fast band of each of K levels.

    The first level has band 0 for itself and, from three levels on, the last one band 2; band 1, where the kernel also
    puts what carries no level, takes those between. With two levels the last one shares band 1 with it.
    """
    if levels == 2:
        return (0, 1)
    return (0, *(1,) * (levels - 2), 2)


def rate_text(rate_bps: int) -> str:
    """A rate for people: `10 Gbit/s`."""
    for unit, name in ((10**9, "Gbit/s"), (10**6, "Mbit/s"), (10**3, "kbit/s")):
        if rate_bps >= unit:
            return f"{rate_bps / unit:g} {name}"
    return f"{rate_bps} bit/s"


def _pfifo_fast(levels: int, reason: str, replace_foreign: bool) -> QueuePlan:
    bands = fold(levels)
    shared = "; ".join(
        f"band {band}: level{'s' if bands.count(band) > 1 else ''} "
        + ", ".join(str(level) for level in range(levels) if bands[level] == band)
        for band in sorted(set(bands))
    )
    why = f"pfifo_fast ({reason}): {levels} levels on the kernel's 3 bands ({shared}; unmarked traffic in band 1)"
    priority = tuple(_PFIFO_FAST_PRIORITY[band] for band in bands)
    return QueuePlan("pfifo_fast", why, levels, priority, (pfifo_fast_root(),), None, replace_foreign)


def _leaves(levels: int, supported: frozenset[str]) -> tuple[tuple[TcObject, ...], str]:
    if "fq_codel" in supported:
        return tuple(fq_codel_leaf(level) for level in range(levels)), "fq_codel in each"
    text = f"bfifo of {LEAF_LIMIT_BYTES >> 20} MiB in each ({_lacks('fq_codel')})"
    return tuple(bfifo_leaf(level, LEAF_LIMIT_BYTES) for level in range(levels)), text


def _filters(levels: int, supported: frozenset[str]) -> tuple[tuple[TcObject, ...], str]:
    """Where packets go that carry no level; what no filter claims (not IP) goes to the root's default."""
    if "u32" not in supported:
        return (), f"; all unmarked traffic is last, ARP too ({_lacks('u32')})"
    first, last = 0, levels - 1
    everything = (0, 0, 0)
    return (
        u32_filter(1, ETH_P_IP, (0x00C0_0000, 0x00DC_0000, 0), "ip dsfield 0xc0 0xdc", first),
        u32_filter(1, ETH_P_IP, everything, "u32 0 0", last),
        u32_filter(2, ETH_P_IPV6, (0x0C00_0000, 0x0DC0_0000, 0), "ip6 priority 0xc0 0xdc", first),
        u32_filter(2, ETH_P_IPV6, (0x0000_3A00, 0x0000_FF00, 4), "ip6 protocol 58 0xff", first),
        u32_filter(2, ETH_P_IPV6, everything, "u32 0 0", last),
    ), ""


def _priomap(levels: int, filtered: bool) -> tuple[int, ...]:
    """Bands for what no filter claimed: control traffic, or without filters everything (TC_PRIO_CONTROL is first)."""
    if filtered:
        return (0,) * _PRIOMAP_ENTRIES
    return tuple(0 if entry == _TC_PRIO_CONTROL else levels - 1 for entry in range(_PRIOMAP_ENTRIES))


def _lacks(kind: str) -> str:
    return f"this kernel has no {kind}, {KERNEL_OPTION[kind]}"
