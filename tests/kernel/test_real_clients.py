"""Servers and clients as people run them, over a scheduled NIC: iperf3, nginx with wrk, redis-benchmark, HTTP, UDP.

The server's namespace is the scheduled one, so what is looked at is its answers. Nothing may fail or be lost, and every
captured packet must carry the DSCP that the bytes before it demand; for TCP an oracle says so that shares no code with
the data path. How much slower it got is printed, as a ratio (pytest -s), and not judged: this is no benchmark.
"""

import contextlib
import re
import shutil
import socket
import struct
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from datapath_kit import in_netns, run
from datapath_wire import (
    ADDRESSES,
    PORT,
    SETTINGS,
    SOURCE_PORT_AT,
    Host,
    captured,
    dscp_at,
    first_time,
    message_at,
    on_one_cpu,
    sunk_datagrams,
    wait_for_gap,
)

from fabricpilot.levels import Thresholds
from hostagent.datapath.base import MessageRule
from testbed.capture.oracle import InForce, Verdict, check
from testbed.capture.packets import read_packets
from testbed.capture.ring import RingCapture

SERVER, CLIENT = ADDRESSES[4]
HTTP_PORT, REDIS_PORT, IPERF_PORT = 8080, 6379, 5201
FILES = {"small": 2_000, "medium": 120_000, "large": 900_000}
RING_PACKETS = 60_000
LOW = replace(SETTINGS, thresholds=Thresholds((5_000, 30_000, 100_000)))  # one medium file goes through all levels


def need(*tools: str) -> None:
    """Skip where a tool is not installed; packaging/setup-debian installs all of them."""
    for tool in tools:
        if shutil.which(tool) is None and shutil.which(tool, path="/usr/sbin") is None:
            pytest.skip(f"needs {tool} (packaging/setup-debian installs it)")


@contextlib.contextmanager
def serving(host: Host, port: int, *command: str) -> Iterator[None]:
    """A server in the scheduled namespace, from when it accepts connections until the block ends."""
    inside = ("nsenter", f"--net=/run/netns/{host.sender}", *command)
    process = subprocess.Popen(inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 10
        while True:
            assert process.poll() is None, process.communicate()[0]
            with contextlib.suppress(OSError), in_netns(host.receiver), socket.create_connection((SERVER, port), 1):
                break
            assert time.monotonic() < until, f"{command[0]} does not answer"
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.communicate(timeout=10)


@contextlib.contextmanager
def nginx(host: Host, directory: Path) -> Iterator[None]:
    """nginx with one file of each size."""
    root = directory / "www"
    root.mkdir()
    for name, size in FILES.items():
        (root / name).write_bytes(bytes(size))
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {directory}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; sendfile on; keepalive_requests 1000000; {temporary}\n"
        f"server {{ listen {SERVER}:{HTTP_PORT}; root {root}; }} }}\n"
    )
    with serving(host, HTTP_PORT, "nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"):
        yield


@contextlib.contextmanager
def unscheduled(host: Host) -> Iterator[None]:
    """The same host without the data path on its NIC, to compare with."""
    with in_netns(host.sender):
        host.datapath.release(["nic0"])
    yield
    with in_netns(host.sender):
        host.datapath.attach("nic0")


@contextlib.contextmanager
def judged(host: Host, directory: Path) -> Iterator[Verdict]:
    """What the oracle says of all that the server sent inside the block, over a line slow enough to capture it."""
    with in_netns(host.sender):
        run("ip", "link", "set", "nic0", "gso_max_segs", "1")
        run("tc", "qdisc", "replace", "dev", "nic0", "root", "tbf", "rate", "60mbit", "burst", "20k", "limit", "20m")
    host.datapath.apply(LOW)
    ring = RingCapture(host.receiver, ("lo",), RING_PACKETS)
    verdict = Verdict()
    yield verdict
    ring.stop()
    ring.save(directory / "capture.pcap")
    missed = ring.missed
    ring.close()
    packets = [seen for seen in read_packets(directory / "capture.pcap") if seen.flow.source == SERVER]
    found = check(packets, {SERVER: [InForce(0, 0, LOW.thresholds)]}, LOW.dscp)
    vars(verdict).update(vars(found))
    assert missed == 0, "the capture lost packets: the test can say nothing"


def assert_all_right(verdict: Verdict) -> None:
    """Every packet was checked and right, and every level was in use."""
    assert verdict.wrong == []
    assert verdict.correct == verdict.checked > 500
    assert verdict.incomplete_flows == verdict.skipped_flows == 0
    assert set(verdict.by_dscp) == set(LOW.dscp)


def wrk(host: Host, name: str) -> float:
    """Requests a second of eight connections; none may fail."""
    url = f"http://{SERVER}:{HTTP_PORT}/{name}"
    said = run("wrk", "--threads", "1", "--connections", "8", "--duration", "1s", url, netns=host.receiver)
    assert "Socket errors" not in said, said
    assert "Non-2xx" not in said, said
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert rate, said
    assert float(rate[1]) > 0
    return float(rate[1])


def test_iperf3(host, tmp_path):
    need("iperf3")
    port = ("--port", str(IPERF_PORT))
    with (
        serving(host, IPERF_PORT, "iperf3", "--server", "--bind", SERVER, *port),
        judged(host, tmp_path) as verdict,
    ):
        bulk = ("--reverse", "--parallel", "2", "--bytes", "4M")  # the server sends
        run("iperf3", "--client", SERVER, *port, *bulk, netns=host.receiver)
    assert_all_right(verdict)


def test_nginx_with_wrk(host, tmp_path):
    need("nginx", "wrk")
    with nginx(host, tmp_path):
        with unscheduled(host):
            before = wrk(host, "medium")
        after = wrk(host, "medium")
        print(f"nginx, 120 KB a request: {after:.0f}/s scheduled, {before:.0f}/s without, ratio {after / before:.2f}")
        with judged(host, tmp_path) as verdict:
            wrk(host, "medium")
    assert_all_right(verdict)


def redis_benchmark(host: Host, requests: int) -> float:
    """GETs and SETs of 4 KB by eight connections; the rate of the GETs."""
    command = ("redis-benchmark", "-h", SERVER, "-p", str(REDIS_PORT), "-c", "8", "-n", str(requests), "-d", "4000")
    said = run(*command, "-t", "set,get", "--csv", netns=host.receiver)
    rates = {line.split(",")[0].strip('"'): float(line.split(",")[1].strip('"')) for line in said.splitlines()[1:]}
    assert set(rates) == {"SET", "GET"}, said  # it ends at the first error
    return rates["GET"]


def test_redis_benchmark(host, tmp_path):
    need("redis-server", "redis-benchmark")
    server = ("redis-server", "--bind", SERVER, "--port", str(REDIS_PORT), "--save", "", "--appendonly", "no")
    with serving(host, REDIS_PORT, *server, "--protected-mode", "no", "--dir", str(tmp_path)):
        with unscheduled(host):
            before = redis_benchmark(host, 10_000)
        after = redis_benchmark(host, 10_000)
        print(f"redis, 4 KB a GET: {after:.0f}/s scheduled, {before:.0f}/s without, ratio {after / before:.2f}")
        with judged(host, tmp_path) as verdict:
            redis_benchmark(host, 2_000)
    assert_all_right(verdict)


def test_each_response_of_a_keep_alive_connection_begins_at_the_top(host, tmp_path):
    need("nginx")
    host.datapath.apply(replace(SETTINGS, messages=MessageRule(gap_ns=300_000_000, starved_ns=0)))
    wanted = ["small", "large", "small", "medium", "large", "medium", "small"]
    with nginx(host, tmp_path), captured(host.receiver) as capture:
        with in_netns(host.receiver):
            connection = socket.create_connection((SERVER, HTTP_PORT), 10)
        with connection, connection.makefile("rb") as answers:
            lengths = []
            for name in wanted:
                connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                head = b"".join(iter(answers.readline, b"\r\n")) + b"\r\n"
                assert head.startswith(b"HTTP/1.1 200 "), head
                assert len(answers.read(FILES[name])) == FILES[name]
                lengths.append(len(head) + FILES[name])
                wait_for_gap(connection, 0.35)
    met = set()
    for place, seen in first_time(capture.packets):
        number, position = message_at(place, lengths)
        assert seen.dscp == dscp_at(position), (wanted[number], position)
        met.add(number)
    assert met == set(range(len(wanted)))
    assert host.datapath.counters()["messages_finished"] >= len(wanted) - 1


def test_udp_as_quic_sends_it(host):
    """Two flows of datagrams, 2.5 MB each, paced: nothing is lost, and each sinks by its own bytes."""
    datagram_bytes, count = 1200, 2_100
    with in_netns(host.receiver):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        receiver.bind((CLIENT, PORT))
    with in_netns(host.sender):
        senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for opened in (receiver, *senders):
            stack.enter_context(opened)
        began = time.monotonic()
        with captured(host.receiver) as capture, on_one_cpu():
            for number in range(count):
                for sender in senders:
                    sender.sendto(struct.pack("!I", number) + bytes(datagram_bytes - 4), (CLIENT, PORT))
                if number % 20 == 19:
                    time.sleep(0.002)
        print(f"UDP: {2 * count * datagram_bytes * 8 / (time.monotonic() - began) / 1e6:.0f} Mbit/s")
        receiver.setblocking(False)
        arrived: dict[tuple[str, int], list[int]] = defaultdict(list)
        with contextlib.suppress(BlockingIOError):
            while True:
                data, source = receiver.recvfrom(2048)
                arrived[source].append(struct.unpack_from("!I", data)[0])
    assert [sorted(numbers) for numbers in arrived.values()] == [list(range(count))] * 2
    assert sorted(sunk_datagrams(capture.frames, SOURCE_PORT_AT).values()) == [count * datagram_bytes] * 2
