"""What real devices make of packets: BIG TCP, containers bridged and routed. VLAN tags: test_datapath_frames.py."""

from dataclasses import replace
from pathlib import Path

import pytest
from datapath_kit import in_netns, run
from datapath_wire import ADDRESSES, PORT, SETTINGS, Host, captured, first_time, transfer

from hostagent.datapath.base import FLAG_SAW_MESSAGE

SIZE_BYTES = 3_000_000


def flow(host: Host):
    """The state of the one flow to the receiver's port."""
    table = host.datapath.flows()
    [row] = [row for row in range(len(table)) if table.keys["destination_port"][row] == PORT]
    return table.states[row]


def assert_all_levels_in_order(host: Host, capture) -> None:
    """The flow sank through all levels, and every byte was counted."""
    levels = [SETTINGS.dscp.index(seen.dscp) for _, seen in first_time(capture.packets)]
    assert set(levels) == set(range(4))
    assert levels == sorted(levels)
    assert flow(host)["attained_bytes"] == SIZE_BYTES
    assert flow(host)["flags"] & FLAG_SAW_MESSAGE
    assert host.datapath.counters()["untracked_malformed"] == 0


def test_big_tcp(host):
    """GSO packets beyond 64 KB: the IP length is 0, and there may be a jumbo option."""
    for netns in (host.sender, host.receiver):
        run("ip", "link", "set", "nic0", "gso_max_size", "180000", netns=netns)
    with captured(host.receiver):
        transfer(host, 6, SIZE_BYTES)
    assert flow(host)["attained_bytes"] >= SIZE_BYTES
    assert flow(host)["packets"] > SIZE_BYTES // 1500
    counters = host.datapath.counters()
    assert (counters["untracked_malformed"], counters["untracked_extension_header"]) == (0, 0)


@pytest.fixture
def container(host, make_netns):
    """A namespace with a cable into the scheduled host, not connected any further."""
    name = make_netns("box")
    run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "eth0", "netns", name, netns=host.sender)
    for netns, device in ((host.sender, "cable"), (name, "eth0"), (name, "lo")):
        run("ip", "link", "set", device, "up", netns=netns)
    return name


@pytest.fixture
def bridged(host, container):
    """The container is on the same network as the host, by a bridge."""
    run("ip", "link", "add", "br0", "type", "bridge", netns=host.sender)
    for device in ("nic0", "cable"):
        run("ip", "link", "set", device, "master", "br0", netns=host.sender)
    run("ip", "link", "set", "br0", "up", netns=host.sender)
    run("ip", "address", "add", "10.77.0.3/24", "dev", "eth0", netns=container)
    return Host(container, host.receiver, host.datapath)


@pytest.fixture
def routed(host, container):
    """The container is on a network of its own, which the host forwards."""
    run("ip", "address", "add", "10.79.0.1/24", "dev", "cable", netns=host.sender)
    run("ip", "address", "add", "10.79.0.2/24", "dev", "eth0", netns=container)
    run("ip", "route", "add", "default", "via", "10.79.0.1", netns=container)
    run("ip", "route", "add", "10.79.0.0/24", "via", ADDRESSES[4][0], netns=host.receiver)
    with in_netns(host.sender):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    return Host(container, host.receiver, host.datapath)


@pytest.mark.parametrize("use_backlog", [False, True], ids=["attained", "backlog"])
@pytest.mark.parametrize("network", ["bridged", "routed"])
def test_a_container_is_scheduled_at_the_hosts_nic(request, host, network, use_backlog):
    box = request.getfixturevalue(network)
    host.datapath.apply(replace(SETTINGS, use_backlog=use_backlog))
    with captured(host.receiver) as capture:
        transfer(box, 4, SIZE_BYTES)
    assert_all_levels_in_order(host, capture)
