"""The ECN marker on the real kernel: what it changes in a frame, whose queue it reads, what it leaves behind."""

import mmap
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from scapy.layers.inet import IP, TCP, UDP, IPOption_Timestamp
from scapy.layers.inet6 import IPv6, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import default_dscp
from hostagent.datapath.bpf_syscall import prog_test_run
from testbed.netns.enter import argv_in, call_in
from testbed.netns.switch_port import SCRIPT
from testbed.transport.bpftool import bpftool, load_program
from testbed.transport.build import compile_program
from testbed.transport.compare import Setting, compare
from testbed.transport.counters import Config, Counters
from testbed.transport.marker import attach_marker, classes_of_bands, detach_marker
from testbed.transport.trace import RECORD

NOT_ECT, ECT1, ECT0, CE = range(4)
TC_ACT_UNSPEC = 0xFFFFFFFF


@pytest.fixture(scope="module")
def compiled_marker(tmp_path_factory):
    return compile_program("ecn_marker.bpf.c", tmp_path_factory.mktemp("bpf"))


@pytest.fixture
def virtual_marker(compiled_marker):
    """The program with a virtual queue that hardly drains, and its counters."""
    loaded = load_program(compiled_marker)
    settings = mmap.mmap(loaded.map_fds["marker_config"], 4096)
    settings[: len(bytes(Config()))] = bytes(
        Config(drain_bytes_per_s=1, k_bytes=1000, cap_bytes=1 << 20, bin_bytes=100)
    )
    counters = mmap.mmap(loaded.map_fds["marker_stats"], 4096, prot=mmap.PROT_READ)
    yield loaded.program_fd, lambda: Counters.from_buffer_copy(counters)
    settings.close()
    counters.close()
    loaded.close()


def frames(ecn):
    """One frame of each kind, DSCP 10, with this ECN field."""
    tos = 10 << 2 | ecn
    v4, v6 = IP(src="10.0.0.1", dst="10.0.0.2", tos=tos), IPv6(src="fd00::1", dst="fd00::2", tc=tos, fl=0x12345)
    payload = Raw(bytes(1400))
    return {
        "tcp4": Ether() / v4 / TCP() / payload,
        "udp4 with options": Ether() / IP(tos=tos, options=[IPOption_Timestamp()]) / UDP() / payload,
        "fragment": Ether() / IP(tos=tos, frag=100, flags="MF") / payload,
        "tcp6": Ether() / v6 / TCP() / payload,
        "udp6 behind a hop-by-hop header": Ether() / v6 / IPv6ExtHdrHopByHop() / UDP() / payload,
    }


@pytest.mark.parametrize("kind", frames(ECT0))
@pytest.mark.parametrize("ecn", [NOT_ECT, ECT1, ECT0, CE])
def test_marks_and_changes_nothing_else(virtual_marker, kind, ecn):
    program, counters = virtual_marker
    before, marked = bytes(frames(ecn)[kind]), bytes(frames(CE if ecn else NOT_ECT)[kind])
    verdict, first, *_ = prog_test_run(program, before)
    assert (verdict, first) == (TC_ACT_UNSPEC, before)  # found an empty queue
    _, second, *_ = prog_test_run(program, before)
    assert second == marked  # scapy has computed the checksum anew
    counted = counters()
    assert (counted.packets, counted.bytes) == (2, 2 * len(before))
    assert (counted.marked, counted.not_capable) == ((1, 0) if ecn else (0, 1))
    assert counted.queue_bytes_max in (len(before) - 1, len(before))


@pytest.mark.parametrize("head", [ARP(), Dot1Q(vlan=5) / IP(tos=ECT0) / UDP()], ids=["arp", "tag inside the frame"])
def test_what_is_not_ip_passes(virtual_marker, head):
    """Nor a tag inside the frame, where the kernel's helper would take the tag for the IP header."""
    program, counters = virtual_marker
    frame = bytes(Ether() / head / Raw(bytes(1400)))
    for _ in range(3):
        assert prog_test_run(program, frame)[1] == frame
    assert counters().not_capable == 2


def test_virtual_queue_drains_at_its_rate_and_is_capped(make_netns):
    namespace = make_netns()
    sh(namespace, "ip link set lo up")
    rate_bps, k_bytes = 800_000, 10_000  # 100 kB/s
    with attach_marker(namespace, "lo", k_bytes, rate_bps, "virtual", gamma=1.0) as marker:
        send = udp_sender(namespace, "127.0.0.1")
        sink = call_in(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sink.bind(("127.0.0.1", 9))  # without it ICMP errors would pass the marker too
        began_s = time.monotonic()
        for _ in range(200):  # 206 kB at once: far beyond the cap of 8 K
            send(1000, ECT0)
        full = marker.stats()
        assert 7 * k_bytes < full.queue_bytes_max <= 8 * k_bytes
        time.sleep(0.5)
        send(1000, ECT0)
        passed_s = time.monotonic() - began_s
        found_bytes = marker.stats().since(full).queue_bytes_sum
        assert 80_000 - passed_s * 100_000 <= found_bytes <= 80_000 - 0.5 * 100_000
        time.sleep(0.5)
        settled = marker.stats()
        send(1000, ECT0)
        assert marker.stats().since(settled).marked == 0
        sink.close()


def test_structures_agree_with_the_programs(compiled_marker, tmp_path):
    marker = members_of(compiled_marker, "marker_config", "marker_stats")
    for name, twin in (("marker_config", Config), ("marker_stats", Counters)):
        assert marker[name] == {field[0]: getattr(twin, field[0]).offset for field in twin._fields_}
    traced = members_of(compile_program("dctcp.bpf.c", tmp_path, ["DCTCP_TRACE"]), "dctcp_record")
    assert traced["dctcp_record"] == {name: RECORD.fields[name][1] for name in RECORD.names}


def members_of(compiled, *names):
    """Offset in bytes of each member of these structures, from the object's BTF."""
    types = bpftool("btf", "dump", "file", str(compiled))["types"]
    structs = {t["name"]: t for t in types if t["kind"] == "STRUCT" and t["name"] in names}
    assert set(structs) == set(names)
    return {name: {m["name"]: m["bits_offset"] // 8 for m in t["members"]} for name, t in structs.items()}


def test_each_band_has_its_own_queue(make_netns):
    namespace, dscp = veth(make_netns), default_dscp(4)
    script = [str(SCRIPT), "p0", "--rate", "1mbit", "--buffer", "400KB", "--levels", "4"]
    subprocess.run(argv_in(namespace, script), check=True)
    send = udp_sender(namespace, "10.9.0.2")

    def fill():
        for _ in range(20):  # 8 ms each on this line
            send(1000, dscp[2] << 2)

    with attach_marker(namespace, "p0", 5000, mode="real", class_by_dscp=classes_of_bands(dscp)) as marker:
        fill()
        filled = marker.stats()
        assert filled.not_capable > 5
        assert filled.marked == filled.no_queue == 0
        send(1000, dscp[0] << 2 | ECT0)
        assert marker.stats().marked == 0  # nobody waits in its band
        send(1000, dscp[2] << 2 | ECT0)
        assert marker.stats().marked == 1
    with attach_marker(namespace, "p0", 5000, mode="real") as marker:
        fill()
        send(1000, dscp[0] << 2 | ECT0)
        assert marker.stats().marked == 1  # without classes the port's whole backlog counts


def test_a_class_without_a_queue_is_counted(make_netns):
    namespace = veth(make_netns)
    sh(namespace, "tc qdisc add dev p0 root bfifo limit 10000")
    with attach_marker(namespace, "p0", 1, mode="real", class_by_dscp={0: 0x10007}) as marker:
        udp_sender(namespace, "10.9.0.2")(100, ECT0)
        assert (marker.stats().packets, marker.stats().no_queue) == (1, 1)


def test_auto_takes_the_real_queue_where_there_is_one(make_netns):
    namespace = veth(make_netns)
    with attach_marker(namespace, "p0", 3000, rate_bps=1e8) as marker:
        assert marker.mode == "virtual"
    with pytest.raises(KernelError, match="noqueue"), attach_marker(namespace, "p0", 3000, mode="real"):
        pass
    sh(namespace, "tc qdisc add dev p0 root tbf rate 10mbit burst 3000 limit 100000")
    with attach_marker(namespace, "p0", 3000) as marker:
        assert marker.mode == "real"
        marker.set_k_bytes(7000)
        assert marker.k_bytes == 7000


def test_leaves_no_trace_and_respects_others(make_netns):
    namespace = veth(make_netns)
    bare = state(namespace)
    with attach_marker(namespace, "p0", 3000, 1e8):
        assert state(namespace) != bare
        with pytest.raises(UsageError, match="already"), attach_marker(namespace, "p0", 3000, 1e8):
            pass
        assert state(namespace) != bare
    assert state(namespace) == bare
    with pytest.raises(ZeroDivisionError), attach_marker(namespace, "p0", 3000, 1e8):
        raise ZeroDivisionError
    assert state(namespace) == bare
    sh(
        namespace,
        "tc qdisc add dev p0 clsact; tc filter add dev p0 ingress prio 7 u32 match u32 0 0 flowid 1:1",
    )
    others = state(namespace)
    with attach_marker(namespace, "p0", 3000, 1e8):
        pass
    assert state(namespace) == others
    with attach_marker(namespace, "p0", 3000, 1e8):
        sh(namespace, "ip link del p0")  # the port goes away meanwhile: nothing to detach, no error


def test_what_a_killed_process_left_can_be_removed(make_netns):
    namespace = veth(make_netns)
    code = (
        "import time\nfrom testbed.transport import attach_marker\n"
        f"with attach_marker('{namespace}', 'p0', 3000, 1e8):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        os.kill(process.pid, signal.SIGKILL)
    assert detach_marker(namespace, "p0")
    assert not detach_marker(namespace, "p0")


def test_dctcp_keeps_the_queue_at_k_and_the_line_full():
    """The point of it all: cubic fills the buffer, DCTCP holds the queue at K, and both fill the line."""
    # Slow, so that a test machine busy with other things does not decide: K is 12 ms of this line.
    setting = Setting(rate_bps=20_000_000, buffer_bytes=300_000, seconds=1.5)
    cubic, real, virtual = compare(setting)
    assert cubic.queue_mean_bytes > 0.5 * setting.buffer_bytes
    assert cubic.marked_fraction == 0
    assert 0.5 * setting.k_bytes < real.queue_mean_bytes < 1.5 * setting.k_bytes
    assert real.found_queue_bytes == pytest.approx(real.queue_mean_bytes, rel=0.3)  # two ways to measure it agree
    assert real.throughput_ratio > 0.95
    assert real.dropped == 0
    assert real.fairness > 0.9
    assert virtual.queue_mean_bytes < real.queue_mean_bytes
    assert virtual.throughput_ratio > 0.9


def sh(namespace, commands):
    """Run a line of shell in the namespace; its output."""
    done = subprocess.run(argv_in(namespace, ["sh", "-ec", commands]), capture_output=True, text=True, check=True)
    return done.stdout


def veth(make_netns):
    """A namespace with a port p0 (10.9.0.1) and an address behind it, 10.9.0.2."""
    namespace = make_netns()
    sh(
        namespace,
        "ip link add p0 type veth peer name p1; ip link set p0 up; ip link set p1 up; "
        "ip addr add 10.9.0.1/24 dev p0; ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev p0 nud permanent; "
        "sysctl -qw net.ipv6.conf.p0.disable_ipv6=1",
    )
    return namespace


def udp_sender(namespace, address):
    """A function that sends one datagram of so many bytes with this TOS byte."""
    sending = call_in(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def send(size_bytes, tos):
        sending.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        sending.sendto(bytes(size_bytes), (address, 9))

    return send


def state(namespace):
    """Everything of traffic control on p0, without counters."""
    return sh(namespace, "tc qdisc show dev p0; tc filter show dev p0 egress; tc filter show dev p0 ingress")
