"""What tests of the data path share: a BPF file system of their own, frames, and packets sent through the program.

`prog_test_run` runs the loaded egress program on one frame with all its maps and no network: what comes out is what
would have left the NIC.
"""

import ctypes
import ipaddress
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import FLOW_KEY_DTYPE
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.flow_table import BUCKET_DTYPE, TAGS_DTYPE
from hostagent.datapath.layout import COUNTERS_DTYPE, FINISHED_DTYPE, SETTINGS_DTYPE
from hostagent.datapath.pinned_names import CGROUP_PROGRAMS, PROGRAM_PIN, RUN_BY_US
from hostagent.datapath.source import PROGRAM

TC_ACT_UNSPEC = 0xFFFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)
_SKB_PRIORITY, _SKB_GSO_SEGS, _SKB_GSO_SIZE = 32, 164, 176  # offsets in struct __sk_buff, stable ABI


@contextmanager
def bpf_file_system(directory: Path) -> Iterator[Path]:
    """Mount a bpffs at `directory` and take it away again, with all that is pinned there."""
    directory.mkdir(parents=True, exist_ok=True)
    if _libc.mount(b"bpf", os.fsencode(directory), b"bpf", 0, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount -t bpf bpf {directory}")
    try:
        yield directory
    finally:
        if _libc.umount2(os.fsencode(directory), 0) != 0:
            raise OSError(ctypes.get_errno(), f"umount {directory}: something still uses it")


@contextmanager
def in_netns(name: str) -> Iterator[None]:
    """Run a block in the network namespace of that name (this thread only)."""
    clone_newnet = 0x40000000
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if _libc.setns(there, clone_newnet) != 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")
        yield
    finally:
        if _libc.setns(before, clone_newnet) != 0:
            raise OSError(ctypes.get_errno(), "setns back")
        os.close(there)
        os.close(before)


def run(*command: str, netns: str | None = None) -> str:
    """Standard output of a command that must succeed, by default in the current network namespace."""
    # nsenter, not `ip netns exec`: that remounts /sys and hides BPF file systems below it.
    inside = ("nsenter", f"--net=/run/netns/{netns}", *command) if netns else command
    done = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(inside)}: {done.stderr}"
    return done.stdout


def start_agent(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs `code` (it may use the project), its standard output readable line by line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def bpf_objects(*pin_dirs: Path) -> set[tuple[str, int]]:
    """Kind and id of the programs and maps that are pinned in some folders, and of the maps those programs use."""
    found = set()
    programs = {PROGRAM_PIN, *RUN_BY_US, *CGROUP_PROGRAMS}
    for pin in [path for directory in pin_dirs if directory.is_dir() for path in directory.iterdir()]:
        if pin.name.rpartition("_")[0] in programs:
            continue  # a link of one of the programs to a cgroup or an interface
        kind = "prog" if pin.name in programs else "map"
        said = json.loads(run("bpftool", "-j", kind, "show", "pinned", str(pin)))
        found |= {(kind, said["id"]), *(("map", map_id) for map_id in said.get("map_ids", ()))}
    return found


def our_programs(device: str) -> list[tuple[str, int]]:
    """How fabricpilot's programs are on an interface's egress, in the order they run, and the id of each."""
    found = []
    for program, _ in bpf.tcx_egress(socket.if_nametoindex(device)) or ():
        if json.loads(run("bpftool", "-j", "prog", "show", "id", str(program)))["name"].startswith(PROGRAM[:15]):
            found.append(("tcx", program))
    for entry in json.loads(run("tc", "-j", "filter", "show", "dev", device, "egress")):
        name = str(entry.get("options", {}).get("bpf_name", ""))
        if name.startswith("fabricpilot:"):
            found.append(("clsact", int(name.rpartition(":")[2])))
    return found


def take_off(device: str) -> None:
    """What somebody else may do to our program on an interface: it is gone, and nothing of ours knows."""
    [(way, _)] = our_programs(device)
    if way == "clsact":
        run("tc", "qdisc", "del", "dev", device, "clsact")
        return
    [(_, link)] = bpf.tcx_egress(socket.if_nametoindex(device))
    run("bpftool", "link", "detach", "id", str(link))


def wait_until_freed(objects: set[tuple[str, int]], seconds: float = 10.0) -> None:
    """The kernel frees programs and maps an RCU grace period after their last user has gone."""
    deadline = time.monotonic() + seconds
    while True:
        there = {
            (kind, entry["id"]) for kind in ("prog", "map") for entry in json.loads(run("bpftool", "-j", kind, "list"))
        }
        if not (left := objects & there):
            return
        assert time.monotonic() < deadline, f"still in the kernel: {sorted(left)}"
        time.sleep(0.05)


def flow_key(
    source: str = "10.0.0.1",
    destination: str = "10.0.0.2",
    source_port: int = 40000,
    destination_port: int = 80,
    protocol: int = 6,
) -> np.ndarray:
    """One FLOW_KEY_DTYPE record, shape ()."""
    key = np.zeros((), FLOW_KEY_DTYPE)
    for field, text in (("source", source), ("destination", destination)):
        address = ipaddress.ip_address(text)
        raw = address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
        key[field] = np.frombuffer(raw, np.uint8)
    key["source_port"], key["destination_port"], key["protocol"] = source_port, destination_port, protocol
    return key


def ones_complement_sum(data: bytes) -> int:
    """The Internet checksum's sum (RFC 1071); 0xffff over a header whose checksum is right."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def network_offset(frame: bytes) -> int:
    """Where the IP header begins: behind up to two VLAN tags."""
    offset = 14
    while offset < 22 and frame[offset - 2 : offset] in (b"\x81\x00", b"\x88\xa8"):
        offset += 4
    return offset


@dataclass(frozen=True)
class Left:
    """A packet as it left: the frame, skb->priority (None: untouched) and the program's verdict."""

    frame: bytes
    priority: int | None
    verdict: int

    @property
    def traffic_class(self) -> int:
        """DSCP and ECN."""
        ip = network_offset(self.frame)
        version = self.frame[ip] >> 4
        return self.frame[ip + 1] if version == 4 else (self.frame[ip] & 0xF) << 4 | self.frame[ip + 1] >> 4

    @property
    def dscp(self) -> int:
        """The code point."""
        return self.traffic_class >> 2


class KernelSender:
    """Sends packets through the program of a loaded `EbpfDatapath`, with the interface of `FakeDatapath.send`."""

    _UNTOUCHED_PRIORITY = 0xDEAD  # given to every packet, so that one that is left alone shows

    def __init__(self, pin_dir: Path, flow_entries: int = 4096) -> None:
        self.datapath = EbpfDatapath(pin_dir, flow_entries)
        self.pin_dir = pin_dir
        self._program: int | None = None
        self._sequences: dict[bytes, int] = {}  # next sequence number of each flow

    def reset(self) -> None:
        """As just loaded."""
        self._sequences.clear()
        self.datapath._ensure_loaded()
        self.datapath.forget(self.datapath.flows().keys)
        maps = self.datapath._pins.maps
        zero = np.zeros(1, np.uint32)
        for name, dtype in (("counters", COUNTERS_DTYPE), ("finished", FINISHED_DTYPE)):
            bpf.update(maps[name], zero, np.zeros(bpf.possible_cpus(), dtype))
        bpf.update(maps["source_seed"], zero, np.zeros(1, np.uint64))  # other buckets, which are full
        for slot in range(2):
            bpf.update(maps["slots"], np.array([slot], np.uint32), np.zeros(1, SETTINGS_DTYPE))

        def forget_all(identity):
            identity["flows_forgotten"] = 0

        self.datapath._pins.change_identity(forget_all)

    def close(self) -> None:
        if self._program is not None:
            os.close(self._program)
        self.datapath.detach()
        self.datapath.close()

    def run(self, frame: bytes, gso_size: int = 0, gso_segs: int = 0) -> Left:
        """One frame through the program."""
        if self._program is None:
            self._program = bpf.obj_get(self.pin_dir / "egress")
        context = np.zeros(192, np.uint8)
        for offset, value in (
            (_SKB_PRIORITY, self._UNTOUCHED_PRIORITY),
            (_SKB_GSO_SEGS, gso_segs),
            (_SKB_GSO_SIZE, gso_size),
        ):
            context[offset : offset + 4] = np.frombuffer(struct.pack("=I", value), np.uint8)
        verdict, left, after, _ = bpf.prog_test_run(self._program, frame, context)
        priority = int.from_bytes(after[_SKB_PRIORITY : _SKB_PRIORITY + 4].tobytes(), sys.byteorder)
        return Left(left, None if priority == self._UNTOUCHED_PRIORITY else priority, verdict)

    def send(
        self, key, payload_bytes=0, *, syn=False, fin=False, rst=False, segments=1, dscp=0, repeated=False
    ) -> Left:
        """See `FakeDatapath.send`; at most 3,000 payload bytes."""
        sequence = self._sequences.get(key.tobytes(), 1_000_000)
        if repeated:
            sequence -= payload_bytes
        else:
            self._sequences[key.tobytes()] = sequence + payload_bytes + syn
        frame = build_frame(key, payload_bytes, syn=syn, fin=fin, rst=rst, dscp=dscp, sequence=sequence)
        if segments == 1:
            return self.run(frame)
        return self.run(frame, gso_size=-(-payload_bytes // segments), gso_segs=segments)


def elements(datapath: EbpfDatapath, name: str, dtype: np.dtype):
    """All of an array map, shape (n,)."""
    fd = datapath.map_fd(name)
    values = np.zeros(bpf.map_sizes(fd)[2], dtype)
    for row in range(len(values)):
        bpf.lookup(fd, np.array([row], np.uint32), values[row : row + 1])
    return values


def overwrite_state(datapath: EbpfDatapath, state) -> None:
    """Give the only flow in the table another state (FLOW_STATE_DTYPE, shape (1,))."""
    [[bucket, way]] = np.argwhere(elements(datapath, "flow_tags", TAGS_DTYPE)["tags"])
    value = elements(datapath, "flows", BUCKET_DTYPE)[bucket : bucket + 1]
    value["flow"]["state"][0, way] = state[0]
    bpf.update(datapath.map_fd("flows"), np.array([bucket], np.uint32), value)


def build_frame(key, payload_bytes=0, *, syn=False, fin=False, rst=False, dscp=0, sequence=0) -> bytes:
    """An Ethernet frame of the flow `key`, made by scapy."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether

    source, destination = (ipaddress.IPv6Address(key[side].tobytes()) for side in ("source", "destination"))
    if source.ipv4_mapped and destination.ipv4_mapped:
        ip = IP(src=str(source.ipv4_mapped), dst=str(destination.ipv4_mapped), tos=dscp << 2)
    else:
        ip = IPv6(src=str(source), dst=str(destination), tc=dscp << 2)
    ports = {"sport": int(key["source_port"]), "dport": int(key["destination_port"])}
    flags = "".join(letter for letter, given in (("S", syn), ("F", fin), ("R", rst)) if given) or "A"
    transport = UDP(**ports) if int(key["protocol"]) == 17 else TCP(flags=flags, seq=sequence, **ports)
    return bytes(Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01") / ip / transport / (b"x" * payload_bytes))
