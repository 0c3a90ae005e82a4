"""Interfaces that come, go, and change their names while the agent runs; and a thousand of them at once."""

import logging
import subprocess
import time
from pathlib import Path

import pytest
from agent_kit import AgentHost, end, wait_for
from datapath_kit import bpf_file_system, in_netns, our_programs, run, take_off
from pyroute2 import IPRoute

from fabricpilot.config import AgentConfig, load
from fabricpilot.errors import UsageError
from hostagent.lifecycle import bring_up, take_down
from hostagent.nics import LinkWatch


class Host:
    """An agent's data path in a namespace, entered; its roster is driven by hand."""

    def __init__(self, directory: Path, pins: Path, hook: str):
        self.run_dir, self.pins, self.hook = directory / "run", pins, hook
        self.ipr = IPRoute()
        self.scheduled = None

    def start(self, *interfaces: str, **settings: object) -> None:
        given = {
            "host.interfaces": list(interfaces),
            "host.run_dir": str(self.run_dir),
            "datapath.pin_dir": str(self.pins / "fabricpilot"),
            "datapath.flow_entries": 4096,
            "datapath.hook": self.hook,
            "queues.link_rate": "100Mbit",
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        self.config = load(AgentConfig, None, given, {})
        self.scheduled = bring_up(self.config, self.ipr)
        self.roster = self.scheduled.roster
        self.follow()

    def follow(self) -> int:
        """What the agent's loop does after an event; returns how many rounds it took."""
        self.roster.on_event()
        rounds = 0
        while self.roster.busy:
            self.roster.step()
            rounds += 1
        return rounds

    def stop(self) -> None:
        if self.scheduled is not None:
            self.roster.close()
            self.scheduled.flow_control.close()
            self.scheduled.datapath.close()
            self.scheduled = None

    def close(self) -> None:
        self.stop()
        take_down(self.config, self.ipr)
        self.ipr.close()

    def records(self) -> list[str]:
        return sorted(path.name for path in self.run_dir.glob("qdisc-*"))

    def noted(self) -> dict[int, bool]:
        return self.scheduled.datapath._pins.interfaces()


@pytest.fixture
def hook():
    """Of the tests that do not say otherwise."""
    return "auto"


@pytest.fixture
def host(make_netns, tmp_path, hook, loaded_once):
    with bpf_file_system(tmp_path / "bpf") as pins, in_netns(make_netns("host")):
        made = Host(tmp_path, pins, hook)
        yield made
        made.close()


def add(name: str, peer: str) -> None:
    run("ip", "link", "add", name, "type", "veth", "peer", "name", peer)


BY_BOTH = pytest.mark.parametrize("hook", ["auto", "clsact"])


def programs(name: str) -> int:
    return len(our_programs(name))


def has_queues(name: str) -> bool:
    return " fab: root" in run("tc", "qdisc", "show", "dev", name)


def test_a_missing_interface_is_an_error_unless_it_is_waited_for(host):
    with pytest.raises(UsageError, match=r"'nic0' does not exist; .*wait_for_interfaces"):
        host.start("nic0")
    host.start("nic0", host__wait_for_interfaces=True)
    assert host.roster.names == []
    assert host.roster.status()["waiting_for"] == ["nic0"]
    assert host.roster.priority is None
    add("nic0", "nic1")
    host.follow()
    assert host.roster.names == ["nic0"]
    assert (programs("nic0"), has_queues("nic0")) == (1, True)
    assert host.roster.priority == host.scheduled.queues["nic0"].priority
    assert host.roster.link_rate_bps == 100_000_000
    assert host.roster.status()["waiting_for"] == []


def test_one_that_goes_is_forgotten_and_a_new_one_of_its_name_is_new(host, caplog):
    add("nic0", "nic1")
    host.start("nic0")
    [index], [record] = host.noted(), host.records()
    run("ip", "link", "del", "nic0")
    with caplog.at_level(logging.INFO):
        host.follow()
    assert (host.roster.names, host.noted(), host.records(), host.scheduled.queues) == ([], {}, [], {})
    assert [r.getMessage() for r in caplog.records if "nic0" in r.getMessage()] == ["nic0 is gone"]
    add("nic0", "nic1")
    host.follow()
    [again] = host.noted()
    assert again != index
    assert host.records() != [record]
    assert (programs("nic0"), has_queues("nic0")) == (1, True)


@BY_BOTH
def test_gone_and_back_between_two_looks(host):
    """Also when the new one gets the old one's index, so that only the event tells them apart."""
    add("nic0", "nic1")
    host.start("nic0")
    [index] = host.noted()
    run("ip", "link", "del", "nic0")
    run("ip", "link", "add", "nic0", "index", str(index), "type", "veth", "peer", "name", "nic1")
    assert programs("nic0") == 0
    host.follow()
    assert (programs("nic0"), has_queues("nic0"), list(host.noted())) == (1, True, [index])


def test_down_and_up_keep_everything(host):
    add("nic0", "nic1")
    host.start("nic0")
    before = our_programs("nic0")
    for state, down in (("up", []), ("down", ["nic0"]), ("up", [])):
        run("ip", "link", "set", "nic0", state)
        host.follow()
        assert host.roster.status()["down"] == down
        assert (programs("nic0"), has_queues("nic0")) == (1, True)
    assert our_programs("nic0") == before


@BY_BOTH
def test_a_renamed_one_stays_or_is_let_go_as_its_new_name_says(host):
    add("nic0", "other")
    run("tc", "qdisc", "replace", "dev", "nic0", "root", "handle", "7:", "bfifo", "limit", "123456")
    host.start("nic*", queues__replace_foreign=True)
    assert host.roster.names == ["nic0"]
    before = our_programs("nic0")
    run("ip", "link", "set", "nic0", "name", "nic9")
    host.follow()
    assert host.roster.names == ["nic9"]
    assert our_programs("nic9") == before
    assert list(host.scheduled.queues) == ["nic9"]
    run("ip", "link", "set", "nic9", "name", "unwanted")
    host.follow()
    assert (host.roster.names, host.noted(), host.records()) == ([], {}, [])
    assert programs("unwanted") == 0
    assert "clsact" not in run("tc", "qdisc", "show", "dev", "unwanted")
    assert "bfifo 7:" in run("tc", "qdisc", "show", "dev", "unwanted")
    run("ip", "link", "set", "unwanted", "name", "nic0")
    host.follow()
    assert host.roster.names == ["nic0"]


def test_patterns_take_what_can_be_scheduled_and_tag_only_keeps_queues(host):
    add("nic0", "peer0")
    add("veth1", "peer1")
    run("ip", "tuntap", "add", "dev", "tap1", "mode", "tap")
    run("ip", "tuntap", "add", "dev", "veth-tun", "mode", "tun")  # no Ethernet header
    host.start("*")
    assert host.roster.names == ["nic0", "peer0", "peer1", "tap1", "veth1"]  # and not lo
    assert [name for name in host.roster.names if has_queues(name)] == ["nic0", "peer0", "peer1"]
    assert all(programs(name) == 1 for name in host.roster.names)
    assert host.roster.status()["tag_only"] == 2
    host.stop()
    host.start("veth1")  # named in full: queues; and nothing else is configured any more
    assert host.roster.names == ["veth1"]
    assert has_queues("veth1")
    for name in ("nic0", "peer0", "peer1", "tap1"):
        assert (programs(name), has_queues(name)) == (0, False)


@pytest.mark.parametrize("hook", ["clsact"])
def test_one_that_cannot_be_scheduled_is_told_once_and_tried_again(host, caplog, monkeypatch):
    host.start("nic*")
    add("nic0", "other")
    run("tc", "qdisc", "add", "dev", "nic0", "ingress")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            host.follow()
            time.sleep(0.01)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("nic0")]
    assert len(told) == 1
    assert "ingress qdisc where clsact has to go" in told[0]
    assert list(host.roster.status()["refused"]) == ["nic0"]
    assert host.noted() == {}
    run("tc", "qdisc", "del", "dev", "nic0", "ingress")
    now = time.monotonic()
    monkeypatch.setattr("hostagent.roster.time.monotonic", lambda: now + 31)
    host.roster.step()
    assert host.roster.names == ["nic0"]
    assert host.roster.status()["refused"] == {}


@BY_BOTH
def test_a_program_that_somebody_took_away_comes_back(host):
    for number in range(3):
        add(f"nic{number}", f"other{number}")
    host.start("nic*")
    take_off("nic1")
    assert programs("nic1") == 0
    for _ in range(3):
        host.roster.look_after_one()
    assert programs("nic1") == 1


def test_lost_events_are_made_up_for(host):
    """The socket's buffer overflows; afterwards all is as if it had not."""
    for number in range(4):
        add(f"nic{number}", f"other{number}")
    host.start("nic*")
    host.roster.watch._socket.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF
    for number in range(4):
        run("ip", "link", "set", f"nic{number}", "mtu", "1400")
    run("ip", "link", "del", "nic1")
    add("nic1", "other1")
    add("nic7", "other7")
    take_off("nic0")
    assert host.roster.watch.links[1].name == "lo"
    host.follow()
    for _ in range(8):
        host.roster.look_after_one()
    assert host.roster.names == ["nic0", "nic1", "nic2", "nic3", "nic7"]
    assert [programs(name) for name in host.roster.names] == [1] * 5


def test_the_watch_overflows_and_says_so(host):
    host.config = load(AgentConfig, None, {"host.run_dir": str(host.run_dir)}, {})
    watch = LinkWatch()
    try:
        watch._socket.setsockopt(1, 8, 2048)
        add("nic0", "other")
        for mtu in range(1000, 1040):
            run("ip", "link", "set", "nic0", "mtu", str(mtu))
        run("ip", "link", "del", "nic0")
        add("nic5", "other")
        watch.read()
        assert watch.resynced()
        assert not watch.resynced()
        assert sorted(nic.name for nic in watch.links.values()) == ["lo", "nic5", "other"]
    finally:
        watch.close()


def test_a_bridge_and_its_port(host):
    """A port that leaves its bridge is told of by the same messages as a link that goes away."""
    add("nic0", "other")
    run("ip", "link", "add", "br0", "type", "bridge")
    host.start("nic0")
    run("ip", "link", "set", "nic0", "master", "br0")
    run("ip", "link", "set", "nic0", "nomaster")
    host.follow()
    assert host.roster.names == ["nic0"]
    assert programs("nic0") == 1


def many(number: int, verb: str) -> None:
    lines = [f"link {verb} veth{i}" + (f" type veth peer name p{i}" if verb == "add" else "") for i in range(number)]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, timeout=120)


@pytest.mark.parametrize("number", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_at_once(host, caplog, number):
    host.start("veth*")
    with caplog.at_level(logging.INFO):
        many(number, "add")
        begin = time.monotonic()
        rounds = host.follow()
        took_s = time.monotonic() - begin
        assert len(host.roster.names) == number
        assert len(host.noted()) == number
        many(number, "del")
        begin = time.monotonic()
        host.follow()
        gone_s = time.monotonic() - begin
    assert (host.roster.names, host.noted()) == ([], {})
    lines = [r for r in caplog.records if "veth" in r.getMessage()]
    print(f"{number} interfaces: {took_s:.2f} s in {rounds} rounds, gone in {gone_s:.2f} s, {len(lines)} lines")
    assert rounds >= number // 100
    assert len(lines) <= 10 + 2 * took_s


@pytest.fixture
def running(make_netns, tmp_path):
    """An agent's host, entered."""
    name = make_netns("host")
    with bpf_file_system(tmp_path / "bpf") as pins, in_netns(name):
        made = AgentHost(name, tmp_path, "--pin-dir", str(pins / "fabricpilot"))
        yield made
        made.close()


def test_the_running_agent_follows(running, tmp_path):
    """The whole of it: events reach the loop, and `status` and the log tell."""
    patterns = "-i", "nic*", "-i", "tap*"
    agent = running.start(*patterns)

    def wait_until_scheduled(*names: str) -> None:
        wait_for(lambda: running.status()["datapath"]["interfaces"] == list(names), agent)

    wait_until_scheduled()
    add("nic0", "other")
    run("ip", "tuntap", "add", "dev", "tap0", "mode", "tap")
    wait_until_scheduled("nic0", "tap0")
    said = running.status()
    assert said["interfaces"]["scheduled"] == 2
    assert said["interfaces"]["tag_only"] == 1
    assert list(said["queues"]) == ["nic0"]
    assert has_queues("nic0")
    # A second one here is refused in one line; so is one with a run_dir of its own and these pins, and its detach.
    elsewhere = "--set", f"host.run_dir={tmp_path / 'second'}"
    for what, *options in (("run", *patterns), ("run", *patterns, *elsewhere), ("detach", *elsewhere)):
        second = running.agent(what, *options)
        assert second.returncode == 2, second.stderr
        assert len(second.stderr.splitlines()) == 1, second.stderr
        assert "at work" in second.stderr or "runs already" in second.stderr
    assert programs("nic0") == 1
    run("ip", "link", "del", "nic0")
    wait_until_scheduled("tap0")
    assert end(agent) == 0
    log = running.log_path.read_text().splitlines()
    told = [line.partition("hostagent.roster: ")[2].strip() for line in log if "hostagent.roster" in line]
    assert [line for line in told if line == "tap0 attached, tag only"]
    assert [line for line in told if line.startswith("nic0 attached, queues ")]
    assert "nic0 is gone" in told
