"""Who may speak: real CURVE handshakes on loopback, and everything that must not get through."""

import socket
from contextlib import closing

import pytest
import zmq

from central.link import CentralLink
from fabricpilot.config import LinkSection
from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.keys import read_pair, read_public
from fabricpilot.wire import Policy, Refused, encode
from hostagent.link import HostLink


def test_a_known_host_is_heard_and_answered(site, central_link, connect, pump, report):
    site.add("h1")
    host = connect("h1")
    run = pump(central_link, host)
    run.until(lambda: run.arrived)
    hello = run.arrived[0]
    assert (hello.host, hello.message.host) == ("h1", "h1")
    assert host.connected
    assert host.trouble == ""
    assert host.send(report("h1"))
    run.until(lambda: len(run.arrived) == 2)
    policy = Policy(epoch=5, thresholds=[1, 2, 3], expiry_s=9.0)
    assert central_link.send([run.arrived[1].peer], policy) == 1
    run.until(lambda: run.heard[host])
    assert run.heard[host] == [policy]
    assert host.silent_s < 5


def test_an_unknown_key_is_refused_until_it_is_added(site, central_link, connect, pump, tmp_path, caplog):
    site.add("h1")
    public = site.folder / "hosts" / "h1.key"
    public.rename(tmp_path / "h1.key")
    host = connect("h1")
    run = pump(central_link, host)
    run.until(lambda: central_link.handshakes["denied"] >= 1 and "does not know" in host.trouble)
    assert not host.connected
    assert run.arrived == []
    assert "no host in" in caplog.text
    (tmp_path / "h1.key").rename(public)
    run.until(lambda: host.connected and run.arrived)
    assert run.arrived[0].host == "h1"


def test_a_host_cannot_speak_as_another_nor_disturb_it(site, central_link, connect, pump, report):
    site.add("victim", "thief")
    victim, thief = connect("victim"), connect("victim", key_of="thief")
    run = pump(central_link, victim, thief)
    run.until(lambda: run.heard[thief] and run.arrived)
    assert isinstance(run.heard[thief][0], Refused)
    assert "key of host 'thief'" in run.heard[thief][0].reason
    thief.send(report("victim"))
    victim.send(report("victim", sequence=77))
    run.until(lambda: len(run.arrived) == 2 and central_link.counters["refused"] == 2)
    assert [arrival.message.host for arrival in run.arrived] == ["victim", "victim"]
    assert run.arrived[1].message.sequence == 77
    assert run.arrived[0].peer == run.arrived[1].peer
    assert central_link.send([run.arrived[0].peer], Policy(epoch=1, thresholds=[1], expiry_s=1)) == 1
    run.until(lambda: run.heard[victim])
    assert thief.counters["refused"] == 2


def test_a_routing_id_of_another_host_takes_nothing_from_it(site, central_link, connect, pump, report):
    """Peers may claim any routing id in the handshake; taking a live one must not cut its owner off."""
    site.add("victim", "thief")
    victim = connect("victim")
    run = pump(central_link, victim)
    run.until(lambda: run.arrived)
    peer = run.arrived[0].peer
    pair = read_pair(site.folder / "hosts" / "thief.key_secret", "key")
    with zmq.Context() as context, context.socket(zmq.DEALER) as claiming:
        claiming.linger = 0
        claiming.curve_serverkey = read_public(site.folder / "central.key", "key")
        claiming.curve_publickey, claiming.curve_secretkey = pair.public, pair.secret
        claiming.routing_id = peer
        claiming.connect(central_link.endpoint)
        claiming.send(encode(report("thief")))
        run.until(lambda: central_link.handshakes["accepted"] == 2)
        run.for_s(0.1)
        assert len(run.arrived) == 1
        victim.send(report("victim"))
        run.until(lambda: len(run.arrived) == 2)
        assert central_link.send([peer], Policy(epoch=1, thresholds=[1], expiry_s=1)) == 1
        run.until(lambda: run.heard[victim])
        assert not claiming.poll(50)


def test_a_removed_key_is_heard_no_more(site, central_link, connect, pump, report):
    site.add("h1")
    host = connect("h1")
    run = pump(central_link, host)
    run.until(lambda: run.arrived)
    (site.folder / "hosts" / "h1.key").unlink()

    def refused():
        host.send(report("h1"))
        return any(isinstance(message, Refused) for message in run.heard[host])

    run.until(refused)
    assert "no longer authorised" in run.heard[host][-1].reason


def test_the_wrong_central_is_not_trusted(site, central_link, connect, pump, tmp_path):
    site.add("h1")
    other = type(site)(tmp_path / "other")
    section = site.host(central_link.endpoint, "h1", central_key=str(other.folder / "central.key"))
    with closing(HostLink(section, "h1", lambda: None)) as host:
        run = pump(central_link, host)
        run.until(lambda: "link.central_key" in host.trouble)
        assert not host.connected
        assert run.arrived == []


def test_clear_text_peers_are_not_heard(site, central_link, pump, report):
    with (
        zmq.Context() as context,
        context.socket(zmq.DEALER) as plain,
        socket.create_connection(central_link.endpoint.removeprefix("tcp://").split(":")) as old,
        socket.create_connection(central_link.endpoint.removeprefix("tcp://").split(":")) as odd,
    ):
        plain.linger = 0
        plain.connect(central_link.endpoint)
        plain.send(encode(report("h1")))
        old.sendall(b"\x01\x00")  # ZMTP 1.0 greeting: an anonymous peer, no mechanism at all
        body = encode(report("h1"))
        old.sendall(b"\xff" + (len(body) + 1).to_bytes(8, "big") + b"\x00" + body)
        odd.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 20)
        run = pump(central_link)
        run.for_s(0.3)
    assert run.arrived == []
    assert central_link.counters["received"] == 0


@pytest.mark.parametrize("listen", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*"])
def test_insecure_central_beyond_loopback(listen):
    with pytest.raises(UsageError, match="loopback only"):
        CentralLink(LinkSection(listen=listen, insecure=True))


@pytest.mark.parametrize("endpoint", ["tcp://10.0.0.1:5555", "tcp://central.example:5555", "tcp://[2001:db8::1]:5555"])
def test_insecure_host_beyond_loopback(endpoint, hello):
    with pytest.raises(UsageError, match="loopback only"):
        HostLink(LinkSection(endpoint=endpoint, insecure=True), "h1", hello)


def test_insecure_on_loopback(pump, hello, report):
    with closing(CentralLink(LinkSection(listen="tcp://127.0.0.1:*", insecure=True))) as link:
        section = LinkSection(endpoint=link.endpoint, insecure=True)
        with closing(HostLink(section, "h1", hello)) as host:
            run = pump(link, host)
            run.until(lambda: run.arrived)
            assert run.arrived[0].host == "h1"
        assert len(link.sockets) == 1


def test_missing_files_and_folders(site, hello, tmp_path):
    site.add("h1")
    with pytest.raises(UsageError, match=r"nokey .*does not exist.*central keys"):
        CentralLink(site.central(key=str(tmp_path / "nokey")))
    with pytest.raises(UsageError, match=r"cannot read .*nofolder.*authorized_keys"):
        CentralLink(site.central(authorized_keys=str(tmp_path / "nofolder")))
    endpoint = "tcp://127.0.0.1:1"
    with pytest.raises(UsageError, match=r"nokey .*link\.key.*does not exist"):
        HostLink(site.host(endpoint, "h1", key=str(tmp_path / "nokey")), "h1", hello)
    with pytest.raises(UsageError, match=r"link\.central_key.*does not exist"):
        HostLink(site.host(endpoint, "h1", central_key=str(tmp_path / "nokey")), "h1", hello)


def test_an_endpoint_in_use(site, central_link):
    with pytest.raises(FabricpilotError, match="another central running"):
        CentralLink(site.central(listen=central_link.endpoint))


def test_an_endpoint_that_is_none(site, hello):
    site.add("h1")
    for wrong in ("127.0.0.1:5555", "tcp://127.0.0.1", "udp://127.0.0.1:1", "tcp://127.0.0.1:port", "tcp://:5555x"):
        with pytest.raises(UsageError, match=r"link\.listen"):
            CentralLink(site.central(listen=wrong))
        with pytest.raises(UsageError, match=r"link\.endpoint"):
            HostLink(site.host(wrong, "h1"), "h1", hello)


def test_broken_key_files_in_the_folder_do_not_stop_the_others(site, connect, pump, caplog):
    site.add("h1", "twin")
    hosts = site.folder / "hosts"
    (hosts / "broken.key").write_text("no key here")
    (hosts / "twin.key").write_bytes((hosts / "h1.key").read_bytes())
    (hosts / "-x.key").write_bytes((hosts / "h1.key").read_bytes())
    (hosts / ".hidden.key").write_text("an editor's")
    with closing(CentralLink(site.central())) as link:
        run = pump(link, connect("h1", link=link))
        run.until(lambda: run.arrived)
    assert "broken.key" in caplog.text
    assert "every host needs its own" in caplog.text
    assert "hidden" not in caplog.text
