"""`fabricpilot bench netfilter`: what the netfilter data path costs, per packet, per byte and per read.

    per packet   CPU time of sending small datagrams into an interface that drops them: bare, with conntrack alone,
                 with four plain rules by `ct original bytes` at the route hook, and with the data path
    bulk         iperf3 over a veth pair, alternating with and without the data path
    read         `flows()` over a flow table filled with one datagram per flow, beside pyroute2's dump of all entries

Everything happens in network namespaces of its own, which end with the process.
"""

import json
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from hostagent.datapath import bench_wire as net

_PACKETS_PER_ROUND: Final = 50_000
_DATAGRAM: Final = bytes(200)
_CONNTRACK_ALONE: Final = """
add table inet bench
add chain inet bench c { type filter hook postrouting priority 0; }
add rule inet bench c ct state invalid accept
"""
# What people write by hand for the same end: levels by bytes, DSCP and priority.
PLAIN_RULES: Final = """
add table inet bench
add chain inet bench l0
add chain inet bench l1
add chain inet bench l2
add chain inet bench l3
add rule inet bench l0 ip dscp set cs4 meta priority set fab:1
add rule inet bench l1 ip dscp set cs3 meta priority set fab:2
add rule inet bench l2 ip dscp set cs2 meta priority set fab:3
add rule inet bench l3 ip dscp set cs1 meta priority set fab:4
add chain inet bench c { type route hook output priority mangle; }
add rule inet bench c ct original bytes < 20480 goto l0
add rule inet bench c ct original bytes < 400000 goto l1
add rule inet bench c ct original bytes < 8388608 goto l2
add rule inet bench c goto l3
"""


@click.command()
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds per figure.")
@click.option("--flows", default=50_000, show_default=True, type=click.IntRange(1, 120_000), help="Flows read.")
@click.option("--seconds", default=2, show_default=True, type=click.IntRange(1), help="Length of a bulk transfer.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def netfilter(rounds: int, flows: int, seconds: int, as_json: bool) -> None:
    """CPU per packet, bulk throughput and time to read, of the netfilter data path."""
    result = measure(rounds, flows, seconds)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result["ns_per_packet"].items():
        click.echo(f"{name:>16}  {value:6d} ns of CPU per packet" + ("" if name == "bare" else " more than bare"))
    if bulk := result["bulk"]:
        click.echo(f"{'bulk':>16}  {bulk['ratio']:6.3f} of {bulk['bare_gbps']:.1f} Gbit/s")
    for name in ("read", "read_by_pyroute2"):
        read = result[name]
        took = f"{read['wall_ms']:6d} ms, {read['cpu_ms']} ms of CPU and at most {read['peak_mb']} MB"
        click.echo(f"{name:>16}  {took} for {read['flows']} flows")
    click.echo(f"{'apply':>16}  {result['apply_ms']:6.1f} ms for new thresholds with so many flows")


def measure(rounds: int, flows: int, seconds: int) -> dict[str, Any]:
    """All figures; the process is in a network namespace of its own afterwards.

    Raises:
        KernelError: no right to make one, or no netfilter.
    """
    net.enter_own_namespace()
    bulk = _bulk(rounds, seconds) if shutil.which("iperf3") else None
    _make_sink()
    per_packet = _per_packet(rounds)
    return {"ns_per_packet": per_packet, "bulk": bulk, **_read(rounds, flows)}


def _settings() -> Any:
    from fabricpilot.levels import default_dscp, default_thresholds
    from hostagent.datapath.base import Settings

    return Settings(default_thresholds(4), default_dscp(4), (0xFAB0001, 0xFAB0002, 0xFAB0003, 0xFAB0004))


def _attached(interface: str, flow_entries: int = 131_072) -> Any:
    from hostagent.datapath.nftables import NftablesDatapath

    datapath = NftablesDatapath(flow_entries, 30.0)
    datapath.attach(interface)
    datapath.apply(_settings())
    return datapath


def _make_sink() -> None:
    """An interface that drops what is sent; an ifb does where nothing was redirected to it."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        ipr.link("add", ifname="sink", kind="ifb")
        index = ipr.link_lookup(ifname="sink")[0]
        ipr.addr("add", index=index, address=net.OURS, prefixlen=16)
        ipr.link("set", index=index, state="up")


def _per_packet(rounds: int) -> dict[str, int]:
    from hostagent.datapath.nft_library import Nft

    nft = Nft()

    def with_rules(rules: str) -> Callable[[], Callable[[], None]]:
        def install() -> Callable[[], None]:
            nft.run(rules, "installing rules to compare with")
            return lambda: nft.run("delete table inet bench", "removing them")

        return install

    def with_datapath() -> Callable[[], None]:
        datapath = _attached("sink")

        def remove() -> None:
            datapath.detach()
            datapath.close()

        return remove

    cases: dict[str, Callable[[], Callable[[], None]]] = {
        "bare": lambda: lambda: None,
        "conntrack": with_rules(_CONNTRACK_ALONE),
        "plain_rules": with_rules(PLAIN_RULES),
        "datapath": with_datapath,
    }
    fastest = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for name, install in cases.items():
            remove = install()
            fastest[name] = min(fastest[name], _send_ns())
            remove()
    return {name: round(ns - (0 if name == "bare" else fastest["bare"])) for name, ns in fastest.items()}


def _send_ns() -> float:
    """CPU nanoseconds of this process per datagram sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.connect((net.THEIRS, 9))
        send = sending.send
        begin = time.process_time_ns()
        for _ in range(_PACKETS_PER_ROUND):
            send(_DATAGRAM)
        return (time.process_time_ns() - begin) / _PACKETS_PER_ROUND


def _read(rounds: int, flows: int) -> dict[str, Any]:
    from dataclasses import replace

    from fabricpilot.levels import Thresholds

    datapath = _attached("sink")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        for number in range(flows):
            sending.sendto(b"x", (f"10.7.1.{1 + number // 250 % 250}", 1000 + number % 250 + number // 62_500 * 250))
    read = _fastest(lambda: len(datapath.flows()), rounds)
    by_pyroute2 = _fastest(_dump_by_pyroute2, 1)
    began = time.perf_counter()
    datapath.apply(replace(_settings(), thresholds=Thresholds((1, 2, 3))))
    apply_ms = (time.perf_counter() - began) * 1000
    datapath.detach()
    datapath.close()
    return {"read": read, "read_by_pyroute2": by_pyroute2, "apply_ms": round(apply_ms, 1)}


def _fastest(read: Callable[[], int], rounds: int) -> dict[str, int]:
    wall, cpu = [], []
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    for _ in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        flows = read()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    peak_mb = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
    return {"flows": flows, "wall_ms": round(min(wall) * 1e3), "cpu_ms": round(min(cpu) * 1e3), "peak_mb": peak_mb}


def _dump_by_pyroute2() -> int:
    """Its dump alone, no attribute looked at: without the flow sets that tell which entries are ours."""
    from pyroute2 import NFCTSocket

    with NFCTSocket() as conntrack:
        return sum(1 for _ in conntrack.dump())


def _bulk(rounds: int, seconds: int) -> dict[str, float]:
    with net.wire():
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for scheduled, found in rates.items():
                datapath = _attached(net.INTERFACE) if scheduled else None
                found.append(net.bulk_gbps(seconds))
                if datapath is not None:
                    datapath.detach()
                    datapath.close()
    bare, scheduled_rate = statistics.median(rates[False]), statistics.median(rates[True])
    return {"bare_gbps": bare, "datapath_gbps": scheduled_rate, "ratio": round(scheduled_rate / bare, 3)}


if __name__ == "__main__":
    netfilter()
