"""Real connections over a veth pair, with the data path and with what people use in its place (`bench dataplane`).

    bare         nothing in the way: what the others are compared with
    fabricpilot  the egress program, backlog mode, attached as on any host: by tcx where the kernel has it
    by clsact    the same program, the other way: only where some nanoseconds can be told apart (bench_bulk.py)
    nftables     four levels by `ct original bytes`, DSCP and priority: the rules people write by hand (nft_bench.py)
    u32          a plain tc filter that matches the DSCP; it writes one where the kernel has act_pedit

Variants take turns within a round, so that noise meets all of them; ratios are taken within a round, and the median of
the rounds counts: throughput and round trip of one connection, and what nginx and redis answer (bench_servers.py). Two
processes on two ends scatter by several per cent however long one measures; a transfer whose both ends are one thread
(bench_bulk.py) tells what the sender's CPU pays for each 64 KiB.

The cost per packet of real sockets is the kernel's own account of run time (BPF_ENABLE_STATS) net of an empty program
on the same hook and packets: "udp" has no socket to ask, "tcp" asks it and ranks by bytes sent, "backlog" ranks by what
was written.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hostagent.datapath import bench_wire as net

_REQUESTS: Final = 1500
_REQUEST: Final = bytes(100)
_SMALL_SENDS: Final = 20_000
_TRANSFERS: Final = 5  # rounds of these for one of the others: they are short
_BEHIND_OURS: Final = 60  # preference of the empty program's filter

Variant = Callable[[], Callable[[], None]]  # installs it, and returns how to remove it again


def measure(rounds: int, seconds: int) -> dict[str, Any]:
    """All figures; the process is in a network namespace of its own afterwards.

    Args:
        rounds: how often each variant gets its turn.
        seconds: length of a bulk transfer.

    Raises:
        KernelError: no right to make a network namespace, no bpf(2), no bcc or no netfilter here.
    """
    from hostagent.datapath.bench_bulk import both_ends
    from hostagent.datapath.bench_servers import servers
    from hostagent.datapath.bench_settings import settings
    from hostagent.datapath.ebpf import EbpfDatapath

    net.enter_own_namespace()
    pin_dir = Path(f"/sys/fs/bpf/fabricpilot-live-{os.getpid()}")
    datapath, by_clsact = EbpfDatapath(pin_dir, 131_072), EbpfDatapath(pin_dir, 131_072, "clsact")
    try:
        datapath.apply(replace(settings(), use_backlog=True))
        with net.wire() as there, servers(there) as rates:
            variants = {"bare": _nothing, "fabricpilot": _scheduled_by(datapath), **_others()}
            kinds: dict[str, Callable[[], float]] = {
                "bulk": lambda: net.bulk_gbps(seconds),
                "round_trip": _round_trip_us,
                **rates,
            }
            taken = _in_turn(variants, kinds, rounds)
            variants["by clsact"] = _scheduled_by(by_clsact)
            with both_ends(there) as transfer:
                alone = _in_turn(variants, {"alone": transfer.ns_per_64_kib}, rounds * _TRANSFERS)["alone"]
            return {
                "attached_by": next(iter(datapath.attached_by([net.INTERFACE]))),
                "throughput_ratio": _ratios(taken["bulk"]),
                "rr_latency_ratio": _ratios(taken["round_trip"]),
                "server_rate_ratio": {name: _ratios(taken[name]) for name in rates},
                "bare_gbps": round(statistics.median(taken["bulk"]["bare"]), 2),
                "bare_rr_us": round(statistics.median(taken["round_trip"]["bare"]), 1),
                "bare_answers_per_s": {name: round(statistics.median(taken[name]["bare"])) for name in rates},
                "ns_per_64_kib": _net(alone),
                "ns_per_packet": _sockets(by_clsact),
            }
    finally:
        datapath.detach()
        datapath.close()
        by_clsact.close()


def _in_turn(
    variants: Mapping[str, Variant], kinds: dict[str, Callable[[], float]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Every figure of every variant, round by round; each round begins with another variant."""
    taken: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in variants} for kind in kinds}
    order = list(variants)
    for _ in range(rounds):
        for name in order:
            remove = variants[name]()
            for kind, measured in kinds.items():
                taken[kind][name].append(measured())
            remove()
        order.append(order.pop(0))
    return taken


def _net(alone: dict[str, list[float]]) -> dict[str, int]:
    """The low end of each variant's rounds; all but bare net of it."""
    low = {
        name: statistics.quantiles(values, n=10)[0] if len(values) > 1 else values[0] for name, values in alone.items()
    }
    return {name: round(value - (0 if name == "bare" else low["bare"])) for name, value in low.items()}


def _ratios(values: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(value / bare for value, bare in zip(found, values["bare"], strict=True)), 3)
        for name, found in values.items()
        if name != "bare"
    }


def _nothing() -> Callable[[], None]:
    return lambda: None


def _scheduled_by(datapath: Any) -> Variant:
    def schedule() -> Callable[[], None]:
        datapath.attach(net.INTERFACE)
        return lambda: datapath.release([net.INTERFACE])

    return schedule


def _others() -> dict[str, Variant]:
    """What people use in our place."""
    from hostagent.datapath.nft_bench import PLAIN_RULES
    from hostagent.datapath.nft_library import Nft

    nft = Nft()

    def rule_set() -> Callable[[], None]:
        nft.run(PLAIN_RULES, "installing rules to compare with")
        return lambda: nft.run("delete table inet bench", "removing them")

    def filter_u32() -> Callable[[], None]:
        _tc("qdisc", "add", "dev", net.INTERFACE, "clsact")
        match = ("filter", "add", "dev", net.INTERFACE, "egress", "protocol", "ip", "prio", "1", "u32")
        by_dscp = ("match", "ip", "dsfield", "0", "0xfc")
        if not _tc(*match, *by_dscp, "action", "pedit", "ex", "munge", "ip", "tos", "set", "0x20", check=False):
            _tc(*match, *by_dscp, "flowid", "1:1")

        def remove() -> None:
            _tc("qdisc", "del", "dev", net.INTERFACE, "clsact")

        return remove

    return {"nftables": rule_set, "u32": filter_u32}


def _tc(*arguments: str, check: bool = True) -> bool:
    return subprocess.run(["tc", *arguments], capture_output=not check, check=check, timeout=10).returncode == 0


def _round_trip_us() -> float:
    """Median time of a small request and its answer on one connection."""
    taken = []
    with net.connected(net.ECHO_PORT) as connection:
        for _ in range(_REQUESTS):
            began = time.perf_counter_ns()
            connection.sendall(_REQUEST)
            connection.recv(len(_REQUEST))
            taken.append(time.perf_counter_ns() - began)
    return statistics.median(taken) / 1000


def _sockets(datapath: Any) -> dict[str, int]:
    """Net nanoseconds per packet of real sockets' small packets, by a data path on clsact."""
    import socket

    from pyroute2 import IPRoute

    from hostagent.datapath import bpf_syscall as bpf
    from hostagent.datapath.bench_settings import settings

    def udp() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            sending.connect((net.THEIRS, net.SINK_PORT + 1))
            for _ in range(_SMALL_SENDS):
                try:
                    sending.send(_REQUEST)
                except ConnectionRefusedError:  # nobody listens; it was sent all the same
                    sending.send(_REQUEST)

    def tcp() -> None:
        with net.connected(net.SINK_PORT) as sending:
            for _ in range(_SMALL_SENDS):
                sending.sendall(_REQUEST)

    ours = bpf.obj_get(datapath.pin_dir / "egress")
    empty = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC)
    counting = bpf.enable_run_time_stats()
    datapath.attach(net.INTERFACE)
    found: dict[str, list[float]] = {}
    try:
        with closing(IPRoute()) as ipr:
            index = ipr.link_lookup(ifname=net.INTERFACE)[0]
            ipr.tc(
                "add-filter", "bpf", index, ":1", fd=empty, name="empty", parent="ffff:fff3", prio=_BEHIND_OURS,
                direct_action=True,
            )  # fmt: skip
        for _ in range(5):
            for name, send, backlog in (("udp", udp, False), ("tcp", tcp, False), ("backlog", tcp, True)):
                datapath.apply(replace(settings(), use_backlog=backlog))
                before = [bpf.run_time(fd) for fd in (ours, empty)]
                send()
                after = [bpf.run_time(fd) for fd in (ours, empty)]
                of_ours, of_empty = ((a[0] - b[0]) / (a[1] - b[1]) for a, b in zip(after, before, strict=True))
                found.setdefault(name, []).append(of_ours - of_empty)
    finally:
        datapath.release([net.INTERFACE])
        for fd in (ours, empty, counting):
            os.close(fd)
    return {name: round(min(values)) for name, values in found.items()}
