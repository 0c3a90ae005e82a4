"""Routes under real traffic: two and four paths between namespaces, bytes counted on each, both IP versions."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
from agent_kit import wait_for
from datapath_kit import bpf_file_system, in_netns, run
from datapath_wire import captured, wait_for_gap
from pyroute2 import IPRoute

from fabricpilot.config import AgentConfig, Rule, load
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from fabricpilot.wire import FlowVerdict
from hostagent.datapath.base import Settings
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.steering import Steering
from hostagent.flow_control import FlowControl, check

PORT = 5001
SETTINGS = Settings(Thresholds((50_000, 500_000, 2_000_000)), (32, 24, 16, 8), (1, 2, 3, 4))
ME = {4: "10.70.0.1", 6: "fd70::1"}  # on lo of the sender: replies find it by any path
PEER = {4: "10.70.0.2", 6: "fd70::2"}


def path_address(version: int, path: int, side: int) -> str:
    return f"10.7{path}.1.{side + 1}" if version == 4 else f"fd7{path}:1::{side + 1}"


@dataclass
class Fabric:
    """A sender and a receiver, joined by `paths` veth pairs nic0, nic1 ...; the kernel's own choice is nic0."""

    sender: str
    receiver: str
    paths: int
    datapath: EbpfDatapath
    ipr: IPRoute

    def control(self, rules=(), gap_ms: int = 20, extra=(), usable: bool = True) -> FlowControl:
        paths = [
            {
                "number": path,
                "interface": f"nic{path}",
                "next_hop": path_address(4, path, 1),
                "next_hop6": path_address(6, path, 1),
            }
            for path in range(1, self.paths)
        ]
        config = load(AgentConfig, None, {"routes.paths": [*paths, *extra], "routes.gap_ms": gap_ms}, {})
        config = msgspec.structs.replace(config, rules=[msgspec.convert(rule, Rule) for rule in rules])
        control = FlowControl(config, self.datapath, self.ipr)
        if usable:  # next hops have answered, of both IP versions: with those of one a route is usable already
            wait_for(lambda: control.on_event() or self._all_usable(control))
        return control

    def _all_usable(self, control: FlowControl) -> bool:
        told = control.status()["routes"]
        return all(told[str(path)] == "usable" for path in range(1, self.paths))

    def sent(self) -> list[int]:
        """Bytes that have left by each path so far."""
        counts = []
        for path in range(self.paths):
            link = self.ipr.get_links(ifname=f"nic{path}")[0]
            counts.append(link.get_attr("IFLA_STATS64")["tx_bytes"])
        return counts


@pytest.fixture
def fabric(request, make_netns, tmp_path) -> Iterator[Fabric]:
    paths = getattr(request, "param", 2)
    names = make_netns("send"), make_netns("recv")
    for path in range(paths):
        run(
            "ip",
            "link",
            "add",
            f"nic{path}",
            "type",
            "veth",
            "peer",
            "name",
            f"nic{path}",
            "netns",
            names[1],
            netns=names[0],
        )
    for side, name in enumerate(names):
        run("ip", "link", "set", "lo", "up", netns=name)
        for version, prefix in ((4, 32), (6, 128)):
            mine = (ME, PEER)[side][version]
            other = (PEER, ME)[side][version]
            run(
                "ip",
                "address",
                "add",
                f"{mine}/{prefix}",
                "dev",
                "lo",
                *(["nodad"] if version == 6 else []),
                netns=name,
            )
            for path in range(paths):
                nic, nodad = f"nic{path}", ["nodad"] if version == 6 else []
                length = 24 if version == 4 else 64
                address = path_address(version, path, side)
                run("ip", "address", "add", f"{address}/{length}", "dev", nic, *nodad, netns=name)
                run("ip", "link", "set", nic, "up", netns=name)
            gateway = path_address(version, 0, 1 - side)
            time.sleep(0.02)
            run("ip", f"-{version}", "route", "add", other, "via", gateway, "src", mine, netns=name)
        run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", netns=name)
    with bpf_file_system(tmp_path / "bpf") as root, in_netns(names[0]):
        datapath = EbpfDatapath(root / "fabricpilot", 4096)
        with IPRoute() as ipr:
            datapath.apply(SETTINGS)
            for path in range(paths):
                datapath.attach(f"nic{path}")
            yield Fabric(*names, paths, datapath, ipr)
            datapath.detach()
            datapath.close()


class Transfer:
    """A TCP connection whose receiver counts what arrives."""

    def __init__(self, fabric: Fabric, version: int, port: int = PORT) -> None:
        family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
        with in_netns(fabric.receiver):
            listener = socket.create_server((PEER[version], port), family=family)
        self.received = 0
        self._thread = threading.Thread(target=self._receive, args=(listener,), daemon=True)
        self._thread.start()
        with in_netns(fabric.sender):
            self.socket = socket.create_connection((PEER[version], port), 10, source_address=(ME[version], 0))
        self.version, self.port = version, port
        self.source_port = self.socket.getsockname()[1]
        self.sent = 0

    def _receive(self, listener: socket.socket) -> None:
        with listener:
            connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 18):
                self.received += len(data)

    def send(self, size_bytes: int) -> None:
        """Send, and wait until all has arrived."""
        self.socket.sendall(bytes(size_bytes))
        self.sent += size_bytes
        deadline = time.monotonic() + 20
        while self.received < self.sent:
            assert time.monotonic() < deadline, f"{self.received} of {self.sent} bytes arrived"
            time.sleep(0.002)

    def verdict(self, route: int, ttl_s: float = 60.0, level: int = -1) -> FlowVerdict:
        return FlowVerdict(ME[self.version], PEER[self.version], self.source_port, self.port, 6, level, route, ttl_s)

    def close(self) -> None:
        self.socket.close()
        self._thread.join(10)


@contextlib.contextmanager
def routed(
    fabric: Fabric, version: int, *, watched: bool = False, **options: object
) -> Iterator[tuple[FlowControl, Transfer]]:
    """What steers flows, and a connection; `watched`: an agent's loop is there, which acts on events at once."""
    with contextlib.ExitStack() as stack:
        control = fabric.control(**options)
        stack.callback(control.close)
        if watched:
            stop = threading.Event()
            watcher = threading.Thread(target=_serve, args=(control, stop))
            watcher.start()
            stack.callback(watcher.join)
            stack.callback(stop.set)
        transfer = Transfer(fabric, version)
        stack.callback(transfer.close)
        yield control, transfer


def pass_gap(transfer: Transfer) -> None:
    """Silence, in which a flow may change its route: the first packet after a change was asked for begins the wait."""
    time.sleep(0.1)
    transfer.send(10)
    time.sleep(0.1)


def moved(fabric: Fabric, transfer: Transfer, size_bytes: int) -> list[int]:
    """What left by each path while `size_bytes` were sent."""
    before = fabric.sent()
    transfer.send(size_bytes)
    return [after - then for then, after in zip(before, fabric.sent(), strict=True)]


def assert_all_by(sent: list[int], path: int, size_bytes: int) -> None:
    assert sent[path] >= size_bytes, sent
    assert sum(sent) - sent[path] < 20_000, sent  # neighbour discovery, replies


def test_verdicts_move_flows_of_both_ip_versions(fabric):
    """The small version of what follows, which takes minutes on a busy machine."""
    control = fabric.control()
    transfers = [Transfer(fabric, 4), Transfer(fabric, 6, PORT + 1)]
    try:
        for path in (1, 0):
            control.tick()
            control.take([transfer.verdict(path, ttl_s=60.0 * path) for transfer in transfers])
            for transfer in transfers:
                pass_gap(transfer)
                assert_all_by(moved(fabric, transfer, 50_000), path, 50_000)
    finally:
        for transfer in transfers:
            transfer.close()
        control.close()


def test_a_next_hop_of_one_ip_version_comes_and_goes_without_those_of_the_other(fabric):
    """Were the route withdrawn meanwhile, flows of the other version would leave it until their next gap."""
    control = fabric.control()
    hop, withdrawn = path_address(6, 1, 1), []
    control._steering._write = lambda record: (
        withdrawn.append(int(record["usable_routes"][0]) & 2 == 0),
        Steering._write(control._steering, record),
    )
    run("ip", "-6", "neigh", "replace", hop, "dev", "nic1", "nud", "failed", netns=fabric.sender)
    wait_for(lambda: control.on_event() or "IPv6 next hop" in control.status()["routes"]["1"])
    wait_for(lambda: control.tick() or control.on_event() or control.status()["routes"]["1"] == "usable")
    assert withdrawn
    assert not any(withdrawn)
    control.close()
    assert withdrawn[-1]


@pytest.mark.slow
@pytest.mark.parametrize("fabric", [2, 4], indirect=True)
@pytest.mark.parametrize("version", [4, 6])
def test_a_verdict_sends_a_flow_by_each_path_in_turn(fabric, version):
    with routed(fabric, version) as (control, transfer):
        assert control.usable_routes == tuple(range(1, fabric.paths))
        assert_all_by(moved(fabric, transfer, 300_000), 0, 300_000)
        for path in [*range(1, fabric.paths), 1]:
            control.tick()  # an agent that is there
            control.take([transfer.verdict(path)])
            pass_gap(transfer)
            assert_all_by(moved(fabric, transfer, 300_000), path, 300_000)
            assert path in _routes_in_use(fabric)
        control.take([transfer.verdict(0, ttl_s=0)])
        pass_gap(transfer)
        assert_all_by(moved(fabric, transfer, 300_000), 0, 300_000)
        counters = fabric.datapath.counters()
        total = sum(counters[f"bytes_level_{level}"] for level in range(4))
        states = fabric.datapath.flows().states
        accounted = states["attained_bytes"] + states["earlier_bytes"]
        assert int(accounted.max()) == transfer.sent  # the second program did not count anything again,
        assert transfer.sent <= total < transfer.sent * 1.5  # nor for the counters, but a packet may be sent twice


@pytest.mark.slow
@pytest.mark.parametrize("fabric", [4], indirect=True)
@pytest.mark.parametrize("version", [4, 6])
def test_rules_send_flows_by_their_ports_from_the_first_packet(fabric, version):
    rules = [{"destination_port": [PORT + path], "route": path} for path in range(1, 4)]
    control = fabric.control(rules)
    try:
        for path in range(4):
            transfer = Transfer(fabric, version, PORT + path)
            assert_all_by(moved(fabric, transfer, 500_000), path, 500_000)
            transfer.close()
        assert fabric.datapath.counters()["route_unusable"] == 0
    finally:
        control.close()


@pytest.mark.slow
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("how", ["down", "carrier", "deleted"])
def test_a_route_whose_link_goes_is_left_at_once_and_found_again(fabric, version, how):
    with routed(fabric, version, watched=True) as (control, transfer):
        control.take([transfer.verdict(1)])
        pass_gap(transfer)
        assert_all_by(moved(fabric, transfer, 300_000), 1, 300_000)
        if how == "down":
            run("ip", "link", "set", "nic1", "down", netns=fabric.sender)
        elif how == "carrier":
            run("ip", "link", "set", "nic1", "down", netns=fabric.receiver)
        else:
            run("ip", "link", "del", "nic1", netns=fabric.sender)
        transfer.send(2_000_000)  # all of it arrives: nothing is lost but what was on the wire
        assert control.usable_routes == ()
        wait_for(lambda: "nic1" in control.status()["routes"]["1"])  # said behind the deed, by the other thread
        if how == "deleted":
            return
        where = fabric.sender if how == "down" else fabric.receiver
        run("ip", "link", "set", "nic1", "up", netns=where)
        address = path_address(6, 1, 0 if how == "down" else 1)  # IPv6 addresses go with their link
        run("ip", "address", "replace", f"{address}/64", "dev", "nic1", "nodad", netns=where)
        wait_for(lambda: control.status()["routes"]["1"] == "usable")  # for both IP versions
        pass_gap(transfer)
        assert_all_by(moved(fabric, transfer, 300_000), 1, 300_000)


@pytest.mark.slow
@pytest.mark.parametrize("version", [4, 6])
def test_a_next_hop_that_does_not_answer_withdraws_its_route_until_it_does(fabric, version):
    hop, length = path_address(version, 1, 1), 24 if version == 4 else 64
    nodad = ["nodad"] if version == 6 else []
    for key, value in (("base_reachable_time_ms", 500), ("delay_first_probe_time", 1), ("ucast_solicit", 1)):
        run("sysctl", "-qw", f"net.ipv{version}.neigh.nic1.{key}={value}", netns=fabric.sender)
    run("ip", "address", "del", f"{hop}/{length}", "dev", "nic1", netns=fabric.receiver)
    with routed(fabric, version, watched=True, usable=False) as (control, transfer):
        control.take([transfer.verdict(1)])
        for _ in range(2):
            pass_gap(transfer)
            assert_all_by(moved(fabric, transfer, 200_000), 0, 200_000)
            assert "does not answer" in control.status()["routes"]["1"]
            run("ip", "address", "add", f"{hop}/{length}", "dev", "nic1", *nodad, netns=fabric.receiver)
            wait_for(lambda: control.status()["routes"]["1"] == "usable")
            pass_gap(transfer)
            assert_all_by(moved(fabric, transfer, 200_000), 1, 200_000)
            run("ip", "address", "del", f"{hop}/{length}", "dev", "nic1", netns=fabric.receiver)
            wait_for(lambda: control.status()["routes"]["1"] != "usable")


@pytest.mark.slow
def test_a_flow_without_a_gap_keeps_its_route_unless_told_otherwise(fabric):
    with in_netns(fabric.sender):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((ME[4], 4000))
    verdict = FlowVerdict(ME[4], PEER[4], 4000, 9, 17, -1, 1, 60.0)

    def datagrams(seconds: float) -> set[int]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            udp.sendto(b"x" * 100, (PEER[4], 9))
            time.sleep(0.002)
        return _routes_in_use(fabric)

    control = fabric.control(gap_ms=30_000)
    try:
        assert datagrams(0.2) == {0}
        control.take([verdict])
        assert datagrams(0.5) == {0}
        control.close()
        control = fabric.control(gap_ms=0)
        assert datagrams(0.1) == {1}
    finally:
        udp.close()
        control.close()


@pytest.mark.slow
@pytest.mark.parametrize("version", [4, 6])
def test_a_message_takes_the_new_route_from_its_first_packet(fabric, version):
    with routed(fabric, version, gap_ms=30_000) as (control, transfer):
        for route in (1, 0, 1):
            transfer.send(100_000)
            control.take([transfer.verdict(route, ttl_s=60.0 if route else 0)])
            wait_for_gap(transfer.socket)
            assert_all_by(moved(fabric, transfer, 300_000), route, 300_000)


@pytest.mark.slow
def test_when_nobody_watches_flows_return_to_the_kernels_choice(fabric):
    with routed(fabric, 4, rules=[{"route": 1}]) as (control, transfer):
        assert_all_by(moved(fabric, transfer, 300_000), 1, 300_000)
        control._steering.use_routes([1], 0.5)  # the last word of an agent that dies now
        time.sleep(0.7)
        assert_all_by(moved(fabric, transfer, 300_000), 0, 300_000)
        assert fabric.datapath.counters()["route_unusable"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("version", [4, 6])
def test_a_route_by_mark_follows_policy_routing(fabric, version):
    gateway = path_address(version, 1, 1)
    run("ip", f"-{version}", "rule", "add", "fwmark", "7", "table", "77", netns=fabric.sender)
    run("ip", f"-{version}", "route", "add", "default", "via", gateway, "table", "77", netns=fabric.sender)
    with routed(fabric, version, extra=[{"number": 9, "mark": 7}]) as (control, transfer):
        control.take([transfer.verdict(9)])
        pass_gap(transfer)
        assert_all_by(moved(fabric, transfer, 300_000), 1, 300_000)
        run("ip", f"-{version}", "route", "flush", "table", "77", netns=fabric.sender)
        time.sleep(0.1)
        control.on_event()  # marked packets go the ordinary way now
        assert_all_by(moved(fabric, transfer, 300_000), 0, 300_000)


@pytest.mark.slow
def test_packets_of_a_routed_flow_carry_their_level(fabric):
    control = fabric.control(rules=[{"route": 1}])
    with captured(fabric.receiver, "nic1") as capture:
        transfer = Transfer(fabric, 4)
        transfer.send(100)
        transfer.close()
    control.close()
    assert {seen.dscp for seen in capture.packets} == {32}


def test_routers_spread_flows_by_their_labels(fabric, make_netns):
    """The receiver forwards over two equal paths, chosen by flow label: datagrams of one socket take either."""
    router, far, target = fabric.receiver, make_netns("far"), "fd70::3"
    run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1", "net.ipv6.fib_multipath_hash_policy=0", netns=router)
    ways = []
    for path in range(2):
        nic, mine, gateway = f"far{path}", f"fd7{path}:2::1", f"fd7{path}:2::2"
        run("ip", "link", "add", nic, "type", "veth", "peer", "name", nic, "netns", far, netns=router)
        for netns, address in ((router, mine), (far, gateway)):
            run("ip", "address", "add", f"{address}/64", "dev", nic, "nodad", netns=netns)
            run("ip", "link", "set", nic, "up", netns=netns)
        ways += ["nexthop", "via", gateway, "dev", nic]
    run("ip", "link", "set", "lo", "up", netns=far)
    run("ip", "address", "add", f"{target}/128", "dev", "lo", "nodad", netns=far)
    run("ip", "-6", "route", "add", target, *ways, netns=router)
    run("ip", "-6", "route", "add", target, "via", path_address(6, 0, 1), "src", ME[6], netns=fabric.sender)
    with in_netns(far):
        arriving = []
        for path in range(2):
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x86DD))
            tap.bind((f"far{path}", 0))
            tap.setblocking(False)
            arriving.append(tap)
    sending = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sending.bind((ME[6], 4000))

    def ways_of(label: int) -> list[int]:
        control = labelled(fabric, label)
        for _ in range(5):
            sending.sendto(b"x" * 100, (target, 9))
        counts = [0, 0]

        def all_there() -> bool:
            for path, tap in enumerate(arriving):
                counts[path] += datagrams_to(tap, 9)
            return sum(counts) == 5

        wait_for(all_there)
        control.close()
        return counts

    seen = [ways_of(label) for label in range(1, 25)]
    for closing in (*arriving, sending):
        closing.close()
    assert {tuple(sorted(counts)) for counts in seen} == {(0, 5)}, "one label, one path"
    assert {counts.index(5) for counts in seen} == {0, 1}, "both paths"


def datagrams_to(tap: socket.socket, port: int) -> int:
    """How many UDP datagrams over IPv6 wait there, taking them."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, (_, _, kind, *_) = tap.recvfrom(2048)
            is_udp = frame[20] == 17 and int.from_bytes(frame[56:58], "big") == port
            count += kind != socket.PACKET_OUTGOING and is_udp
    return count


@pytest.mark.slow
def test_a_flow_label_is_on_every_packet_of_a_connection(fabric):
    for label in (0x11111, 0x22222):
        control = labelled(fabric, label)
        assert control.usable_routes == (3,)
        with captured(fabric.receiver) as capture:
            transfer = Transfer(fabric, 6)
            transfer.send(5000)
            transfer.close()
        control.close()
        sent = [frame for frame in capture.frames if frame[12:14] == b"\x86\xdd" and frame[20] == 6]
        assert {int.from_bytes(frame[14:18], "big") & 0xFFFFF for frame in sent} == {label}


def labelled(fabric: Fabric, label: int, **rule: object) -> FlowControl:
    """Route 3 is that flow label, and all flows that the rule admits take it."""
    config = load(AgentConfig, None, {"routes.paths": [{"number": 3, "flow_label": label}]}, {})
    rules = [msgspec.convert({"route": 3, **rule}, Rule)]
    return FlowControl(msgspec.structs.replace(config, rules=rules), fabric.datapath, fabric.ipr)


@pytest.mark.slow
def test_a_flow_label_spreads_tunnelled_ipv4_by_the_outer_source_port(fabric):
    vxlan = ("vxlan", "id", "5", "dstport", "4789", "dev", "nic0", "remote", path_address(4, 0, 1))
    run("ip", "link", "add", "vx0", "type", *vxlan, netns=fabric.sender)
    run("ip", "address", "add", "10.99.0.1/24", "dev", "vx0", netns=fabric.sender)
    run("ip", "link", "set", "vx0", "up", netns=fabric.sender)
    run("ip", "neigh", "add", "10.99.0.2", "lladdr", "02:00:00:00:00:99", "dev", "vx0", netns=fabric.sender)
    fabric.datapath.attach("vx0")
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ports = {}
    for label in (1, 2, 3):
        control = labelled(fabric, label, destination=["10.99.0.0/24"])
        with captured(fabric.receiver) as capture:
            for _ in range(5):
                udp.sendto(b"x" * 100, ("10.99.0.2", 9))
        control.close()
        # To the VXLAN port, with IPv4 inside: Ethernet 14, IPv4 20, UDP 8, VXLAN 8, Ethernet 14.
        tunnelled = [frame for frame in capture.frames if (frame[36:38], frame[62:64]) == (b"\x12\xb5", b"\x08\x00")]
        ports[label] = {int.from_bytes(frame[34:36], "big") for frame in tunnelled}
    udp.close()
    assert all(len(seen) == 1 for seen in ports.values()), ports
    assert len(set.union(*ports.values())) == 3, ports


@pytest.mark.parametrize(
    ("paths", "rules", "match"),
    [
        ([{"number": 32, "interface": "a"}], [], "1 to 31"),
        ([{"number": 1, "interface": "a"}, {"number": 1, "mark": 3}], [], "two routes"),
        ([{"number": 1}], [], "one of interface"),
        ([{"number": 1, "interface": "a", "mark": 1}], [], "one of interface"),
        ([{"number": 1, "interface": "a", "next_hop": "fd00::1"}], [], "IPv4 address"),
        ([{"number": 1, "flow_label": 1 << 20}], [], "flow label"),
        ([{"number": 1, "mark": 1}], [{"route": 1}], "by mark"),
        ([], [{"route": 1}], "no route 1"),
    ],
)
def test_wrong_routes_are_refused(paths, rules, match):
    config = load(AgentConfig, None, {"routes.paths": paths}, {})
    config = msgspec.structs.replace(config, rules=[msgspec.convert(rule, Rule) for rule in rules])
    with pytest.raises(UsageError, match=match):
        check(config)


def _routes_in_use(fabric: Fabric) -> set[int]:
    return set(fabric.datapath.flows().states["route"].tolist())


def _serve(control: FlowControl, stop: threading.Event) -> None:
    """What the agent's loop does: events at once, a tick now and then."""
    due = time.monotonic() + 0.5
    while not stop.is_set():
        control.on_event()
        if time.monotonic() >= due:
            control.tick()
            due += 0.5
        time.sleep(0.005)
