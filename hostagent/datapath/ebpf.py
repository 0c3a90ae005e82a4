"""The eBPF data path: works on the program and maps pinned in a bpffs, and brings them there when they are not.

Opening adopts whatever an earlier agent has left: flow table, settings and counters go on. Nothing is loaded before
`attach` or `apply` needs it, so looking (`attached`, `flows`, `counters`) never changes the kernel. Another version's
data path is replaced in place by the first of the two (upgrade.py); it can be read as long as its maps hold the same.

bcc runs in a child (ebpf_loader.py); this module uses bpf(2) and netlink only. How the program is attached to a NIC,
by tcx or by clsact, is hooks.py's.
"""

import fcntl
import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pyroute2 import IPRoute

from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import MAX_LEVELS
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath import pins as pinned
from hostagent.datapath import upgrade
from hostagent.datapath.backlog_offsets import KERNEL_BTF
from hostagent.datapath.base import FinishedMessages, FlowTable, Settings, SocketRule
from hostagent.datapath.bpffs import check_path, ensure_bpffs, holds, unmount_if_unused
from hostagent.datapath.cgroup_links import SETSOCKOPT, SOCK_OPS, attach_to_cgroups, hand_over
from hostagent.datapath.flow_table import BUCKET_DTYPE, COPIES_DTYPE, TAGS_DTYPE, forget_flows, read_flows
from hostagent.datapath.hook import Hook, Interface, find_interface, interface_names
from hostagent.datapath.hooks import AUTO, Hooks
from hostagent.datapath.layout import (
    COUNTERS_DTYPE,
    FINISHED_DTYPE,
    SEND_BUFFER_DTYPE,
    SEND_BUFFER_PORTS,
    SETTINGS_DTYPE,
    name_counters,
    pack_settings,
    unpack_settings,
)
from hostagent.datapath.pinned_names import FORGET_PIN, MAPS, READ_PIN
from hostagent.datapath.pins import Pins
from hostagent.datapath.source import fingerprint, map_layouts

log = logging.getLogger(__name__)

_ZERO: Final = np.zeros(1, np.uint32)
_READ: Final = {
    "flows": BUCKET_DTYPE,
    "flow_tags": TAGS_DTYPE,
    "flow_copies": COPIES_DTYPE,
    "slots": SETTINGS_DTYPE,
    "counters": COUNTERS_DTYPE,
    "finished": FINISHED_DTYPE,
}


def kernel_capabilities() -> frozenset[str]:
    """What this data path can do on the running kernel; the backlog needs its BTF."""
    always = ("adopt", "exact_payload", "segments", "evict", "forget", "bridged", "messages", "share", "sockets")
    return frozenset((*always, "backlog") if KERNEL_BTF.exists() else always)


class EbpfDatapath:
    """The `Datapath` on a program at each NIC's egress; see base.py for the contract.

    Args:
        pin_dir: folder in a bpffs; one per network namespace.
        flow_entries: size of the flow table.
        hook: where the program goes on NICs that do not have it yet: "tcx", "clsact", or "auto".

    Raises:
        KernelError: bpf(2) is not allowed, or what is pinned cannot be opened.
        UsageError: not a path a BPF file system takes, or what is pinned belongs to another network namespace.
    """

    name = "ebpf"

    def __init__(self, pin_dir: Path, flow_entries: int, hook: str = AUTO) -> None:
        check_path(pin_dir)
        self.pin_dir = pin_dir
        self._hooks = Hooks(pin_dir, self._netlink, hook)
        self._flow_entries = flow_entries
        self._fingerprint = fingerprint(flow_entries)
        self._layouts = {name: layout for name, layout in map_layouts().items() if name in MAPS}
        self._claim: int | None = None
        self._ipr: IPRoute | None = None
        self.capabilities = kernel_capabilities()
        self._pins = Pins.open(pin_dir)
        if self._pins is not None and not pinned.check_namespace(self._pins):
            log.info("removing the data path pinned in %s: its network namespace no longer exists", pin_dir)
            self._let_go()
            pinned.remove_directory(pin_dir)

    def map_fd(self, name: str) -> int:
        """File descriptor of a pinned map, for benchmarks and tests; it is this object's to close.

        Raises:
            KernelError: there is no data path of this version.
        """
        pins = self._readable()
        if pins is None:
            raise KernelError(f"no data path of this version is pinned in {self.pin_dir}")
        return pins.maps[name]

    @property
    def adopted(self) -> bool:
        """Whether there is a data path in the kernel whose flows, settings and counters this version can read."""
        return self._readable() is not None

    def attach(self, interface: str) -> bool:
        """See `Datapath.attach`; loads the data path first where it is not there yet."""
        nic = find_interface(self._netlink(), interface)
        with self._exclusive():
            pins = self._ensure_loaded()
            there = self._hooks.find(nic.index) if nic.index in pins.interfaces() else None
            attached = there is not None and there[1] == bpf.prog_id(pins.program)
            if not attached:
                self._hooks.put(nic, pins)
            self._hooks.tell_of_others(nic)
            return not attached

    def attached(self) -> list[str]:
        """See `Datapath.attached`."""
        if self._pins is None:
            return []
        pinned_program = bpf.prog_id(self._pins.program)
        return sorted(nic.name for nic, (_, program) in self._scheduled().items() if program == pinned_program)

    def attached_by(self, interfaces: Collection[str]) -> dict[str, list[str]]:
        """See `Datapath.attached_by`."""
        noted = self._pins.interfaces() if self._pins is not None else {}
        names = {index: name for index, name in interface_names(self._netlink()).items() if name in interfaces}
        told: dict[str, list[str]] = {}
        for index, way in self._hooks.describe({index: index in noted for index in names}).items():
            told.setdefault(way, []).append(names[index])
        return told

    def release(self, interfaces: Collection[str]) -> None:
        """See `Datapath.release`."""
        if not holds(self.pin_dir):
            return
        ipr = self._netlink()
        with self._exclusive():
            self._reopen()
            if (pins := self._pins) is None:
                return
            names = interface_names(ipr)
            for index, clsact_is_ours in pins.interfaces().items():
                if index in names and names[index] not in interfaces:
                    continue
                if index in names:
                    self._hooks.remove(index, clsact_is_ours)
                pins.drop_interface(index)
            self._hooks.remove_strays(names)

    def claim(self) -> None:
        """See `Datapath.claim`: a lock on the folder of the pins, which goes with the process."""
        if self._claim is not None:
            return
        with self._exclusive():
            self._reopen()
            self.pin_dir.mkdir(mode=0o700, exist_ok=True)
            self._claim = self._locked(self.pin_dir)

    def detach(self) -> None:
        """See `Datapath.detach`. Also removes filters of ours whose pins are gone; leaves clsact that others use.

        Raises:
            UsageError: an agent is at work on this data path.
        """
        if holds(self.pin_dir):
            with self._exclusive():
                self._detach()
        else:
            self._clear_all({})
        unmount_if_unused(self.pin_dir)

    def apply(self, settings: Settings) -> None:
        """See `Datapath.apply`; loads the data path first where it is not there yet.

        Costs an RCU grace period (milliseconds): a slot is filled only when no packet can still be reading it.
        """
        with self._exclusive():
            self._put(self._ensure_loaded(settings), settings)

    def settings(self) -> Settings | None:
        """See `Datapath.settings`."""
        pins = self._readable()
        return unpack_settings(self._slot_in_force(pins)[0]) if pins else None

    def flows(self) -> FlowTable:
        """See `Datapath.flows`."""
        read_at_ns = time.monotonic_ns()
        pins = self._readable()
        if pins is None:
            return FlowTable.empty(read_at_ns)
        buckets = bpf.map_sizes(pins.maps["flow_tags"])[2]
        with self._alone():
            keys, states = read_flows(pins.maps[READ_PIN], pins.maps["flow_copies"], buckets)
        return FlowTable(keys, states, read_at_ns)

    def forget(self, keys: npt.NDArray[np.void]) -> int:
        """See `Datapath.forget`."""
        pins = self._readable()
        if pins is None or len(keys) == 0:
            return 0
        forgotten = forget_flows(pins.maps[FORGET_PIN], keys)

        def count(identity: npt.NDArray[np.void]) -> None:
            identity["flows_forgotten"] += forgotten

        pins.change_identity(count)
        return forgotten

    def counters(self) -> dict[str, int]:
        """See `Datapath.counters`."""
        pins = self._readable()
        if pins is None:
            return {}
        total = self._kernel_counters(pins)
        settings = self.settings()
        named = name_counters(total, settings.thresholds.levels if settings else MAX_LEVELS)
        identity = pins.identity()[0]
        named["flows_forgotten"] = int(identity["flows_forgotten"])
        named["fresh_starts"] = int(identity["fresh_starts"])
        named["upgrades"] = int(identity["upgrades"])
        return named

    def finished_messages(self) -> FinishedMessages:
        """See `Datapath.finished_messages`."""
        pins = self._readable()
        if pins is None:
            return FinishedMessages.none()
        per_cpu = bpf.lookup_percpu(pins.maps["finished"], FINISHED_DTYPE)
        sizes, durations = (per_cpu[field].sum(axis=0).astype(np.int64) for field in ("sizes", "durations"))
        return FinishedMessages(sizes, durations)

    def serve_sockets(self, rule: SocketRule) -> None:
        """See `Datapath.serve_sockets`; loads the data path first where it is not there yet."""
        if len(rule.send_buffer_ports) > SEND_BUFFER_PORTS:
            raise UsageError(
                f"datapath.send_buffer_ports has {len(rule.send_buffer_ports)} ports; give at most {SEND_BUFFER_PORTS}"
            )
        wanted = np.zeros(1, SEND_BUFFER_DTYPE)
        wanted["bytes"], wanted["ports"] = rule.send_buffer_bytes, len(rule.send_buffer_ports)
        wanted["port"][0, : len(rule.send_buffer_ports)] = rule.send_buffer_ports
        with self._exclusive():
            pins = self._ensure_loaded()
            bpf.update(pins.maps["send_buffers"], _ZERO, wanted)
            attach_to_cgroups(self.pin_dir, "hint", SETSOCKOPT, rule.hint_cgroups)
            buffered = rule.send_buffer_cgroups if rule.send_buffer_bytes else ()
            attach_to_cgroups(self.pin_dir, "send_buffer", SOCK_OPS, buffered)

    def sees_backlog(self) -> bool:
        """See `Datapath.sees_backlog`."""
        pins = self._readable()
        return pins is not None and bool(pins.identity()["sees_backlog"][0])

    def close(self) -> None:
        """See `Datapath.close`."""
        self._let_go()
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None
        if self._ipr is not None:
            self._ipr.close()
            self._ipr = None

    def _detach(self) -> None:
        self._reopen()
        there = self.pin_dir.is_dir()
        claim = self._locked(self.pin_dir) if there and self._claim is None else None
        try:
            self._clear_all(self._pins.interfaces() if self._pins is not None else {})
            self._let_go()
            pinned.remove_directory(pinned.new_directory(self.pin_dir))
            pinned.remove_directory(self.pin_dir)
        finally:
            if claim is not None:
                os.close(claim)

    def _clear_all(self, noted: dict[int, bool]) -> None:
        for index in interface_names(self._netlink()):
            self._hooks.remove(index, noted.get(index, False))
        self._hooks.remove_strays(())

    def _locked(self, directory: Path) -> int:
        """A lock on a folder of pins, held until the file descriptor returned is closed."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UsageError(
                f"an agent is at work on the data path in {self.pin_dir}; stop it first, or choose another "
                "datapath.pin_dir"
            ) from None
        return fd

    def _scheduled(self) -> dict[Interface, tuple[Hook, int]]:
        """How our program is on each interface that it was attached to and is still on, and the program's id."""
        if self._pins is None:
            return {}
        names = interface_names(self._netlink())
        noted = [Interface(names[index], index) for index in self._pins.interfaces() if index in names]
        found = {nic: self._hooks.find(nic.index) for nic in noted}
        return {nic: there for nic, there in found.items() if there is not None}

    def _readable(self) -> Pins | None:
        """The pinned data path if its maps hold what this version's do."""
        pins = self._pins
        if pins is None or any(pins.layouts.get(name) != held for name, held in self._layouts.items()):
            return None
        for name, dtype in _READ.items():  # the kernel writes as much as a map's value has, whatever room there is
            if bpf.map_sizes(pins.maps[name])[1] != dtype.itemsize:
                raise KernelError(
                    f"map {name} in {pins.directory} and its description here differ: reinstall fabricpilot"
                )
        return pins

    def _ensure_loaded(self, settings: Settings | None = None) -> Pins:
        """The pinned data path of this version; brings it there, in place of another version's if there is one.

        With `settings` a new one acts on them from its first packet on.
        """
        self._reopen()
        before = self._pins
        if before is not None and before.identity()["fingerprint"][0].tobytes() == self._fingerprint:
            return before
        loaded = upgrade.load_beside(self.pin_dir, self._flow_entries, self._fingerprint, self._layouts, before)
        with ExitStack() as undo:
            undo.callback(loaded.abandon)
            if settings is not None:
                self._put(loaded.pins, settings)
            hand_over(self.pin_dir, loaded.pins.directory)
            ways = {nic: way for nic, (way, _) in self._scheduled().items()}
            upgrade.turn_over(self._netlink(), ways, before, loaded.pins)
            claim = self._locked(loaded.pins.directory) if self._claim is not None else None
            undo.pop_all()
        self._let_go()
        upgrade.take_place(loaded, self.pin_dir)
        if self._claim is not None:
            os.close(self._claim)
        self._claim = claim
        self._pins = loaded.pins
        return loaded.pins

    def _put(self, pins: Pins, settings: Settings) -> None:
        """Make `settings` the ones in force, if they are not."""
        packed = pack_settings(settings).reshape(1)
        if self._slot_in_force(pins).tobytes() == packed.tobytes():
            return
        other = self._active_index(pins) ^ 1
        bpf.wait_for_running_programs()
        bpf.update(pins.maps["slots"], np.array([other], np.uint32), packed)
        bpf.update(pins.maps["active"], _ZERO, np.array([other], np.uint32))

    def _reopen(self) -> None:
        """Look again at what is pinned: another process may have loaded or detached since."""
        if self._claim is not None and self._pins is not None:
            return  # others leave it alone
        self._let_go()
        pinned.finish_interrupted_swap(self.pin_dir)
        self._pins = Pins.open(self.pin_dir)

    def _let_go(self) -> None:
        if self._pins is not None:
            self._pins.close()
            self._pins = None

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time changes what is pinned here."""
        ensure_bpffs(self.pin_dir)
        with self._alone():
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time is in here, of those whose pins are beside each other."""
        directory = os.open(self.pin_dir.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)

    def _kernel_counters(self, pins: Pins) -> npt.NDArray[np.void]:
        per_cpu = bpf.lookup_percpu(pins.maps["counters"], COUNTERS_DTYPE)
        total = np.zeros((), COUNTERS_DTYPE)
        for field in COUNTERS_DTYPE.names or ():
            total[field] = per_cpu[field].sum(axis=0)
        return total

    def _active_index(self, pins: Pins) -> int:
        index = np.zeros(1, np.uint32)
        bpf.lookup(pins.maps["active"], _ZERO, index)
        return int(index[0]) & 1

    def _slot_in_force(self, pins: Pins) -> npt.NDArray[np.void]:
        slot = np.zeros(1, SETTINGS_DTYPE)
        bpf.lookup(pins.maps["slots"], np.array([self._active_index(pins)], np.uint32), slot)
        return slot

    def _netlink(self) -> IPRoute:
        if self._ipr is None:
            self._ipr = IPRoute()
        return self._ipr
