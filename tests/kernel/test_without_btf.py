"""A kernel without BTF: what cannot be had is said, refused where it was asked for, and the rest works.

A child hides /sys/kernel/btf from itself, and from the loader that it starts, in a mount namespace of its own.
"""

import json
import os
import socket
import sys
import threading
from pathlib import Path

import pytest
from agent_kit import AgentHost, end
from datapath_kit import bpf_file_system, in_netns, run, start_agent
from datapath_wire import ADDRESSES, PORT, SETTINGS, captured

from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.ebpf_loader import check_program

HIDE_BTF = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0  # CLONE_NEWNS
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
assert libc.mount(b"none", b"/sys/kernel/btf", b"tmpfs", 0, None) == 0
assert not os.path.exists("/sys/kernel/btf/vmlinux")
"""
CHECK = """
from fabricpilot.config import DatapathSection
from hostagent.support import probe
said = {}
for backend, mode in (("ebpf", "backlog"), ("auto", "backlog")):
    section = DatapathSection(backend=backend, mode=mode, pin_dir=sys.argv[1])
    said[f"{backend} {mode}"] = {f.id: [f.ok, f.required, f.why] for f in probe(section)}
print(json.dumps(said), flush=True)
"""
OPEN = """
from fabricpilot.config import DatapathSection
from fabricpilot.errors import UsageError
from hostagent.datapath import open_datapath
for backend, mode in (("ebpf", "auto"), ("ebpf", "attained"), ("auto", "backlog")):
    datapath = open_datapath(DatapathSection(backend=backend, mode=mode, pin_dir=sys.argv[1]))
    assert "backlog" not in datapath.capabilities
    datapath.close()
try:
    open_datapath(DatapathSection(backend="ebpf", mode="backlog", pin_dir=sys.argv[1]))
except UsageError as error:
    print(error, flush=True)
"""
SEND = """
import pathlib, socket
from fabricpilot.levels import Thresholds
from hostagent.datapath.base import MessageRule, Settings, SocketRule
from hostagent.datapath.ebpf import EbpfDatapath
datapath = EbpfDatapath(pathlib.Path(sys.argv[1]), 4096)
datapath.apply(Settings(Thresholds((3000, 30_000, 300_000)), (32, 24, 16, 8), (1, 2, 3, 4),
                        messages=MessageRule(gap_ns=3600 * 10**9, starved_ns=0), use_backlog=True, use_hints=True))
datapath.serve_sockets(SocketRule(hint_cgroups=("/",), send_buffer_bytes=1 << 20))
datapath.attach("nic0")
assert not datapath.sees_backlog()
peer = socket.create_connection((sys.argv[2], int(sys.argv[3])), timeout=20)
if sys.argv[4] != "0":
    peer.setsockopt(0x4650, 1, int(sys.argv[4]).to_bytes(8, sys.byteorder))
peer.sendall(bytes(100_000))
peer.shutdown(socket.SHUT_WR)
peer.settimeout(20)
assert peer.recv(1) == b""
peer.close()
attained = int(datapath.flows().states["attained_bytes"].max())
datapath.detach()
datapath.close()
print(json.dumps(attained), flush=True)
"""


def said_by(code: str, *arguments: str) -> str:
    agent = start_agent(HIDE_BTF + code, *arguments)
    said, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0
    return said


def test_check_says_what_is_off(tmp_path):
    with bpf_file_system(tmp_path / "bpf") as root:
        said = json.loads(said_by(CHECK, str(root / "fabricpilot")))
    for asked, found in said.items():
        assert found["btf"][:2] == [False, False]
        assert "CONFIG_DEBUG_INFO_BTF" in found["btf"][2]
        assert found["program"][0]
        lacking = [name for name, (ok, required, _) in found.items() if required and not ok]
        assert lacking == ["can_backlog"], asked
        assert found["can_backlog"][0] is False
        assert "datapath.mode = backlog asks for it" in found["can_backlog"][2]


def test_backlog_is_refused_if_it_was_asked_for_by_name(tmp_path):
    with bpf_file_system(tmp_path / "bpf") as root:
        said = said_by(OPEN, str(root / "fabricpilot"))
    assert said.count("\n") == 1
    assert "datapath.mode = backlog needs backlog" in said


@pytest.fixture
def refused_look(tmp_path, monkeypatch):
    """In this process and in those it starts, the kernel refuses the program that looks into sockets."""
    (tmp_path / "sitecustomize.py").write_text(
        "import hostagent.datapath.backlog_offsets as offsets\n"
        "offsets.backlog_macros = lambda: dict.fromkeys(offsets._MACROS, 1 << 20)  # behind the end of any socket\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def test_a_kernel_that_refuses_the_look_at_its_sockets_gets_the_program_without_it(refused_look, tmp_path):
    said = check_program()
    assert "the kernel refused the BPF program" in said["blind"]
    with bpf_file_system(tmp_path / "bpf") as root:
        datapath = EbpfDatapath(root / "fabricpilot", 1024)
        datapath.apply(SETTINGS)
        assert not datapath.sees_backlog()
        datapath.detach()
        datapath.close()


def traces(netns: str, *folders: Path) -> list[str]:
    """What an agent could leave in a namespace, in its BPF file system and among its records."""
    commands = ("tc qdisc show", "tc class show dev nic0", "tc filter show dev nic0 egress")
    shown = [run(*command.split(), netns=netns) for command in commands]
    return shown + [str(path) for folder in folders for path in sorted(folder.rglob("*")) if "agent." not in path.name]


def test_there_the_agent_starts_unless_it_must_see_them(refused_look, wire, tmp_path):
    records = tmp_path / "run"
    records.mkdir()
    with bpf_file_system(tmp_path / "bpf") as root:
        host = AgentHost(wire[0], records, "--pin-dir", str(root / "fabricpilot"), "-i", "nic0")
        insist = ("--set", "datapath.mode=backlog")
        before = traces(wire[0], root, records)

        checked = host.agent("check", *insist)
        refused = host.agent("run", *insist, "--link-rate", "1Gbit")
        assert (checked.returncode, refused.returncode) == (3, 3)
        assert "datapath.mode = backlog asks for it" in checked.stderr.splitlines()[-1]
        *log, why = refused.stderr.splitlines()
        assert why.startswith("fabricpilot: datapath.mode = backlog: this kernel does not let it be seen")
        assert any("the kernel refused the BPF program" in line for line in log)
        assert traces(wire[0], root, records) == before

        agent = host.start()
        assert host.status()["datapath"]["mode"] == "attained"
        end(agent)
        host.close()


@pytest.mark.parametrize("hint_bytes", [0, 200_000])
def test_levels_follow_bytes_sent_and_hints_still_count(wire, tmp_path, hint_bytes):
    """100 kB written at once: with BTF all of it would be on one level; a hint needs none."""
    sender, receiver = wire
    with in_netns(receiver):
        listener = socket.create_server((ADDRESSES[4][1], PORT))

    def receive() -> None:
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1 << 18):
                pass

    thread = threading.Thread(target=receive)
    thread.start()
    with bpf_file_system(tmp_path / "bpf") as root, captured(receiver) as capture, in_netns(sender):
        said = said_by(SEND, str(root / "fabricpilot"), ADDRESSES[4][1], str(PORT), str(hint_bytes))
    thread.join(20)
    listener.close()
    assert int(said) >= 100_000
    levels = [packet.dscp for packet in capture.packets if packet.payload_bytes]
    assert sum(packet.payload_bytes for packet in capture.packets) >= 100_000
    if hint_bytes:
        assert set(levels) == {16}
    else:
        assert levels[0] == 32
        assert set(levels) == {32, 24, 16} or set(levels) == {32, 16}  # a GSO packet may pass a whole level
