"""The link under garbage, restarts and crowds."""

import os
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import zmq

from central.link import CentralLink
from fabricpilot.config import LinkSection
from fabricpilot.wire import MAX_MESSAGE_BYTES, Ack, Identify, Policy, encode
from hostagent.link import HostLink


@pytest.fixture
def open_link():
    with closing(CentralLink(LinkSection(listen="tcp://127.0.0.1:*", insecure=True))) as link:
        yield link


@pytest.fixture
def host(open_link, hello):
    with closing(HostLink(LinkSection(endpoint=open_link.endpoint, insecure=True), "h1", hello)) as link:
        yield link


def test_garbage_from_a_host_is_counted(open_link, host, pump, report):
    run = pump(open_link, host)
    run.until(lambda: run.arrived)
    for frames in ([os.urandom(200)], [b""], [b"\x92\x01\xc0"], [b"a", b"b"], [encode(Ack(epoch=1))]):
        host.socket.send_multipart(frames)
    host.send(report("h1"))
    run.until(lambda: len(run.arrived) == 2)
    assert open_link.counters["malformed"] == 5


def test_garbage_from_central_is_counted(open_link, host, pump):
    run = pump(open_link, host)
    run.until(lambda: run.arrived)
    router, peer = open_link.sockets[0], run.arrived[0].peer
    wrong = [[os.urandom(100)], [b"a", b"b"], [encode(run.arrived[0].message)]]
    unsorted = {"type": "policy", "epoch": 1, "thresholds": [3, 2, 1], "expiry_s": 1.0}
    wrong.append([msgspec.msgpack.encode([1, unsorted])])
    for frames in wrong:
        router.send_multipart([peer, *frames])
    open_link.send([peer], Policy(epoch=1, thresholds=[5], expiry_s=1))
    run.until(lambda: run.heard[host])
    assert host.counters["malformed"] == len(wrong)
    assert [message.epoch for message in run.heard[host]] == [1]


def test_a_frame_beyond_the_limit_costs_its_sender_the_connection(open_link, host, pump):
    run = pump(open_link, host)
    run.until(lambda: run.arrived)
    host.socket.send(b"x" * (MAX_MESSAGE_BYTES + 1))
    run.until(lambda: host.counters["losses"] == 1)
    run.until(lambda: host.connected and len(run.arrived) == 2)  # it may come back, and says who it is


def test_identify_is_answered_with_hello(open_link, host, pump):
    run = pump(open_link, host)
    run.until(lambda: run.arrived)
    open_link.send([run.arrived[0].peer], Identify())
    run.until(lambda: len(run.arrived) == 2)
    assert run.arrived[1].message == run.arrived[0].message
    assert run.heard[host] == []


def test_sending_without_a_central_drops_and_never_blocks(hello, report):
    with closing(HostLink(LinkSection(endpoint="tcp://127.0.0.1:1", insecure=True), "h1", hello)) as host:
        begin = time.monotonic()
        assert not any(host.send(report("h1")) for _ in range(100))
        assert time.monotonic() - begin < 5
        assert host.counters["dropped"] == 100
        assert host.receive() == []
        assert host.silent_s is None


def test_a_central_that_does_not_read_costs_drops_only(hello, report):
    """A peer that accepts and never reads: the queues fill, then reports are dropped."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as deaf:
        deaf.rcvhwm = 1
        deaf.rcvbuf = 4096
        deaf.linger = 0
        port = deaf.bind_to_random_port("tcp://127.0.0.1")
        section = LinkSection(endpoint=f"tcp://127.0.0.1:{port}", insecure=True)
        with closing(HostLink(section, "h1", hello)) as host:
            big = report("h1", long_sizes=[10**9] * 256)
            end = time.monotonic() + 20
            while not host.counters["dropped"] > 50 or not host.connected:
                assert time.monotonic() < end
                host.send(big)
            assert host.connected


def test_central_restarts_and_hosts_introduce_themselves_again(hello, pump):
    with closing(CentralLink(LinkSection(listen="tcp://127.0.0.1:*", insecure=True))) as first:
        endpoint = first.endpoint
        hosts = [HostLink(LinkSection(endpoint=endpoint, insecure=True), "h1", hello) for _ in range(3)]
        run = pump(first, *hosts)
        run.until(lambda: len(run.arrived) == 3)
    run = pump(None, *hosts)
    run.until(lambda: not any(host.connected for host in hosts))
    assert all(host.trouble for host in hosts)
    with closing(CentralLink(LinkSection(listen=endpoint, insecure=True))) as second:
        run = pump(second, *hosts)
        run.until(lambda: len(run.arrived) == 3)
        run.for_s(0.1)
        assert len(run.arrived) == 3
    for host in hosts:
        assert host.counters["connects"] == 2
        host.close()


def test_a_host_restarts_under_its_name(site, central_link, connect, pump, report):
    site.add("h1")
    before = connect("h1")
    run = pump(central_link, before)
    run.until(lambda: run.arrived)
    before.close()
    after = connect("h1")
    run = pump(central_link, after)
    run.until(lambda: run.arrived)
    assert after.send(report("h1"))
    run.until(lambda: len(run.arrived) == 2)
    assert central_link.send([run.arrived[1].peer], Policy(epoch=1, thresholds=[1], expiry_s=1)) == 1
    run.until(lambda: run.heard[after])


def test_sending_to_a_host_that_left_is_counted(open_link, host, pump):
    run = pump(open_link, host)
    run.until(lambda: run.arrived)
    peer = run.arrived[0].peer
    host.close()
    policy = Policy(epoch=1, thresholds=[1], expiry_s=1)
    run = pump(open_link)
    run.until(lambda: open_link.send([peer], policy) == 0)
    assert open_link.counters["unreachable"] == 1


def test_reconnecting_leaks_no_descriptor(hello, pump):
    counts = []
    with closing(CentralLink(LinkSection(listen="tcp://127.0.0.1:*", insecure=True))) as link:
        endpoint = link.endpoint
        host = HostLink(LinkSection(endpoint=endpoint, insecure=True), "h1", hello)
        pump(link, host).until(lambda: host.connected)
    for _ in range(6):
        pump(None, host).until(lambda: not host.connected)
        host._retry_at = 0.0
        with closing(CentralLink(LinkSection(listen=endpoint, insecure=True))) as link:
            pump(link, host).until(lambda: host.connected)
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
    host.close()
    assert counts[-1] <= counts[1]


def test_200_hosts(open_link, hello, report, pump):
    names = [f"h{n}" for n in range(200)]
    section = LinkSection(endpoint=open_link.endpoint, insecure=True)
    with zmq.Context() as context:
        context.max_sockets = 2000
        hosts = [HostLink(section, name, lambda name=name: hello(name), context=context) for name in names]
        try:
            run = pump(open_link, *hosts)
            run.until(lambda: len(run.arrived) == 200)
            peers = {arrival.host: arrival.peer for arrival in run.arrived}
            assert sorted(peers) == sorted(names)
            for host, name in zip(hosts, names, strict=True):
                assert host.send(report(name))
            run.until(lambda: len(run.arrived) == 400)
            assert open_link.send(peers.values(), Policy(epoch=9, thresholds=[1], expiry_s=1)) == 200
            run.until(lambda: all(run.heard[host] for host in hosts))
        finally:
            for host in hosts:
                host.close()
