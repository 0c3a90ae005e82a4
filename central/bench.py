"""`fabricpilot bench link`: what a report costs on the wire and at central, with the real daemon as a process.

Many hosts of this process report over CURVE on loopback to one `central run`; its CPU time and memory are read from
/proc before and after, so every part of it counts: decryption, decoding, registry, answers.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabricpilot.errors import FabricpilotError
from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from fabricpilot.wire import Report

# Finished and long flows of one report.
_SHAPES = {"idle": (0, 0), "light": (10, 5), "busy": (400, 50), "largest": (2000, 256)}
_WORKLOAD = "websearch_bytes_hpcc"


@click.command()
@click.option("--hosts", default=200, show_default=True, help="How many hosts report.")
@click.option("--seconds", default=10.0, show_default=True, help="How long, at one report per second and host.")
@click.option("--shape", type=click.Choice(list(_SHAPES)), default="busy", show_default=True, help="What they report.")
@json_option
def link(hosts: int, seconds: float, shape: str, as_json: bool) -> None:
    """Measure the size of reports, and what each costs central in CPU time."""
    result = {
        "report_bytes": {name: len(_frame(name)) for name in _SHAPES},
        "kbit_per_s_at_1_hz": {name: round(len(_frame(name)) * 8 / 1000, 2) for name in _SHAPES},
        "hosts": hosts,
        "shape": shape,
        **_central_costs(hosts, seconds, shape),
    }
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        click.echo(f"{name}: {value}")


def _frame(shape: str) -> bytes:
    from fabricpilot.wire import encode

    return encode(_report("host-0001", shape, 1))


def _report(host: str, shape: str, sequence: int) -> "Report":
    import numpy as np

    from fabricpilot.histogram import LogHistogram
    from fabricpilot.wire import MAX_FINISHED_SAMPLE, FlowSummary, Report
    from simulator.workloads.distribution import SizeDistribution

    finished, long = _SHAPES[shape]
    rng = np.random.default_rng(1)
    sizes = SizeDistribution.load(_WORKLOAD).sample(rng, max(finished, 1))[:finished]
    durations = sizes // 1000 + 250

    def flow(size: int) -> FlowSummary:
        port = int(rng.integers(32768, 60999))
        return FlowSummary("10.132.17.201", "10.132.44.117", port, 5001, 6, size, size // 1000 + 250, 2)

    return Report(
        host=host,
        sequence=sequence,
        interval_ns=1_000_412_337,
        epoch=int(time.time() * 1000),
        sent_bytes=int(sizes.sum()) + 10**7 * long,
        sizes=LogHistogram.of(sizes).sparse(),
        durations=LogHistogram.of(durations).sparse(),
        finished=finished,
        finished_sample=[flow(int(size)) for size in sizes[:MAX_FINISHED_SAMPLE]],
        long=long,
        long_flows=[flow(10**7 + n * 10**5) for n in range(long)],
        active=5 * finished,
        counters={f"{what}_level_{level}": 10**9 for what in ("bytes", "packets") for level in range(4)},
    )


def _central_costs(hosts: int, seconds: float, shape: str) -> dict[str, Any]:
    """CPU microseconds of central per report, and KiB of memory per host."""
    from fabricpilot.control import ask

    names = [f"host-{n:04d}" for n in range(hosts)]
    with tempfile.TemporaryDirectory(prefix="fabricpilot-bench-") as folder, ExitStack() as stack:
        site = Path(folder)
        _make_keys(site, names)
        central = stack.enter_context(_running_central(site))
        control = site / "central.sock"
        before_kib = _memory_kib(central.pid)
        endpoint = ask(control, "status")["endpoint"]
        fleet = stack.enter_context(_Fleet(site, endpoint, names, shape))
        fleet.report(2.0)  # handshakes and first decisions are not counted
        told, cpu_s, begin = ask(control, "status"), _cpu_s(central.pid), time.monotonic()
        fleet.report(seconds)
        after = ask(control, "status")
        counted = sum(host["reports"] for host in after["hosts"]) - sum(host["reports"] for host in told["hosts"])
        if counted <= 0:
            raise FabricpilotError("no report reached central; see its messages above")
        return {
            "reports": counted,
            "reports_per_s": round(counted / (time.monotonic() - begin), 1),
            "central_cpu_us_per_report": round((_cpu_s(central.pid) - cpu_s) / counted * 1e6, 1),
            "central_kib_per_host": round((_memory_kib(central.pid) - before_kib) / hosts, 1),
            "missed": sum(host["missed"] for host in after["hosts"]),
        }


def _make_keys(site: Path, names: list[str]) -> None:
    from fabricpilot.keys import plan_pairs, write_pair

    for planned in plan_pairs(site, tuple(names)):
        write_pair(planned)


@contextmanager
def _running_central(site: Path) -> Iterator["subprocess.Popen[bytes]"]:
    arguments = ["--run-dir", str(site), "--listen", "tcp://127.0.0.1:*", "--key", str(site / "central.key_secret")]
    arguments += ["--authorized-keys", str(site / "hosts")]
    command = [sys.executable, "-c", "from fabricpilot.cli import main; main()", "central", "run", *arguments]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as central:
        try:
            end = time.monotonic() + 20
            while not (site / "central.sock").exists() and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(0.5)
            yield central
        finally:
            central.terminate()


class _Fleet:
    """Hosts that say Hello and report once a second, spread over it."""

    def __init__(self, site: Path, endpoint: str, names: list[str], shape: str) -> None:
        import zmq

        from fabricpilot.keys import read_pair, read_public

        self._shape = shape
        self._sequence = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = 2 * len(names) + 64
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        central_key = read_public(site / "central.key", "central_key")
        for name in names:
            pair = read_pair(site / "hosts" / f"{name}.key_secret", "key")
            dealer = self._sockets[name] = self._context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.curve_serverkey = central_key
            dealer.curve_publickey, dealer.curve_secretkey = pair.public, pair.secret
            dealer.connect(endpoint)
            dealer.send(_hello(name))
        self._reports = {name: _report(name, shape, 1) for name in names}

    def __enter__(self) -> "_Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def report(self, seconds: float) -> None:
        """Every host reports once a second for so long."""
        import msgspec
        import zmq

        from fabricpilot.wire import encode

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._sequence += 1
            begin = time.monotonic()
            for n, (name, dealer) in enumerate(self._sockets.items(), 1):
                dealer.send(encode(msgspec.structs.replace(self._reports[name], sequence=self._sequence)))
                while dealer.poll(0):
                    dealer.recv(zmq.NOBLOCK)
                time.sleep(max(0.0, begin + n / len(self._sockets) - time.monotonic()))


def _hello(name: str) -> bytes:
    from fabricpilot.wire import Hello, encode

    return encode(
        Hello(
            host=name,
            group="default",
            levels=4,
            backend="none",
            queues="none",
            link_rate_bps=10**10,
            epoch=0,
            thresholds=[],
            version="bench",
        )
    )


def _cpu_s(pid: int) -> float:
    """User and system time of all threads of a process (not of the policy worker, which is one of its own)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
