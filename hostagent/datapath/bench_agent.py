"""`fabricpilot bench agent`: what the agent itself costs a host.

    load_s           compile, load and pin the data path (the loader child)
    read_s           reading a table of a million flows, by a fresh process that adopts it; read_cpu_s: of CPU
    agent_rss_mb     resident memory of a running agent under the load below; peak_rss_mb: its highest
    agent_cpu        share of one core that it takes while 1,000 flows a second begin

The agent is the real one, started as a process in a network namespace of its own, its NIC a veth pair. Flows are UDP
sockets that send two datagrams each.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from hostagent.datapath import bench_wire as net

_START_S: Final = 90.0
_TICK: Final = 0.01  # flows begin in bunches, this often


@click.command()
@click.option("--flows", default=1 << 20, show_default=True, type=click.IntRange(1024), help="Flows in the table read.")
@click.option("--rate", default=1000, show_default=True, type=click.IntRange(1), help="New flows a second.")
@click.option("--seconds", default=20, show_default=True, type=click.IntRange(2), help="How long they come.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def agent(flows: int, rate: int, seconds: int, as_json: bool) -> None:
    """Memory and CPU of a running agent, time to read a large flow table, time to load."""
    result = measure(flows, rate, seconds)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"load   {result['load_s']:7.2f} s to compile, load and pin")
    click.echo(
        f"read   {result['read_s']:7.3f} s, {result['read_cpu_s']:.3f} s of CPU, for {result['flows_read']} flows"
    )
    click.echo(f"memory {result['agent_rss_mb']:7.1f} MB resident, {result['peak_rss_mb']:.1f} MB at most")
    click.echo(f"CPU    {result['agent_cpu']:7.2%} of a core at {result['flows_per_s']:.0f} new flows a second")


def measure(flows: int, rate: int, seconds: int) -> dict[str, Any]:
    """All figures; the process is in a network namespace of its own afterwards.

    Args:
        flows: in the table read; rounded down to a power of two.
        rate: new flows a second.
        seconds: how long they come.

    Raises:
        KernelError: no right to make a network namespace, no bpf(2) or no bcc here.
    """
    net.enter_own_namespace()
    return {**_large_table(1 << flows.bit_length() - 1), **_under_load(rate, seconds)}


def _large_table(flows: int) -> dict[str, Any]:
    from hostagent.datapath import bpf_syscall as bpf
    from hostagent.datapath.bench_settings import ROOM, settings
    from hostagent.datapath.bench_visit import SYN, Visitor
    from hostagent.datapath.ebpf import EbpfDatapath

    entries = int(flows * ROOM)
    datapath = EbpfDatapath(Path(f"/sys/fs/bpf/fabricpilot-bench-{os.getpid()}"), entries)
    try:
        began = time.monotonic()
        datapath.apply(settings())
        load_s = time.monotonic() - began
        program = bpf.obj_get(datapath.pin_dir / "egress")
        with Visitor() as visitor:
            visitor.visit(program, SYN, flows, flows)
        os.close(program)
        read = (
            "import json, time\n"
            "from pathlib import Path\n"
            "from hostagent.datapath.ebpf import EbpfDatapath\n"
            f"datapath = EbpfDatapath(Path({str(datapath.pin_dir)!r}), {entries})\n"
            "taken = []\n"
            "for _ in range(3):\n"
            "    began = time.monotonic(), time.process_time()\n"
            "    found = len(datapath.flows())\n"
            "    taken.append((time.monotonic() - began[0], time.process_time() - began[1]))\n"
            "read_s, read_cpu_s = (round(min(each), 3) for each in zip(*taken))\n"
            "print(json.dumps({'flows_read': found, 'read_s': read_s, 'read_cpu_s': read_cpu_s}))\n"
        )
        child = subprocess.run(_python("-c", read), env=_environment(), capture_output=True, text=True, check=True)
        figures: dict[str, Any] = json.loads(child.stdout)
        return {"load_s": round(load_s, 2), **figures}
    finally:
        datapath.detach()
        datapath.close()


def _under_load(rate: int, seconds: int) -> dict[str, Any]:
    with net.wire(), _running_agent() as pid:
        _send_flows(rate, 2)  # the first ones make it allocate what it keeps
        began, began_cpu = time.monotonic(), _cpu_s(pid)
        sent = _send_flows(rate, seconds)
        taken_s = time.monotonic() - began
        return {
            "agent_cpu": round((_cpu_s(pid) - began_cpu) / taken_s, 4),
            "flows_per_s": round(sent / taken_s, 1),
            "agent_rss_mb": _status_mb(pid, "VmRSS"),
            "peak_rss_mb": _status_mb(pid, "VmHWM"),
        }


@contextmanager
def _running_agent() -> Iterator[int]:
    """Process id of an agent that schedules the wire's NIC."""
    pins = Path(f"/sys/fs/bpf/fabricpilot-agent-{os.getpid()}")
    with tempfile.TemporaryDirectory() as directory:
        options = ["--pin-dir", str(pins), "--set", f"host.run_dir={directory}", "-i", net.INTERFACE]
        options += ["--link-rate", "10Gbit", "--detach-on-exit"]
        agent = subprocess.Popen(
            _python("-c", "from fabricpilot.cli import main; main()", "agent", "run", *options),
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the benchmark, which ends the agent and lets it detach in peace
        )
        try:
            deadline = time.monotonic() + _START_S
            while not (pins / "flows").exists() or not any(Path(directory).iterdir()):
                if agent.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the agent did not start; `fabricpilot agent check` says why")
                time.sleep(0.1)
            time.sleep(3)
            yield agent.pid
        finally:
            agent.terminate()
            agent.wait(30)


def _send_flows(rate: int, seconds: float) -> int:
    """Begin `rate` UDP flows a second; how many there were."""
    bunch = max(1, round(rate * _TICK))
    began = time.monotonic()
    sent = 0
    while time.monotonic() - began < seconds:
        for _ in range(bunch):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
                for _ in range(2):
                    sending.sendto(bytes(100), (net.THEIRS, net.SINK_PORT))
            sent += 1
        due = began + sent / rate - time.monotonic()
        if due > 0:
            time.sleep(due)
    return sent


def _cpu_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _status_mb(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024, 1)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-P", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


if __name__ == "__main__":
    agent()
