"""A site with keys, links on loopback, and a way to turn them until something holds."""

import time
from contextlib import closing

import pytest

from central.link import CentralLink
from fabricpilot.config import LinkSection
from fabricpilot.histogram import LogHistogram
from fabricpilot.keys import plan_pairs, write_pair
from fabricpilot.wire import FlowSummary, Hello, Report
from hostagent.link import HostLink


class Site:
    """Keys of a central and its hosts, and sections that use them."""

    def __init__(self, folder):
        self.folder = folder
        self.add()
        (folder / "hosts").mkdir()

    def add(self, *hosts):
        for planned in plan_pairs(self.folder, hosts):
            if not planned.exists:
                write_pair(planned)

    def central(self, **other):
        given = {
            "listen": "tcp://127.0.0.1:*",
            "key": str(self.folder / "central.key_secret"),
            "authorized_keys": str(self.folder / "hosts"),
        }
        return LinkSection(**(given | other))

    def host(self, endpoint, key_of, **other):
        given = {
            "endpoint": endpoint,
            "key": str(self.folder / "hosts" / f"{key_of}.key_secret"),
            "central_key": str(self.folder / "central.key"),
        }
        return LinkSection(**(given | other))


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "keys")


@pytest.fixture
def central_link(site):
    with closing(CentralLink(site.central())) as link:
        yield link


@pytest.fixture
def connect(site, central_link):
    """Connect a host: connect("h1") uses h1's key; connect("h1", key_of="h2") that of another."""
    links = []

    def make(name, key_of=None, link=None, **hello_fields):
        opened = HostLink(
            site.host((link or central_link).endpoint, key_of or name), name, lambda: make_hello(name, **hello_fields)
        )
        links.append(opened)
        return opened

    yield make
    for link in links:
        link.close()


def make_hello(host="h1", **fields):
    given = {
        "group": "web",
        "levels": 4,
        "backend": "fake",
        "queues": "none",
        "link_rate_bps": 10**9,
        "epoch": 0,
        "thresholds": [100, 1000, 10000],
        "version": "0",
    }
    return Hello(host=host, **(given | fields))


def make_report(host="h1", sequence=1, sizes=(), durations=(), long_sizes=(), **fields):
    given = {
        "interval_ns": 10**9,
        "epoch": 0,
        "sent_bytes": 10**7,
        "finished": len(sizes),
        "finished_sample": [],
        "long": len(long_sizes),
        "active": 5,
        "counters": {},
    }
    return Report(
        host=host,
        sequence=sequence,
        sizes=LogHistogram.of(sizes).sparse() if len(sizes) else {},
        durations=LogHistogram.of(durations).sparse() if len(durations) else {},
        long_flows=[FlowSummary("10.0.0.1", "10.0.0.2", 1, 2, 6, size, 1000, 3) for size in long_sizes],
        **(given | fields),
    )


class Pump:
    """Turns a central link and host links until a condition holds; keeps what each of them received."""

    def __init__(self, central, *hosts):
        self.central = central
        self.hosts = hosts
        self.arrived = []
        self.heard = {host: [] for host in hosts}

    def turn(self):
        if self.central is not None:
            self.arrived += self.central.receive()
        for host in self.hosts:
            self.heard[host] += host.receive()
        time.sleep(0.002)

    def until(self, condition, limit_s=20.0):
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, "it never happened"
            self.turn()

    def for_s(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.turn()


@pytest.fixture
def pump():
    return Pump


@pytest.fixture
def hello():
    return make_hello


@pytest.fixture
def report():
    return make_report
