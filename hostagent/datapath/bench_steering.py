"""`fabricpilot bench steering`: what rules, verdicts and routes add to a packet of the data path.

Like bench.py: BPF_PROG_TEST_RUN on one frame in a hot cache, cases interleaved, the fastest round of each, net of an
empty program. Every case has the mark right already, so that what is compared is the decision. "unknown" is an
acknowledgement of a flow that has no entry: the only kind of packet for which rules are evaluated each time.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Case = tuple[Callable[[], None], bytes]  # what to set up, the frame to repeat


@click.command()
@click.option("--repeat", default=500_000, show_default=True, type=click.IntRange(1000), help="Runs per figure.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds; the fastest counts.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def steering(repeat: int, rounds: int, as_json: bool) -> None:
    """Cost per packet of rules, verdicts and routes, net of an empty program."""
    result = measure(repeat, rounds)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result["ns_per_packet"].items():
        click.echo(f"{name:>28}  {value:4d} ns per packet")
    click.echo(f"{'set 64 rules':>28}  {result['set_rules_ms']:6.1f} ms for {result['prefixes']} prefixes")
    click.echo(f"{'512 verdicts':>28}  {result['add_verdicts_ms']:6.1f} ms")


def measure(repeat: int, rounds: int) -> dict[str, Any]:
    """All figures.

    Raises:
        KernelError: there is no bpf(2) or no bcc here.
    """
    import time

    import numpy as np

    from fabricpilot.config import Rule
    from fabricpilot.wire import FlowVerdict
    from hostagent.datapath import bpf_syscall as bpf
    from hostagent.datapath.bench_settings import settings
    from hostagent.datapath.bench_visit import ACK, DATA, SYN
    from hostagent.datapath.ebpf import EbpfDatapath
    from hostagent.datapath.rules import compile_rules, parse_rules
    from hostagent.datapath.steering import ROUTE_DTYPE, ROUTE_IPV4, Steering

    datapath = EbpfDatapath(Path(f"/sys/fs/bpf/fabricpilot-bench-{os.getpid()}"), 131_072)
    try:
        datapath.apply(settings())
        control = Steering(datapath)
        program = bpf.obj_get(datapath.pin_dir / "egress")
        empty = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC)

        def ruled(rules: list[Rule]) -> Callable[[], None]:
            parsed = parse_rules(rules, 8, range(32))
            compiled = compile_rules(parsed, [None] * len(parsed))

            def set_up() -> None:
                control.clear()
                control.set_rules(compiled, len(parsed))

            return set_up

        def with_verdict(route: int) -> Callable[[], None]:
            def set_up() -> None:
                control.clear()
                control.set_routes({1: hop}, 0)
                control.use_routes([1], 3600)
                control.add_verdicts([FlowVerdict("10.0.0.1", "10.0.0.2", 40000, 80, 6, 3, route, 3600.0)])

            return set_up

        hop = np.zeros((), ROUTE_DTYPE)
        hop["interface"], hop["flags"], hop["next_hop_ipv4"] = 1, ROUTE_IPV4, (10, 0, 0, 9)
        # Networks the flow is not in, but close to; two dimensions, ports and networks.
        many = [
            Rule(
                action="pin",
                level=1,
                destination=[f"10.{i}.{j}.0/24" for j in range(1, 101)],
                destination_port=[f"{1000 + i}-{2000 + i}"],
            )
            for i in range(64)
        ]
        other = bytearray(ACK)
        other[34:36] = b"\x9c\x41"  # another source port: a flow that has no entry
        unknown = bytes(other)
        cases: dict[str, Case] = {
            "hit, no rules": (control.clear, DATA),
            "hit, 64 rules, none matches": (ruled(many), DATA),
            "hit, pinned": (ruled([Rule(action="pin", level=3)]), DATA),
            "hit, verdict": (with_verdict(0), DATA),
            "hit, verdict with route": (with_verdict(1), DATA),
            "unknown, no rules": (control.clear, unknown),
            "unknown, 1 rule, protocol": (ruled([Rule(action="observe", protocol="udp")]), unknown),
            "unknown, 1 rule, network": (ruled([Rule(action="observe", destination=["10.9.0.0/16"])]), unknown),
            "unknown, 64 rules": (ruled(many), unknown),
        }
        bpf.prog_test_run(program, SYN)
        taken: dict[str, list[int]] = {name: [] for name in ("empty", *cases)}
        for _ in range(rounds):
            taken["empty"].append(bpf.prog_test_run(empty, DATA, repeat=repeat)[3])
            for name, (set_up, frame) in cases.items():
                set_up()
                settled = bpf.prog_test_run(program, frame, repeat=1000)[1]
                taken[name].append(bpf.prog_test_run(program, settled, repeat=repeat)[3])
        best = {name: min(values) for name, values in taken.items()}
        began = time.monotonic()
        ruled(many)()
        set_rules_ms = (time.monotonic() - began) * 1e3
        verdicts = [FlowVerdict("10.0.0.1", "10.0.0.2", port, 80, 6, 3, 0, 60.0) for port in range(1, 513)]
        began = time.monotonic()
        control.add_verdicts(verdicts)
        add_verdicts_ms = (time.monotonic() - began) * 1e3
        os.close(program)
        os.close(empty)
        return {
            "ns_per_packet": {n: v - (0 if n == "empty" else best["empty"]) for n, v in best.items()},
            "prefixes": sum(len(rule.destination) for rule in many),
            "set_rules_ms": round(set_rules_ms, 1),
            "add_verdicts_ms": round(add_verdicts_ms, 1),
            "repeat": repeat,
            "rounds": rounds,
        }
    finally:
        datapath.detach()
        datapath.close()


if __name__ == "__main__":
    steering()
