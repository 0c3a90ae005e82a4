"""The bands under real traffic: a long flow yields to a short one at once, and gets the link back."""

import json
import os
import socket
import threading
import time

import pytest
from pyroute2 import IPRoute, netns

from fabricpilot.config import QueuesSection
from hostagent.qdisc import install, plan_queues

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


def put_queues(pair, kind, run_dir, levels=4):
    with IPRoute(netns=pair.left) as ipr:
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
