"""Floods of new flows: what a source may begin, who keeps an entry, and a victim's requests beside them.

Most of it sends frames through the program without a network, where all packets are those of one local socket, and so
of one source. The last part forwards a container's flood to a NIC that has queues, beside requests of the host.
"""

import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import datapath_wire
import numpy as np
import pytest
from datapath_kit import KernelSender, bpf_file_system, build_frame, flow_key, in_netns, run
from pyroute2 import IPRoute

from fabricpilot.config import AgentConfig, load
from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import FLAG_SAW_MESSAGE, Settings
from hostagent.lifecycle import Scheduled, bring_up, take_down

SETTINGS = Settings(Thresholds((1000, 10_000, 100_000)), (32, 24, 16, 8), (1, 2, 3, 4))
TOP, LAST = 32, 8  # DSCP
SOURCE_ADDRESS, SOURCE_PORT = slice(26, 30), slice(34, 36)  # in an Ethernet frame over IPv4


class Flood:
    """One-packet flows, each with its own address and port, through the loaded program."""

    def __init__(self, sender: KernelSender, frame: bytes):
        self.sender, self.frame, self.sent = sender, bytearray(frame), 0
        sender.run(bytes(frame))  # opens the program
        self.program = sender._program

    def send(self, flows: int) -> None:
        """That many new flows, from addresses 11.0.0.0 upwards."""
        for number in range(self.sent, self.sent + flows):
            self.frame[SOURCE_ADDRESS] = (0x0B000000 + number).to_bytes(4, "big")
            bpf.prog_test_run(self.program, bytes(self.frame))
        self.sent += flows


_SYN, _DATA = build_frame(flow_key(), syn=True), build_frame(flow_key(), 100, sequence=1)


def syn_of(number: int) -> bytes:
    return _of_port(_SYN, 10_000 + number)


def data_of(number: int) -> bytes:
    return _of_port(_DATA, 10_000 + number)


def _of_port(frame: bytes, port: int) -> bytes:
    """Its checksum is left to the NIC."""
    return frame[: SOURCE_PORT.start] + port.to_bytes(2, "big") + frame[SOURCE_PORT.stop :]


def under_way(sender: KernelSender, flows: int) -> dict[int, int]:
    """TCP flows that have sent a SYN and data: when each was first seen, by its port."""
    for number in range(flows):
        sender.run(syn_of(number))
    for number in range(flows):
        sender.run(data_of(number))
    return first_seen(sender)


def first_seen(sender: KernelSender) -> dict[int, int]:
    table = sender.datapath.flows()
    ours = table.keys["destination_port"] == 80
    ports, times = table.keys["source_port"][ours], table.states["first_seen_ns"][ours]
    return dict(zip(ports.tolist(), times.tolist(), strict=True))


def udp_flood(sender: KernelSender) -> Flood:
    return Flood(sender, build_frame(flow_key(protocol=17, destination_port=9), 10))


def test_a_flood_does_not_push_out_flows_that_go_on(kernel_sender):
    """Each sends once while half again as many new flows come as the whole table has entries."""
    kernel_sender.datapath.apply(SETTINGS)
    before, flood = under_way(kernel_sender, 256), udp_flood(kernel_sender)
    frames = [data_of(number) for number in range(256)]
    for entries in (2048, 6144, 6144, 6144):
        for frame in frames:
            flood.send(entries // len(frames))
            bpf.prog_test_run(flood.program, frame)
    assert first_seen(kernel_sender) == before
    counters = kernel_sender.datapath.counters()
    assert counters["flows_evicted"] > 4 * 4096
    assert counters["over_share"] == 0


TICKS_S = 0.02  # the program's clock moves by ticks, of 10 ms at most: one may be gained at either end


def test_a_source_has_a_share_of_new_flows(kernel_sender):
    rate = 500
    kernel_sender.datapath.apply(replace(SETTINGS, new_flows_per_s=rate))
    kernel_sender.run(syn_of(0))
    flood = Flood(kernel_sender, build_frame(flow_key(destination_port=81), syn=True))
    began = time.monotonic()
    flood.send(6000)
    took_s = time.monotonic() - began
    counters = kernel_sender.datapath.counters()
    assert counters["flows_inserted"] + counters["over_share"] == 6002
    assert counters["flows_inserted"] <= rate * (took_s + 1 + TICKS_S) + 2
    assert counters["packets_level_0"] == counters["flows_inserted"]
    assert counters["packets_level_3"] == counters["over_share"] > 0

    # Others of the same source wait at the end of the queue as well; a flow that is known goes on.
    empty_bucket(kernel_sender)
    assert kernel_sender.run(data_of(1)).dscp == LAST
    assert kernel_sender.run(data_of(0)).dscp == TOP
    # With its next packets a refused flow gets in.
    deadline = time.monotonic() + 10
    while 10_001 not in first_seen(kernel_sender):
        assert time.monotonic() < deadline
        kernel_sender.run(data_of(1))


def empty_bucket(sender: KernelSender) -> None:
    """Take all that the source of these packets may begin at once."""
    before, flood = sender.datapath.counters()["over_share"], udp_flood(sender)
    for _ in range(100):
        flood.send(500)
        if sender.datapath.counters()["over_share"] > before:
            return
    raise AssertionError("the share has no end")


def test_acknowledgements_without_a_flow_have_a_share_of_their_own(kernel_sender):
    rate = 100
    kernel_sender.datapath.apply(replace(SETTINGS, new_flows_per_s=rate))
    flood = Flood(kernel_sender, build_frame(flow_key(destination_port=82)))
    began = time.monotonic()
    flood.send(8000)
    took_s = time.monotonic() - began
    counters = kernel_sender.datapath.counters()
    assert counters["flowless"] + counters["over_share"] == 8001
    assert 16 * rate / 2 < counters["flowless"] <= 16 * rate * (took_s + 1 + TICKS_S) + 1
    assert counters["packets_level_0"] == counters["flowless"]
    assert len(kernel_sender.datapath.flows()) == 0


def test_a_flood_of_syns_costs_flows_with_data_nothing(kernel_sender):
    kernel_sender.datapath.apply(replace(SETTINGS, new_flows_per_s=100))
    flood = Flood(kernel_sender, build_frame(flow_key(destination_port=81), syn=True))
    for _ in range(100):
        flood.send(500)
        if kernel_sender.datapath.counters()["over_share"]:
            break
    datagram = build_frame(flow_key(protocol=17, destination_port=9), 10)
    assert [kernel_sender.run(_of_port(datagram, port)).dscp for port in range(50)] == [TOP] * 50
    assert kernel_sender.datapath.counters()["over_share"] > 0


def test_a_connection_that_starts_again_and_again_is_no_way_to_the_top(kernel_sender):
    """A SYN before each segment makes every one the first of a flow: each costs what a new flow does."""
    rate, syn, data = 50, syn_of(0), build_frame(flow_key(source_port=10_000), 1400, sequence=1)
    kernel_sender.datapath.apply(replace(SETTINGS, new_flows_per_s=rate))
    began = time.monotonic()
    left = [(kernel_sender.run(syn).dscp, kernel_sender.run(data).dscp) for _ in range(1000)]
    took_s = time.monotonic() - began
    assert left.count((TOP, TOP)) <= rate * (took_s + 1 + TICKS_S) + 1
    assert left.count((LAST, LAST)) > 0  # the data by what the flow has sent so far
    assert set(left) <= {(TOP, TOP)} | {(LAST, level) for level in SETTINGS.dscp}


def test_no_share_is_no_bound(kernel_sender):
    kernel_sender.datapath.apply(SETTINGS)
    udp_flood(kernel_sender).send(3000)
    counters = kernel_sender.datapath.counters()
    assert (counters["flows_inserted"], counters["over_share"]) == (3001, 0)


def test_a_new_flow_that_was_refused_is_not_taken_for_a_short_one(kernel_sender):
    kernel_sender.datapath.apply(replace(SETTINGS, new_flows_per_s=10))
    empty_bucket(kernel_sender)
    before = kernel_sender.datapath.counters()["flows_midlife"]
    deadline = time.monotonic() + 10
    while kernel_sender.datapath.counters()["flows_midlife"] == before:
        assert time.monotonic() < deadline
        assert kernel_sender.run(data_of(0)).dscp == LAST
    table = kernel_sender.datapath.flows()
    refused = table.states[table.keys["source_port"] == 10_000]
    assert len(refused) == 1
    assert not int(refused["flags"][0]) & FLAG_SAW_MESSAGE


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rate", [0, 2000])
def test_a_million_spoofed_syns(tmp_path, rate):
    """A table of the default size, 2,000 flows under way of which half fall silent, a million SYNs."""
    with bpf_file_system(tmp_path / "bpf") as root:
        sender = KernelSender(root / "fabricpilot", 131_072)
        try:
            sender.datapath.apply(SETTINGS)
            before = under_way(sender, 2000)
            sender.datapath.apply(replace(SETTINGS, new_flows_per_s=rate))
            flood = Flood(sender, build_frame(flow_key(destination_port=81), syn=True))
            frames = [data_of(number) for number in range(1000)]
            began = time.monotonic()
            for turn in range(1000):
                flood.send(1000)
                bpf.prog_test_run(flood.program, frames[turn])
            took_s = time.monotonic() - began
            after, counters = first_seen(sender), sender.datapath.counters()
        finally:
            sender.close()
    kept = {port for port, seen in after.items() if before.get(port) == seen}
    going = {port for port in before if port < 11_000}
    print(
        f"share {rate}: a million in {took_s:.0f} s, {len(kept)} of 2,000 kept, "
        f"{counters['flows_inserted']} inserted, {counters['over_share']} beyond the share"
    )
    assert len(kept) == 2000
    came_back = counters["flows_inserted"] + counters["over_share"] - (1_000_001 + 2000)
    assert 0 <= came_back <= len(going - kept)  # with their one packet, as flows seen in mid-life
    if rate:
        assert counters["flows_inserted"] <= rate * (took_s + 2) + 2001


# --- over a network --------------------------------------------------------------------------------------------------

RATE = "20mbit"
FLOOD_S = 1.5
NO_ANSWER_S = 0.3


@pytest.fixture
def site(make_netns, tmp_path):
    """box -- host -- peer: the host forwards for a container, and has queues of 20 Mbit/s towards the peer."""
    box, host, peer = make_netns("box"), make_netns("host"), make_netns("peer")
    for name, other, nics in ((box, host, ("eth0", "box0")), (host, peer, ("nic0", "nic0"))):
        run("ip", "link", "add", nics[0], "type", "veth", "peer", "name", nics[1], "netns", other, netns=name)
    for name, nic, address in (
        (box, "eth0", "10.60.1.2"),
        (host, "box0", "10.60.1.1"),
        (host, "nic0", "10.60.2.1"),
        (peer, "nic0", "10.60.2.2"),
    ):
        run("ip", "address", "add", f"{address}/24", "dev", nic, netns=name)
        run("ip", "link", "set", nic, "up", netns=name)
    run(
        "sysctl",
        "-qw",
        "net.ipv4.ip_forward=1",
        "net.ipv4.conf.all.rp_filter=0",
        "net.ipv4.conf.box0.rp_filter=0",
        netns=host,
    )
    with bpf_file_system(tmp_path / "bpf") as root, in_netns(host):
        yield (
            box,
            peer,
            {
                "host.interfaces": ["nic0"],
                "host.run_dir": str(tmp_path / "run"),
                "datapath.pin_dir": str(root / "fabricpilot"),
                "datapath.flow_entries": 4096,
                "queues.kind": "htb",
                "queues.link_rate": RATE,
            },
        )


@pytest.fixture
def scheduled(site) -> Iterator[Scheduled]:
    """The host of `site` under scheduling."""
    config = load(AgentConfig, None, site[2], {})
    with IPRoute() as ipr:
        host = bring_up(config, ipr)
        try:
            yield host
        finally:
            host.roster.watch.close()
            host.flow_control.close()
            host.datapath.close()
            take_down(config, ipr)


class Flooder(threading.Thread):
    """Datagrams of 1,000 bytes out of the box, about twice what the NIC can take, all of different flows."""

    def __init__(self, box: str, spoofed: bool):
        super().__init__(daemon=True)
        mac = json.loads(run("ip", "-j", "link", "show", "dev", "box0"))[0]["address"]
        frame = build_frame(flow_key("10.60.1.2", "10.60.2.2", 1024, 9, 17), 958)
        self.frame = bytearray(bytes.fromhex(mac.replace(":", "")) + frame[6:])
        self.frame[40:42] = b"\0\0"  # no UDP checksum
        self.spoofed, self.sent, self.over = spoofed, 0, threading.Event()
        with in_netns(box):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self.socket.bind(("eth0", 0x0800))

    def run(self) -> None:
        began = time.monotonic()
        while not self.over.is_set():
            due = int((time.monotonic() - began) * 5000)
            while self.sent < due:
                self._send(self.sent)
                self.sent += 1
            time.sleep(0.002)

    def _send(self, number: int) -> None:
        self.frame[SOURCE_PORT] = (1024 + number % 60_000).to_bytes(2, "big")
        if self.spoofed:
            self.frame[SOURCE_ADDRESS] = (0x0B000000 + number).to_bytes(4, "big")
            self.frame[24:26] = b"\0\0"
            words = np.frombuffer(bytes(self.frame[14:34]), ">u2").sum(dtype=np.uint32)
            words = (int(words) & 0xFFFF) + (int(words) >> 16)
            self.frame[24:26] = (~((words & 0xFFFF) + (words >> 16)) & 0xFFFF).to_bytes(2, "big")
        self.socket.send(self.frame)

    def stop(self) -> None:
        self.over.set()
        self.join()
        self.socket.close()


def request_times(peer: str, seconds: float) -> list[float]:
    """Milliseconds that requests of the host take, each a flow of its own; 300 for those without an answer."""
    with in_netns(peer):
        echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("10.60.2.2", 7))
    echo.settimeout(0.1)
    over = threading.Event()

    def answer() -> None:
        while not over.is_set():
            try:
                echo.sendto(*echo.recvfrom(2048))
            except TimeoutError:
                continue

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    times, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(NO_ANSWER_S)
            client.connect(("10.60.2.2", 7))
            began = time.monotonic()
            try:
                client.send(b"x" * 200)
                client.recv(2048)
                times.append((time.monotonic() - began) * 1000)
            except (TimeoutError, OSError):
                times.append(NO_ANSWER_S * 1000)
        time.sleep(0.03)
    over.set()
    thread.join()
    echo.close()
    return times


@pytest.mark.parametrize("spoofed", [False, True], ids=["one address", "spoofed addresses"])
def test_requests_beside_a_flood(site, scheduled, spoofed):
    """A container's flood of new flows fills the NIC; the host's requests pass it by once a source has a share."""
    box, peer, _ = site
    median = {}
    for share in (50, 0):  # in this order: the flood leaves a long queue behind, on the level it had
        scheduled.datapath.apply(replace(scheduled.settings, new_flows_per_s=share))
        before = scheduled.datapath.counters()["over_share"]
        flooder = Flooder(box, spoofed)
        flooder.start()
        time.sleep(1.5)  # more than the share holds for a second
        times = request_times(peer, FLOOD_S)
        flooder.stop()
        over_share = scheduled.datapath.counters()["over_share"] - before
        median[share] = statistics.median(times)
        print(
            f"share {share}: {len(times)} requests, median {median[share]:.1f} ms, p90 {np.quantile(times, 0.9):.1f} "
            f"ms, flood {flooder.sent} packets, {over_share} beyond the share"
        )
        assert over_share > flooder.sent / 2 if share else over_share == 0
    assert median[50] < median[0] / 3


def test_a_server_under_a_syn_flood_answers_its_clients_at_the_top(host):
    """What it answers to SYNs nobody meant uses up one share of its cgroup; flows that begin with data have another."""
    host.datapath.apply(replace(datapath_wire.SETTINGS, new_flows_per_s=5))
    here, there = datapath_wire.ADDRESSES[4]
    run("ip", "route", "add", "11.0.0.0/8", "via", there)
    run("ip", "route", "add", "blackhole", "11.0.0.0/8", netns=host.receiver)
    run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.nic0.rp_filter=0")
    mac = json.loads(run("ip", "-j", "link", "show", "dev", "nic0"))[0]["address"]
    first = build_frame(flow_key("11.0.0.1", here, 1024, datapath_wire.PORT), syn=True, sequence=60_000 - 1024)
    frame = bytearray(bytes.fromhex(mac.replace(":", "")) + first[6:])
    listener = socket.create_server((here, datapath_wire.PORT))
    with in_netns(host.receiver):
        attacker, client = socket.socket(socket.AF_PACKET, socket.SOCK_RAW), socket.socket()
        attacker.bind(("nic0", 0x0800))

    def flood() -> None:
        for port in range(1024, 2024):  # its sum with the sequence number stays, so the checksum is right
            frame[SOURCE_PORT], frame[40:42] = port.to_bytes(2, "big"), (60_000 - port).to_bytes(2, "big")
            attacker.send(frame)

    with listener, attacker, client, datapath_wire.captured(host.receiver) as capture:
        client.settimeout(20)
        listener.settimeout(20)
        flood()
        client.connect((here, datapath_wire.PORT))
        connection, _ = listener.accept()
        with connection:
            flood()
            connection.sendall(b"x" * 500)
            assert client.recv(500)
    assert host.datapath.counters()["over_share"] > 0
    answers = {packet.dscp for packet in capture.packets if packet.payload_bytes}
    assert answers == {TOP}
