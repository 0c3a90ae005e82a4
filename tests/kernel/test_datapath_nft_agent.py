"""`fabricpilot agent --backend nftables` as an operator meets it: under traffic, killed, restarted, detached."""

import contextlib
import json
import re
import signal
import socket
import struct
import sys
import threading
import time

import pytest
from agent_kit import FABRICPILOT, AgentHost, end, wait_for
from datapath_kit import in_netns, run
from nft_kit import NIC, REFUSE_BPF, wire_up

from fabricpilot.levels import Thresholds, default_dscp

THRESHOLDS = Thresholds((20_000, 200_000, 1_000_000))
DSCP = default_dscp(4)
OURS, THEIRS, PORT = "192.0.2.1", "192.0.2.2", 5201
STEP_BYTES = 1000
# How far from its threshold a level may begin: two packets, and 2 %. The translation of thresholds is exact for
# full-size packets; these are smaller, so headers weigh 1.6 % more.
TOLERANCE_BYTES, TOLERANCE = 2 * 1500, 0.02


class Host(AgentHost):
    """A namespace whose NIC is scheduled, a peer, and commands run in the first."""

    def __init__(self, name, peer, directory):
        super().__init__(name, directory, "--pin-dir", str(directory / "pins"), "-i", NIC)
        self.peer = peer
        wire_up(name, peer)
        run("ip", "link", "set", NIC, "arp", "on", netns=name)

    def state(self):
        sysctls = ("net.netfilter.nf_conntrack_acct", "net.netfilter.nf_conntrack_timestamp")
        return [
            run("tc", "qdisc", "show", "dev", NIC, netns=self.name),
            run("tc", "class", "show", "dev", NIC, netns=self.name),
            run("nft", "list", "ruleset", netns=self.name),
            run("sysctl", *sysctls, netns=self.name),
        ]


@pytest.fixture
def host(make_netns, tmp_path):
    made = Host(make_netns("host"), make_netns("peer"), tmp_path)
    yield made
    made.close()


@contextlib.contextmanager
def flow_on_the_wire(host):
    """A TCP flow of small writes; yields what was sent so far and what arrived: (DSCP, payload bytes) per packet."""
    seen, sent, stop = [], [0], threading.Event()
    with in_netns(host.peer):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        tap.settimeout(0.2)
        listening = socket.create_server((THEIRS, PORT))
    with in_netns(host.name):
        sending = socket.create_connection((THEIRS, PORT))
    sending.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    receiving = listening.accept()[0]

    def capture():
        while not stop.is_set() or time.monotonic() < ends[0]:
            with contextlib.suppress(TimeoutError):
                frame = tap.recv(65536)
                total, tcp = struct.unpack_from("!H", frame, 16)[0], 14 + (frame[14] & 15) * 4
                if frame[23] == 6 and struct.unpack_from("!H", frame, tcp + 2)[0] == PORT:
                    seen.append((frame[15] >> 2, total - (tcp - 14) - (frame[tcp + 12] >> 4) * 4))

    def write():
        while not stop.is_set():
            sending.sendall(bytes(STEP_BYTES))
            sent[0] += STEP_BYTES
            time.sleep(0.0005)

    def drain():
        while receiving.recv(65536):
            pass

    ends = [0.0]
    threads = [threading.Thread(target=work, daemon=True) for work in (capture, write, drain)]
    for thread in threads:
        thread.start()
    try:
        yield sent, seen
    finally:
        ends[0] = time.monotonic() + 0.5
        stop.set()
        for thread in threads[:2]:
            thread.join()
        for one in (sending, receiving, listening, tap):
            one.close()


def assert_levels_begin_where_they_should(seen):
    attained, begins = 0, {}
    for dscp, payload in seen:
        if payload:
            begins.setdefault(dscp, attained)
            assert dscp in DSCP
        else:
            assert dscp == DSCP[0]
        attained += payload
    assert list(begins) == list(DSCP)  # each level, in order, and never back
    for threshold, dscp in zip(THRESHOLDS.bytes, DSCP[1:], strict=True):
        assert abs(begins[dscp] - threshold) <= TOLERANCE_BYTES + TOLERANCE * threshold, begins
    return attained


def test_levels_by_attained_bytes_and_a_killed_agents_data_path_is_adopted(host):
    before = host.state()
    thresholds = ",".join(map(str, THRESHOLDS.bytes))
    first = host.start("--backend", "nftables", "--thresholds", thresholds)
    with flow_on_the_wire(host) as (sent, seen):
        wait_for(lambda: sent[0] >= 100_000)
        end(first, signal.SIGKILL)
        wait_for(lambda: sent[0] >= 400_000)  # passes the second threshold with no agent there
        assert host.status()["agent"] == "not running"
        second = host.start("--backend", "nftables")
        adopted = host.status()["datapath"]
        assert (adopted["backend"], adopted["adopted"]) == ("nftables", True)
        assert adopted["thresholds"] == list(THRESHOLDS.bytes)
        wait_for(lambda: sent[0] >= 1_300_000)
        [listed] = json.loads(host.agent("dump", "--backend", "nftables", "--json").stdout)["flows"]
        assert listed["size_bytes"] >= 1_300_000 - STEP_BYTES  # counted on while no agent was there
        assert listed["level"] == 3
    assert assert_levels_begin_where_they_should(seen) >= sent[0]
    assert end(second) == 0
    assert host.state() != before
    # Without --backend: `auto` finds what is attached.
    assert "nftables data path removed" in host.agent("detach").stdout
    assert host.state() == before


def test_packets_take_the_queue_of_their_level(host):
    process = host.start("--backend", "nftables", "--thresholds", ",".join(map(str, THRESHOLDS.bytes)))
    with flow_on_the_wire(host) as (sent, _):
        wait_for(lambda: sent[0] >= 1_300_000)
    listed = run("tc", "-s", "class", "show", "dev", NIC, netns=host.name)
    packets = [int(count) for count in re.findall(r"class htb \S+ parent.*\n Sent \d+ bytes (\d+) pkt", listed)]
    assert len(packets) == 4
    # 20, 180 and 800 packets on the first three, acknowledgements beside them, the rest on the last.
    assert all(count >= least for count, least in zip(packets, (20, 170, 750, 250), strict=True)), packets
    end(process)


def test_run_says_that_auto_fell_back(host):
    code = f"{REFUSE_BPF}\nimport os, sys\nos.execv({FABRICPILOT!r}, [{FABRICPILOT!r}, *sys.argv[1:]])"
    process = host.start(program=(sys.executable, "-c", code))
    assert host.status()["datapath"]["backend"] == "nftables"
    end(process)
    log = host.log_path.read_text()
    assert "bpf(2) is refused (lockdown, a seccomp filter, or no CAP_BPF): the nftables data path is used" in log
