"""`fabricpilot bench central`: from "this flow is long" in the kernel to its verdict in the kernel's map, and back.

A real kernel, agent and central in namespaces with an encrypted link between them. Many flows are made long and kept
going; then further ones become long one after the other, each at a time of its own, while reports and renewals of all
the others go on. The kernel stamps the event; the agent takes the time when the verdict is in the map, so nothing of
the way is left out. Flows are UDP with tiny thresholds: what is measured is the path, not the traffic.
"""

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from testbed.netns.programs import Program, Programs
    from testbed.netns.star import StarPlan

_FABRICPILOT = (sys.executable, "-c", "from fabricpilot.cli import main; main()")
_PORT = 5555
_FIRST_PORT = 10_000  # destination ports: one flow each
_PACKETS = 4  # of 1,000 bytes make a flow long
_THRESHOLDS = [1000, 2000, 3000]
_START_S = 30.0
_KEEP_ALIVE_S = 5.0  # every flow sends so often
_ROUNDS = 50  # of the inference alone


@click.command()
@click.option("--flows", default=1000, show_default=True, type=click.IntRange(1, 20_000), help="Active long flows.")
@click.option("--samples", default=1024, show_default=True, type=click.IntRange(1024, 10_000), help="Flows measured.")
@click.option("--gap-ms", default=15.0, show_default=True, help="Mean time between two of them.")
@click.option("--scheme", default="shortest-first", show_default=True, help="As long_flows.scheme.")
@json_option
def central(flows: int, samples: int, gap_ms: float, scheme: str, as_json: bool) -> None:
    """Time from "flow became long" to its verdict in the kernel, with real daemons; needs root."""
    result = measure(flows, samples, gap_ms, scheme)
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        click.echo(f"{name}: {value}")


def measure(flows: int, samples: int, gap_ms: float, scheme: str) -> dict[str, Any]:
    """All figures.

    Raises:
        KernelError: not root, or the kernel lacks something.
        FabricpilotError: a daemon did not start or did not follow.
    """
    from central.worker import one_blas_thread

    one_blas_thread()  # as where the scheme runs in central
    from testbed.netns.programs import Programs
    from testbed.netns.registry import Run
    from testbed.netns.star import StarPlan

    run = Run.create()
    star, programs = StarPlan(run, 1), Programs(run, run.dir / "log")
    try:
        star.build()
        central_run, agent_run = _start(star, programs, scheme)
        return {
            "flows": flows,
            "samples": samples,
            "scheme": scheme,
            **_latencies(star, central_run, agent_run, flows, samples, gap_ms),
            "inference_ms": _inference_ms(scheme, flows),
        }
    finally:
        programs.stop_all()
        run.remove()


def _start(star: "StarPlan", programs: "Programs", scheme: str) -> tuple[Path, Path]:
    """Start both daemons; returns the control sockets of central and agent."""
    run, host = star.run, star.sender_hosts[0]
    keys, bpffs = run.dir / "keys", run.dir / "bpf"
    programs.run_in(star.controller, [*_FABRICPILOT, "central", "keys", "--out", str(keys), "--host", host.name])
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(bpffs)], check=True)
    central: dict[str, dict[str, Any]] = {
        "central": {"run_dir": str(run.dir)},
        "link": {
            "listen": f"tcp://{star.controller_address}:{_PORT}",
            "key": str(keys / "central.key_secret"),
            "authorized_keys": str(keys / "hosts"),
        },
        "policy": {"scheme": "mlfq", "thresholds": _THRESHOLDS},
        "long_flows": {"scheme": scheme},
    }
    agent: dict[str, dict[str, Any]] = {
        "host": {"interfaces": ["eth0"], "name": host.name, "run_dir": str(run.dir / host.name)},
        "datapath": {
            "pin_dir": str(bpffs / host.name),
            "thresholds": _THRESHOLDS,
            "blind_message_gap_ms": 600_000,  # a flow is one message, however seldom it sends
        },
        "queues": {"kind": "none"},
        "link": {
            "endpoint": f"tcp://{star.controller_address}:{_PORT}",
            "key": str(keys / "hosts" / f"{host.name}.key_secret"),
            "central_key": str(keys / "central.key"),
        },
    }
    running = []
    for name, namespace, tables in (("central", star.controller, central), ("agent", host.namespace, agent)):
        config = run.dir / f"{name}.toml"
        config.write_text("".join(_toml(table, values) for table, values in tables.items()))
        running.append(programs.start(name, namespace, [*_FABRICPILOT, name, "run", "--config", str(config)]))
    sockets = run.dir / "central.sock", run.dir / host.name / "agent.sock"
    _await(running[0], sockets[0], lambda told: bool(told))
    _await(running[1], sockets[1], lambda told: bool(told["link"]["connected"]))
    return sockets


def _latencies(star: "StarPlan", central: Path, agent: Path, flows: int, samples: int, gap_ms: float) -> dict[str, Any]:
    import numpy as np

    from fabricpilot.control import ask
    from fabricpilot.errors import FabricpilotError
    from testbed.netns.enter import call_in

    rng = np.random.default_rng(1)
    with ExitStack() as stack:
        udp = stack.enter_context(
            call_in(star.sender_hosts[0].namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        )

        def send(flow: int, packets: int) -> None:
            for _ in range(packets):
                udp.sendto(bytes(1000), (star.receiver.address, _FIRST_PORT + flow))

        for flow in range(flows):
            send(flow, _PACKETS)
            if flow % 20 == 19:
                time.sleep(0.02)
        until = time.monotonic() + _START_S
        while ask(central, "status")["long_flows"]["flows"] < flows:
            if time.monotonic() > until:
                known = ask(central, "status")["long_flows"]
                raise FabricpilotError(f"central knows {known['flows']} of {flows} long flows; see {star.run.dir}/log")
            time.sleep(0.2)
        time.sleep(2.0)
        before = ask(agent, "status")["long_flows"]["verdicts"]
        began, alive = time.monotonic(), 0.0
        for sample in range(samples):
            send(flows + sample, _PACKETS)
            # The others go on: each sends a packet every few seconds, spread over time.
            due = (time.monotonic() - began) / _KEEP_ALIVE_S * flows
            for flow in range(int(alive), int(due)):
                send(flow % flows, 1)
            alive = due
            time.sleep(float(rng.exponential(gap_ms / 1e3)))
        time.sleep(1.0)
        told, scheduler = ask(agent, "status"), ask(central, "status")["long_flows"]
        latency = told["long_flows"]["verdict_latency_ms"]
        measured = told["long_flows"]["verdicts"] - before
        if measured < samples:
            raise FabricpilotError(f"{samples - measured} of {samples} flows got no verdict; see {star.run.dir}/log")
        return {
            "verdict_latency_ms": {"p50": latency["p50"], "p99": latency["p99"]},
            "measured": measured,
            "active_flows": scheduler["flows"],
            "scheduler_ms": {"inference": scheduler["inference_ms"], "round": scheduler["round_ms"]},
            "long_untold": told["datapath"]["counters"]["long_untold"],
        }


def _inference_ms(scheme: str, flows: int) -> dict[str, float]:
    """The scheme alone, deciding on so many flows of 64 hosts in 8 racks with 4 routes at once."""
    import numpy as np

    from central.lrla.process import scheme_of
    from central.lrla.synthetic import random_flows
    from fabricpilot.config import LongFlowsSection

    chooser = scheme_of(LongFlowsSection(scheme=scheme))  # type: ignore[arg-type]
    known, asked = random_flows(flows, np.random.default_rng(1)), np.arange(flows)
    chooser.decide(known, asked)  # compiles, loads
    taken = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        chooser.decide(known, asked)
        taken.append((time.perf_counter() - began) * 1e3)
    return {"p50": round(float(np.percentile(taken, 50)), 3), "p99": round(float(np.percentile(taken, 99)), 3)}


def _await(program: "Program", control: Path, good: Any) -> None:
    from fabricpilot.control import ask
    from fabricpilot.errors import FabricpilotError

    until = time.monotonic() + _START_S
    while time.monotonic() < until and program.alive:
        try:
            if good(ask(control, "status")):
                return
        except FabricpilotError:
            pass
        time.sleep(0.1)
    said = program.log.read_text(errors="replace").strip().splitlines()
    raise FabricpilotError(f"{program.name} is not ready: {said[-1] if said else 'it said nothing'}")


def _toml(table: str, values: dict[str, Any]) -> str:
    return f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
