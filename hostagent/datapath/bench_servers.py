"""Servers as people run them, for `bench dataplane`: what they answer over the wire with each variant in the way.

    nginx   wrk on eight connections, files of 120 KB        requests per second
    redis   redis-benchmark on eight connections, GETs of 4 KB

The servers are in this namespace, so it is their answers that are scheduled; the clients are at the other end. What is
not installed is left out.
"""

import contextlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from fabricpilot.errors import KernelError
from hostagent.datapath import bench_wire as net

_HTTP_PORT: Final = 8080
_REDIS_PORT: Final = 6379
_FILE_BYTES: Final = 120_000
_GETS: Final = 10_000
_READY_S: Final = 10.0
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@contextlib.contextmanager
def servers(there: str) -> Iterator[dict[str, Callable[[], float]]]:
    """Serve until the block ends; yields one function per server, which returns answers per second.

    Args:
        there: network namespace of the clients.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabricpilot-bench-")))
        rates: dict[str, Callable[[], float]] = {}
        if _installed("nginx", "wrk"):
            stack.enter_context(_serving(there, _HTTP_PORT, *_nginx(directory)))
            rates["nginx"] = lambda: _wrk(there)
        if _installed("redis-server", "redis-benchmark"):
            stack.enter_context(_serving(there, _REDIS_PORT, *_redis(directory)))
            _redis_benchmark(there, "set", 100)  # what is got
            rates["redis"] = lambda: _redis_benchmark(there)
        yield rates


def _installed(*tools: str) -> bool:
    return all(shutil.which(tool, path=_PATH) for tool in tools)


def _nginx(directory: Path) -> list[str]:
    (directory / "file").write_bytes(bytes(_FILE_BYTES))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    configuration = directory / "nginx.conf"
    configuration.write_text(
        f"user root; daemon off; master_process off; pid {directory}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; sendfile on; keepalive_requests 100000000; {temporary}\n"
        f"server {{ listen {net.OURS}:{_HTTP_PORT}; root {directory}; }} }}\n",
        encoding="utf-8",
    )
    return ["nginx", "-p", str(directory), "-c", str(configuration), "-e", "stderr"]


def _redis(directory: Path) -> list[str]:
    network = ("--bind", net.OURS, "--port", str(_REDIS_PORT), "--protected-mode", "no")
    return ["redis-server", *network, "--save", "", "--appendonly", "no", "--dir", str(directory)]


@contextlib.contextmanager
def _serving(there: str, port: int, *command: str) -> Iterator[None]:
    process = subprocess.Popen(command, env={"PATH": _PATH}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + _READY_S
        while True:
            with contextlib.suppress(OSError), net.inside(there), socket.create_connection((net.OURS, port), 1):
                break
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                said = process.communicate()[1].decode(errors="replace").strip().splitlines()
                raise KernelError(f"{command[0]} does not serve: {said[-1] if said else 'it says nothing'}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.communicate(timeout=_READY_S)


def _client(there: str, *command: str) -> str:
    inside = ["nsenter", f"--net={there}", *command]
    return subprocess.run(inside, env={"PATH": _PATH}, capture_output=True, text=True, check=True, timeout=60).stdout


def _wrk(there: str) -> float:
    url = f"http://{net.OURS}:{_HTTP_PORT}/file"
    said = _client(there, "wrk", "--threads", "1", "--connections", "8", "--duration", "1s", url)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if rate is None or "Non-2xx" in said:
        raise KernelError(f"wrk found no answers: {said.strip().splitlines()[-1]}")
    return float(rate[1])


def _redis_benchmark(there: str, command: str = "get", requests: int = _GETS) -> float:
    address = ("-h", net.OURS, "-p", str(_REDIS_PORT))
    load = ("-c", "8", "-n", str(requests), "-d", "4000", "-t", command, "--csv")
    said = _client(there, "redis-benchmark", *address, *load).replace('"', "").splitlines()
    return next(float(line.split(",")[1]) for line in said if line.startswith(command.upper()))
