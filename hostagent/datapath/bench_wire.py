"""A veth pair for the benchmarks: this process in a network namespace of its own, a server in another behind the wire.

The server answers with iperf3, with an echo of whatever a TCP connection sends, and with nothing to anything else.
Everything ends with the process.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from fabricpilot.errors import KernelError

INTERFACE: Final = "bench0"
OURS, THEIRS = "10.7.0.1", "10.7.0.2"
ECHO_PORT: Final = 7
SINK_PORT: Final = 9
_CLONE_NEWNET: Final = 0x40000000
_READY_S: Final = 10.0

_SERVER: Final = f"""
import ctypes, signal, socket, subprocess, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark, which ends this by closing its input
assert ctypes.CDLL(None).unshare({_CLONE_NEWNET}) == 0
print(flush=True)
sys.stdin.readline()
iperf = subprocess.Popen(["iperf3", "-s"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(flush=True)
def serve(port, answer):
    with socket.create_server(("", port)) as listener:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                while data := connection.recv(1 << 16):
                    if answer:
                        connection.sendall(data)
for port, answer in (({ECHO_PORT}, True), ({SINK_PORT}, False)):
    threading.Thread(target=serve, args=(port, answer), daemon=True).start()
sys.stdin.readline()
iperf.kill()
"""


def enter_own_namespace() -> None:
    """Put this process into a new network namespace, for good.

    Raises:
        KernelError: no right to make one.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise KernelError(f"no new network namespace: {os.strerror(ctypes.get_errno())}; run it as root")


@contextmanager
def wire() -> Iterator[str]:
    """A veth device INTERFACE in this namespace, the server at its other end; yields the path of the server's."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdout.readline()
        there = f"/proc/{server.pid}/ns/net"
        with IPRoute() as ours:
            ours.link("add", ifname=INTERFACE, kind="veth", peer={"ifname": INTERFACE, "net_ns_fd": there})
        with IPRoute() as ours, IPRoute(netns=there) as theirs:
            for ipr, address in ((ours, OURS), (theirs, THEIRS)):
                index = ipr.link_lookup(ifname=INTERFACE)[0]
                ipr.addr("add", index=index, address=address, prefixlen=24)
                ipr.link("set", index=index, state="up")
        server.stdin.write(b"\n")
        server.stdin.flush()
        server.stdout.readline()
        for port in (ECHO_PORT, SINK_PORT):
            connected(port).close()
        yield there
    finally:
        # Its namespace would take the pair along, but some time after its end, and others may use the addresses next.
        with suppress(NetlinkError), IPRoute() as ours:
            ours.link("del", ifname=INTERFACE)
        server.stdin.close()  # it ends, iperf3 with it
        try:
            server.wait(_READY_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in another network namespace: sockets made meanwhile are there for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    other = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(other, _CLONE_NEWNET) != 0:
            raise KernelError(f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            assert libc.setns(home, _CLONE_NEWNET) == 0
    finally:
        os.close(home)
        os.close(other)


def connected(port: int) -> socket.socket:
    """A TCP connection to the server, which sends at once what is written; waits until somebody listens."""
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            connection = socket.create_connection((THEIRS, port), timeout=_READY_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def bulk_gbps(seconds: int) -> float:
    """What one iperf3 connection sends to the server."""
    command = ["iperf3", "-c", THEIRS, "-t", str(seconds), "-J"]
    deadline = time.monotonic() + _READY_S
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 20)
        said = json.loads(done.stdout)
        if sent := said.get("end", {}).get("sum_sent"):
            return float(sent["bits_per_second"]) / 1e9
        if time.monotonic() > deadline:  # until then its server may be about to start, or to end the one before
            raise KernelError(f"iperf3 cannot measure: {said.get('error', done.stderr)}")
        time.sleep(0.05)
