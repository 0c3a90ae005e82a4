"""The bands under real traffic: a long flow yields to a short one at once, and gets the link back."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest
from pyroute2 import IPRoute, netns

from fabricpilot.config import QueuesSection
from hostagent.qdisc import install, plan_queues, supported_kinds
from hostagent.qdisc.plan import KERNEL_OPTION

RATE_BPS = 100_000_000
WARM_UP_S, CONTEST_S = 0.8, 1.2


class Pair:
    """Two namespaces joined by a veth; `left` is the host whose NIC gets the queues."""

    def __init__(self, left, right):
        self.left, self.right = left, right
        with IPRoute(netns=left) as ipr:
            ipr.link("add", ifname="nic", kind="veth", peer={"ifname": "nic", "net_ns_fd": right})
        for name, address in ((left, "10.9.0.1"), (right, "10.9.0.2")):
            with IPRoute(netns=name) as ipr:
                index = ipr.link_lookup(ifname="nic")[0]
                ipr.addr("add", index=index, address=address, prefixlen=24)
                ipr.link("set", index=index, state="up")
                ipr.link("set", index=ipr.link_lookup(ifname="lo")[0], state="up")

    def socket(self, name, kind):
        netns.pushns(name)
        try:
            return socket.socket(socket.AF_INET, kind)
        finally:
            netns.popns()


@pytest.fixture
def pair(make_netns):
    return Pair(make_netns("left"), make_netns("right"))


class Flow(threading.Thread):
    """A TCP connection that sends as fast as it may; `received` holds (time, bytes) at the receiver."""

    def __init__(self, pair, port, priority):
        super().__init__(daemon=True)
        self.received = []
        self.stop = threading.Event()
        listener = pair.socket(pair.right, socket.SOCK_STREAM)
        listener.bind(("10.9.0.2", port))
        listener.listen(1)
        self.sender = pair.socket(pair.left, socket.SOCK_STREAM)
        self.sender.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        self.sender.settimeout(5)
        self.sender.connect(("10.9.0.2", port))
        self.receiver, _ = listener.accept()
        self.receiver.settimeout(0.5)
        listener.close()
        self.reader = threading.Thread(target=self._read, daemon=True)

    def run(self):
        self.reader.start()
        block = bytes(32768)
        while not self.stop.is_set():
            try:
                self.sender.send(block)
            except OSError:
                break

    def _read(self):
        while not self.stop.is_set():
            try:
                count = len(self.receiver.recv(65536))
            except OSError:
                continue
            if count == 0:
                break
            self.received.append((time.monotonic(), count))

    def finish(self):
        self.stop.set()
        self.join(5)
        self.reader.join(5)
        self.sender.close()
        self.receiver.close()

    def mbps(self, start, end):
        return sum(count for at, count in self.received if start <= at < end) * 8e-6 / (end - start)


def contest(pair, priority):
    """Rates of the last level (alone, under contest, alone again) and of the first level under contest, Mbit/s."""
    last = Flow(pair, 5001, priority[-1])
    first = Flow(pair, 5000, priority[0])
    last.start()
    time.sleep(WARM_UP_S)
    begin = time.monotonic()
    first.start()
    time.sleep(CONTEST_S)
    end = time.monotonic()
    first.finish()
    time.sleep(1.0)
    done = time.monotonic()
    last.finish()
    settled = begin + 0.4  # what the last level had queued in the NIC and the sockets has drained by then
    result = {
        "last_alone": last.mbps(begin - 0.5, begin),
        "last_contested": last.mbps(settled, end),
        "first_contested": first.mbps(settled, end),
        "last_after": last.mbps(end + 0.4, done),
    }
    if os.environ.get("SHOW"):
        print(json.dumps(result))
    return result


def packets_by_level(pair):
    """Packets that left through each band so far; a band is a child of fab:."""
    shown = subprocess.run(
        ["tc", "-n", pair.left, "-s", "-j", "qdisc", "show", "dev", "nic"], check=True, capture_output=True, text=True
    )
    found = {q["parent"]: q["packets"] for q in json.loads(shown.stdout) if "parent" in q}
    return [found[f"fab:{level + 1:x}"] for level in range(len(found))]


def put_queues(pair, kind, run_dir, levels=4):
    with IPRoute(netns=pair.left) as ipr:
        if kind not in supported_kinds(ipr):
            pytest.skip(f"this kernel lacks {KERNEL_OPTION[kind]}")
        plan = plan_queues("nic", QueuesSection(kind=kind, link_rate=str(RATE_BPS)), levels, ipr)
        install(plan, "nic", ipr, run_dir)
    return plan


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_htb_serves_the_first_level_first(pair, tmp_path, levels):
    plan = put_queues(pair, "htb", tmp_path, levels)
    rates = contest(pair, plan.priority)
    assert 80 < rates["last_alone"] < 105
    assert rates["first_contested"] > 80
    assert rates["last_contested"] < 10
    assert rates["last_after"] > 75


def send(pair, count=5, **options):
    with pair.socket(pair.left, socket.SOCK_DGRAM) as sock:
        if "dscp" in options:  # this also sets the socket's priority, so it comes first
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, options["dscp"] << 2)
        if "priority" in options:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, options["priority"])
        for _ in range(count):
            sock.sendto(b"x" * 100, ("10.9.0.2", 9))


@pytest.mark.parametrize("levels", [2, 4, 8])
@pytest.mark.parametrize("kind", ["prio", "htb"])
def test_a_priority_reaches_its_level_and_the_unmarked_the_last(pair, tmp_path, kind, levels):
    plan = put_queues(pair, kind, tmp_path, levels)
    cases = [({"priority": priority}, level) for level, priority in enumerate(plan.priority)]
    # No level: last. A local priority (SO_PRIORITY up to 6 needs no right) is none of ours. Network control: first.
    cases += [({}, levels - 1), ({"priority": 6}, levels - 1), ({"dscp": 46}, levels - 1), ({"dscp": 48}, 0)]
    # A level's priority counts more than a DSCP.
    cases += [({"dscp": 48, "priority": plan.priority[-1]}, levels - 1)]
    send(pair, 1)
    for options, level in cases:
        before = packets_by_level(pair)
        send(pair, **options)
        gained = [after - was for after, was in zip(packets_by_level(pair), before, strict=True)]
        # The kernel itself may send a solicitation or a multicast report meanwhile.
        assert [band for band, packets in enumerate(gained) if packets >= 5] == [level], options


def test_arp_is_first(pair, tmp_path):
    put_queues(pair, "htb", tmp_path)
    subprocess.run(["ip", "-n", pair.left, "neigh", "flush", "dev", "nic"], check=True)
    subprocess.run(["ip", "-n", pair.left, "link", "set", "nic", "arp", "off"], check=True)
    subprocess.run(["ip", "-n", pair.left, "link", "set", "nic", "arp", "on"], check=True)
    before = packets_by_level(pair)
    send(pair, 1)
    gained = [after - was for after, was in zip(packets_by_level(pair), before, strict=True)]
    assert gained[0] >= 1


def test_pfifo_fast_puts_levels_into_their_bands(pair, tmp_path):
    """Its bands have no counters, so order tells: behind a slow shaper, what came last at level 0 leaves first."""
    plan = put_queues(pair, "pfifo_fast", tmp_path)
    assert plan.priority == (7, 0, 0, 2)
    tc = ["tc", "-n", pair.left]
    with IPRoute(netns=pair.left) as ipr:
        if "htb" not in supported_kinds(ipr):
            pytest.skip(f"this kernel lacks {KERNEL_OPTION['htb']}")
    for words in (
        "qdisc replace dev nic root handle 1: htb default 1",
        "class add dev nic parent 1: classid 1:1 htb rate 1mbit burst 200 quantum 60000",
        "qdisc add dev nic parent 1:1 handle 2: pfifo_fast",
    ):
        subprocess.run([*tc, *words.split()], check=True)
    with pair.socket(pair.right, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("10.9.0.2", 9))
        receiver.settimeout(5)
        for level in (3, 2, 1, 0):
            for _ in range(4):
                with pair.socket(pair.left, socket.SOCK_DGRAM) as sender:
                    sender.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, plan.priority[level])
                    sender.sendto(bytes([level]) + b"x" * 1000, ("10.9.0.2", 9))
        order = [receiver.recv(2000)[0] for _ in range(16)]
    # The first packets leave before the queue builds up.
    assert order[-4:] == [3, 3, 3, 3] or order[-3:] == [3, 3, 3]
    assert order.index(0) <= 3
    assert [level for level in order if level in (1, 2)] == [2, 2, 2, 2, 1, 1, 1, 1]
