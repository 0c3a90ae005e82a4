"""The netfilter data path's life in the kernel: adopted, brought back, replaced, and gone without a trace."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from datapath_kit import flow_key, in_netns, run, start_agent
from nft_kit import NIC, REFUSE_BPF, NftSender, wire_up

from fabricpilot.config import DatapathSection
from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import Thresholds
from hostagent.datapath import nft_rules, nft_table, open_datapath
from hostagent.datapath.base import Settings
from hostagent.datapath.nftables import SYSCTLS, NftablesDatapath

SETTINGS = Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (0x10001, 0x10002, 0x10003, 0x10004))
OTHER = Settings(Thresholds((700,)), (10, 12), (0x20001, 0x20002), respect_dscp=False)
FOREIGN_TABLE = """
table inet fabricpilot_not { chain c { type filter hook postrouting priority -140; ct state new counter; }; }
table ip filter { chain output { type filter hook output priority 0; ip dscp cs5 accept; }; }
"""


@pytest.fixture
def namespaces(make_netns):
    """A namespace, entered, wired to a peer."""
    here, peer = make_netns("nft"), make_netns("peer")
    wire_up(here, peer)
    with in_netns(here):
        yield here, peer


@pytest.fixture
def datapath(namespaces):
    opened = NftablesDatapath(4096, 30.0)
    yield opened
    opened.detach()
    opened.close()


def trace() -> dict[str, str]:
    """Everything this data path could leave behind."""
    return {
        "rules": run("nft", "--stateless", "list", "ruleset"),
        "sysctls": run("sysctl", "net.netfilter"),
        "modules": " ".join(sorted(path.name for path in Path("/sys/module").iterdir())),
        "qdiscs": run("tc", "qdisc", "show"),
    }


def without_count(state: dict[str, str]) -> dict[str, str]:
    """Conntrack's entries are the host's and fade by themselves."""
    kept = [line for line in state["sysctls"].splitlines() if "nf_conntrack_count" not in line]
    return state | {"sysctls": "\n".join(kept)}


def sysctls() -> list[str]:
    return [run("sysctl", "-n", name).strip() for name in SYSCTLS]


def test_looking_changes_nothing(namespaces):
    before = trace()
    looked = open_datapath(DatapathSection(backend="nftables"))
    assert (looked.attached(), looked.settings(), looked.counters(), len(looked.flows())) == ([], None, {}, 0)
    looked.detach()
    looked.close()
    assert trace() == before


@pytest.mark.parametrize("acct", ["0", "1"])
def test_detach_leaves_no_trace_and_others_alone(namespaces, datapath, acct):
    run("sysctl", "-qw", f"{SYSCTLS[0]}={acct}")
    subprocess.run(["nft", "-f", "-"], input=FOREIGN_TABLE, text=True, check=True)
    before = without_count(trace())
    datapath.attach(NIC)
    datapath.attach(NIC)
    datapath.apply(SETTINGS)
    assert datapath.attached() == [NIC]
    assert sysctls() == ["1", "1"]
    assert run("nft", "list", "table", "inet", "fabricpilot_not").count("counter") == 1
    datapath.detach()
    datapath.detach()
    assert (datapath.attached(), datapath.settings()) == ([], None)
    assert without_count(trace()) == before


KILLED_AT = """
import os, signal, sys
from fabricpilot.levels import Thresholds
from hostagent.datapath import nftables, nft_library
from hostagent.datapath.base import Settings

left = int(sys.argv[1])

def dying(call):
    def die_in_time(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return die_in_time

nft_library.Nft.run = dying(nft_library.Nft.run)
nftables._write_sysctl = dying(nftables._write_sysctl)
datapath = nftables.NftablesDatapath(4096, 30.0)
datapath.attach("nic")
datapath.apply(Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (1, 2, 3, 4)))
datapath.detach()
"""


@pytest.mark.parametrize("step", range(1, 10))
def test_killed_before_any_step_nothing_is_lost(namespaces, datapath, step):
    before = without_count(trace())
    agent = start_agent(KILLED_AT, str(step))
    agent.communicate(timeout=60)
    assert agent.returncode == -signal.SIGKILL
    datapath.attach(NIC)
    datapath.apply(SETTINGS)
    assert (datapath.attached(), datapath.settings(), sysctls()) == ([NIC], SETTINGS, ["1", "1"])
    datapath.detach()
    assert without_count(trace()) == before


def test_every_step_was_tried(namespaces):
    agent = start_agent(KILLED_AT, "10")
    agent.communicate(timeout=60)
    assert agent.returncode == 0


def test_the_next_agent_adopts(namespaces):
    first = NftSender(*namespaces)
    first.datapath.apply(SETTINGS)
    first.send(flow_key(), syn=True)
    for _ in range(5):
        first.send(flow_key(), 1400)
    counted = first.datapath.counters()
    second = NftablesDatapath(1024, 30.0)
    assert (second.attached(), second.settings()) == ([NIC], SETTINGS)
    [state] = second.flows().states
    assert state["attained_bytes"] == 7000
    after = second.counters()
    assert after["bytes_level_1"] == counted["bytes_level_1"] > 0
    rules = run("nft", "list", "chain", "inet", "fabricpilot", "egress")
    second.attach(NIC)
    second.apply(SETTINGS)
    assert run("nft", "list", "chain", "inet", "fabricpilot", "egress") == rules
    assert len(second.flows()) == 1
    second.close()
    first.close()


def test_settings_round_trip(datapath):
    datapath.attach(NIC)
    for wanted in (SETTINGS, OTHER, SETTINGS):
        datapath.apply(wanted)
        assert datapath.settings() == wanted


def test_flush_ruleset_by_somebody_else_is_healed_and_counted(namespaces, datapath):
    before = without_count(trace())
    datapath.attach(NIC)
    datapath.apply(SETTINGS)
    run("nft", "flush", "ruleset")
    assert datapath.attached() == []
    assert len(datapath.flows()) == 0
    assert (datapath.attached(), datapath.settings()) == ([NIC], SETTINGS)
    assert datapath.counters()["fresh_starts"] == 1
    datapath.detach()
    assert without_count(trace()) == before


def test_only_who_applied_brings_the_table_back(namespaces, datapath):
    datapath.attach(NIC)
    datapath.apply(SETTINGS)
    looking = NftablesDatapath(4096, 30.0)
    run("nft", "flush", "ruleset")
    assert len(looking.flows()) == 0
    assert not nft_table.exists_here()
    looking.close()


def test_another_version_is_replaced_and_what_it_remembered_kept(namespaces, datapath):
    before = without_count(trace())
    datapath.attach(NIC)
    datapath.apply(SETTINGS)
    comments = [f"version {nft_rules.VERSION + 1}", *(f"sysctl {name} was 0" for name in SYSCTLS)]
    rules = "\n".join(f'add rule inet fabricpilot state return comment "{text}"' for text in comments)
    run("nft", f"flush chain inet fabricpilot state\n{rules}")
    later = NftablesDatapath(4096, 30.0)
    assert (later.attached(), later.settings(), len(later.flows())) == ([], None, 0)
    later.attach(NIC)
    later.apply(SETTINGS)
    assert (later.attached(), later.settings()) == ([NIC], SETTINGS)
    assert later.counters()["fresh_starts"] == 1
    later.detach()
    later.close()
    assert without_count(trace()) == before


def test_an_interface_that_vanishes_and_comes_back(namespaces, datapath):
    datapath.attach(NIC)
    datapath.apply(SETTINGS)
    run("ip", "link", "set", NIC, "name", "gone")
    assert datapath.attached() == []
    run("ip", "link", "set", "gone", "name", NIC)
    assert datapath.attached() == [NIC]


def test_no_such_interface(datapath):
    with pytest.raises(UsageError, match="'nosuch' does not exist; there are: lo, nic"):
        datapath.attach("nosuch")
    assert not nft_table.exists_here()


def test_a_refused_sysctl_leaves_nothing_half_attached(namespaces, datapath, monkeypatch):
    before = without_count(trace())

    def refuse(name, value):
        raise KernelError("refused by the test")

    monkeypatch.setattr("hostagent.datapath.nftables._write_sysctl", refuse)
    monkeypatch.setattr(NftablesDatapath, "detach", lambda self: self._nft.run(nft_rules.remove(), "removing"))
    with pytest.raises(KernelError, match="refused by the test"):
        datapath.attach(NIC)
    assert without_count(trace()) == before


def test_without_the_library_one_line_says_what_to_install(namespaces, tmp_path):
    (tmp_path / "nftables.py").write_text("raise ImportError('hidden by the test')")
    command = [str(Path(sys.executable).with_name("fabricpilot")), "agent", "status", "--backend", "nftables"]
    hidden = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert "python3-nftables" in done.stderr


def test_thresholds_never_tear(namespaces):
    """While settings change, every packet has DSCP and skb->priority of one vector."""
    sender = NftSender(*namespaces)
    try:
        sender.datapath.apply(SETTINGS)
        run("nft", "add counter inet probe torn; add counter inet probe whole")
        for priorities, dscp in (("1:1, 1:2, 1:3, 1:4", "{ 32, 24, 16, 8 }"), ("2:1, 2:2", "{ 10, 12 }")):
            match = f"meta priority {{ {priorities} }} ip dscp"
            run("nft", f"add rule inet probe late {match} {dscp} counter name whole")
            run("nft", f"add rule inet probe late {match} != {dscp} counter name torn")
        stop = threading.Event()
        flood = threading.Thread(target=send_datagrams, args=(stop,))
        flood.start()  # it inherits this thread's namespace
        for _ in range(100):
            sender.datapath.apply(OTHER)
            sender.datapath.apply(SETTINGS)
        stop.set()
        flood.join()
        counted = json.loads(run("nft", "-j", "list", "counters", "table", "inet", "probe"))["nftables"]
        packets = {entry["counter"]["name"]: entry["counter"]["packets"] for entry in counted if "counter" in entry}
        assert packets["torn"] == 0
        assert packets["whole"] > 1000
    finally:
        sender.close()


def send_datagrams(stop: threading.Event) -> None:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        while not stop.is_set():
            for _ in range(100):
                sending.sendto(bytes(200), ("192.0.2.2", 9))


SECCOMP_THEN_OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
from fabricpilot.config import DatapathSection
from hostagent.datapath import open_datapath
import logging
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
datapath = open_datapath(DatapathSection(pin_dir=sys.argv[2]))
datapath.attach("nic")
print(datapath.name, datapath.attached())
"""


def test_auto_is_nftables_where_bpf_is_refused_and_stays_with_it(namespaces, datapath, tmp_path):
    code = REFUSE_BPF + SECCOMP_THEN_OPEN
    said = start_agent(code, str(tmp_path), str(tmp_path / "pins")).communicate(timeout=60)[0]
    assert "bpf(2) is refused" in said
    assert "nftables ['nic']" in said
    # Attached, it is what `auto` finds, also for who could use BPF.
    adopted = open_datapath(DatapathSection(pin_dir=str(tmp_path / "pins")))
    assert (adopted.name, adopted.attached()) == ("nftables", [NIC])
    adopted.close()
