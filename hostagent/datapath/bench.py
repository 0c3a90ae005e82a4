"""`fabricpilot bench dataplane`: what the data path costs, per packet and end to end.

Per packet: BPF_PROG_TEST_RUN, net of an empty program reached the same way (bench_visit.py). Cases take turns and the
fastest round of each counts, since whatever else runs on the machine only ever adds.

    hit              one flow, in cache, mark written      insert   a flow's first packet, flow table far from full
    hit_right_mark   the same, mark right already          rule     hit of a flow that a rule pins to a level
    ack, not_ip      no payload; nothing to account        verdict  hit of a flow with a verdict
    tables           hits among 1 k, 128 k and 1 M flows, in the order of their insertion and at random
    random load      one load that waits for the one before, from as much memory as the table of 1 M takes
                     (bench_memory.py): the least that a flow at random costs on this machine
    prototype        a hit of the least that counts and tags (bench_prototype.py), so that machines can be compared;
                     prototype_coarse: the same with the clock of the latest timer tick

End to end: bench_live.py, beside an nftables rule set and a u32 filter. The data path measured is one of its own,
removed at the end.
"""

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import click

_FLOWS: Final = (1 << 10, 1 << 17, 1 << 20)


@click.command()
@click.option("--repeat", default=50_000, show_default=True, type=click.IntRange(1000), help="Packets per figure.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Rounds; the fastest counts.")
@click.option("--flows", default=_FLOWS[-1], show_default=True, type=click.IntRange(1024), help="Largest table.")
@click.option("--seconds", default=2, show_default=True, type=click.IntRange(1), help="Length of a bulk transfer.")
@click.option("--live/--no-live", default=True, show_default=True, help="Also real connections over a veth pair.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def dataplane(repeat: int, rounds: int, flows: int, seconds: int, live: bool, as_json: bool) -> None:
    """Cost per packet net of an empty program, and throughput and latency of real connections."""
    result = measure(repeat, rounds, flows)
    if live:
        from hostagent.datapath.bench_live import measure as measure_live

        alive = measure_live(min(rounds, 9), seconds)
        result["ns_per_packet"] |= alive.pop("ns_per_packet")
        result |= alive
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result["ns_per_packet"].items():
        click.echo(f"{name:>16}  {value:6d} ns per packet" + ("" if name == "empty" else ", net of the empty program"))
    for count, order in result["tables"].items():
        for name, value in order.items():
            click.echo(f"{count + ' ' + name:>16}  {value:6d} ns per packet, {count} flows")
    click.echo(
        f"{'random load':>16}  {result['ns_per_random_load']:6d} ns each, from memory of the largest table's size"
    )
    click.echo(f"{'verifier':>16}  {result['verified_instructions']:6d} instructions walked")
    for variant, value in result.get("ns_per_64_kib", {}).items():
        click.echo(f"{variant:>16}  {value:6d} ns per 64 KiB sent" + ("" if variant == "bare" else " more than bare"))
    for server, ratios in result.get("server_rate_ratio", {}).items():
        for variant, ratio in ratios.items():
            click.echo(f"{variant:>16}  {ratio:6.3f} of the answers of {server} a second")
    for variant in result.get("throughput_ratio", ()):
        click.echo(
            f"{variant:>16}  {result['throughput_ratio'][variant]:6.3f} of the bulk throughput without, "
            f"{result['rr_latency_ratio'][variant]:.3f} of the round-trip time (p50)"
        )


def measure(repeat: int, rounds: int, flows: int) -> dict[str, Any]:
    """Figures of packets through the program alone.

    Args:
        repeat: packets per figure and round.
        rounds: how many, cases taking turns.
        flows: in the largest table; rounded down to a power of two.

    Raises:
        KernelError: there is no bpf(2) or no bcc here.
    """
    from hostagent.datapath import bpf_syscall as bpf
    from hostagent.datapath.bench_memory import random_load_ns
    from hostagent.datapath.bench_prototype import Prototypes
    from hostagent.datapath.bench_settings import ROOM, settings
    from hostagent.datapath.bench_visit import Visitor
    from hostagent.datapath.ebpf import EbpfDatapath

    largest = 1 << flows.bit_length() - 1
    datapath = EbpfDatapath(Path(f"/sys/fs/bpf/fabricpilot-bench-{os.getpid()}"), int(largest * ROOM))
    try:
        datapath.apply(settings())
        program = bpf.obj_get(datapath.pin_dir / "egress")
        try:
            with Visitor() as visitor, closing(Prototypes()) as prototypes:
                paths = _paths(datapath, visitor, program, prototypes.programs, repeat, rounds)
                return {
                    "ns_per_packet": paths,
                    "hit_over_prototype": round(paths["hit"] / paths["prototype"], 2),
                    "tables": {
                        str(count): _table(visitor, program, count, repeat, rounds)
                        for count in sorted({min(count, largest) for count in _FLOWS})
                    },
                    "ns_per_random_load": random_load_ns(int(largest * ROOM), repeat, rounds),
                    "verified_instructions": bpf.prog_verified(program),
                    "repeat": repeat,
                    "rounds": rounds,
                }
        finally:
            os.close(program)
    finally:
        datapath.detach()
        datapath.close()


def _paths(
    datapath: Any, visitor: Any, program: int, prototypes: dict[str, int], repeat: int, rounds: int
) -> dict[str, int]:
    from fabricpilot.config import Rule
    from fabricpilot.wire import FlowVerdict
    from hostagent.datapath import bench_visit as frames
    from hostagent.datapath.bench_settings import settings
    from hostagent.datapath.rules import compile_rules, parse_rules
    from hostagent.datapath.steering import Steering

    control = Steering(datapath)
    levels = settings()
    pinned = parse_rules([Rule(action="pin", level=1)], levels.thresholds.levels, range(32))

    def pin() -> None:
        control.clear()
        control.set_rules(compile_rules(pinned, [None]), len(pinned))

    def decide() -> None:
        control.clear()
        control.add_verdicts([FlowVerdict("10.0.0.0", "10.0.0.2", 40000, 80, 6, 1, 0, 3600.0)])

    def start_afresh() -> None:
        control.clear()
        datapath.forget(datapath.flows().keys)

    inserts = min(repeat, 1 << 16)
    right, wrong = levels.dscp[-1] << 2, levels.dscp[0] << 2  # the flow soon has sent more than the last threshold
    # What to set up, the frame, packets, flows, the type of service they arrive with.
    cases: dict[str, tuple[Callable[[], None], bytes, int, int, int]] = {
        "hit": (control.clear, frames.DATA, repeat, 1, wrong),
        "hit_right_mark": (control.clear, frames.DATA, repeat, 1, right),
        "ack": (control.clear, frames.ACK, repeat, 1, right),
        "not_ip": (control.clear, frames.NOT_IP, repeat, 1, wrong),
        "rule": (pin, frames.DATA, repeat, 1, right),
        "verdict": (decide, frames.DATA, repeat, 1, right),
        "insert": (start_afresh, frames.SYN, inserts, 1 << 20, right),
        **dict.fromkeys(prototypes, (control.clear, frames.DATA, repeat, 1, wrong)),
    }
    taken: dict[str, list[int]] = {name: [] for name in ("empty", *cases)}
    for _ in range(rounds):
        for name, (set_up, frame, packets, flows, tos) in cases.items():
            set_up()
            measured = prototypes.get(name, program)
            if name != "insert":  # the flow's first packets
                visitor.visit(measured, frames.SYN, 1)
                visitor.visit(measured, frames.DATA, 20_000)
            taken["empty"].append(visitor.visit(visitor.empty, frame, packets, flows, tos=tos))
            taken[name].append(visitor.visit(measured, frame, packets, flows, tos=tos))
    start_afresh()
    best = {name: min(values) for name, values in taken.items()}
    return {name: value - (0 if name == "empty" else best["empty"]) for name, value in best.items()}


def _table(visitor: Any, program: int, flows: int, repeat: int, rounds: int) -> dict[str, int]:
    from hostagent.datapath.bench_visit import DATA, SYN

    packets = max(flows, repeat)
    visitor.visit(program, SYN, flows, flows)
    orders = {"in_order": False, "at_random": True}
    net: dict[str, int] = {}
    for name, at_random in orders.items():
        both = [
            tuple(visitor.visit(fd, DATA, packets, flows, at_random=at_random) for fd in (program, visitor.empty))
            for _ in range(min(rounds, 5))
        ]
        net[name] = min(of_program for of_program, _ in both) - min(of_empty for _, of_empty in both)
    return net


if __name__ == "__main__":
    dataplane()
