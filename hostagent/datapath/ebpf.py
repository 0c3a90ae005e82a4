"""The eBPF data path: works on the program and maps pinned in a bpffs, and brings them there when they are not.

Opening adopts whatever an earlier agent has left: flow table, settings and counters go on. Nothing is loaded before
`attach` or `apply` needs it, so looking (`attached`, `flows`, `counters`) never changes the kernel. A data path of
another version (its fingerprint differs) can be detached but not read; `attach` puts a fresh one in its place, filter
by filter, and counts that as a fresh start: flows known until then are of unknown age, and `apply` must follow.

bcc runs in a child (ebpf_loader.py); this module uses bpf(2) and netlink only.
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
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
from hostagent.datapath import tc_filter
from hostagent.datapath.base import FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, FlowTable, Settings
from hostagent.datapath.bpffs import ensure_bpffs
from hostagent.datapath.ebpf_loader import load
from hostagent.datapath.layout import COUNTERS_DTYPE, SETTINGS_DTYPE, name_counters, pack_settings, unpack_settings
from hostagent.datapath.pins import Pins
from hostagent.datapath.source import fingerprint
from hostagent.datapath.tc_filter import Interface

log = logging.getLogger(__name__)

_ZERO: Final = np.zeros(1, np.uint32)


class EbpfDatapath:
    """The `Datapath` on a clsact egress program; see base.py for the contract.

    Args:
        pin_dir: folder in a bpffs; one per network namespace.
        flow_entries: size of the flow table.

    Raises:
        KernelError: bpf(2) is not allowed, or what is pinned cannot be opened.
        UsageError: not a path a BPF file system takes, or what is pinned belongs to another network namespace.
    """

    name = "ebpf"
    capabilities = frozenset({"adopt", "exact_payload", "segments", "evict", "forget", "bridged"})

    def __init__(self, pin_dir: Path, flow_entries: int) -> None:
        if not pin_dir.is_absolute() or "." in pin_dir.name:
            raise UsageError(f"datapath.pin_dir = {pin_dir} must be an absolute path, its last part without dots")
        self.pin_dir = pin_dir
        self._owner = tc_filter.owner_of(pin_dir)
        self._flow_entries = flow_entries
        self._fingerprint = fingerprint(flow_entries)
        self._ipr: IPRoute | None = None
        self._evicted = 0
        self._last_flows = 0
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
        """Whether a data path of this version is in the kernel: its flows, settings and counters can be read."""
        return self._readable() is not None

    def attach(self, interface: str) -> None:
        """See `Datapath.attach`; loads the data path first where it is not there yet."""
        nic = tc_filter.find_interface(self._netlink(), interface)
        with self._exclusive():
            pins = self._ensure_loaded()
            program = bpf.prog_id(pins.program)
            if (
                nic.index in pins.interfaces()
                and tc_filter.our_program_id(self._netlink(), nic.index, self._owner) == program
            ):
                return
            self._attach(pins, nic, program)

    def attached(self) -> list[str]:
        """See `Datapath.attached`."""
        if self._pins is None:
            return []
        pinned_program = bpf.prog_id(self._pins.program)
        return sorted(nic.name for nic, program in self._filters().items() if program == pinned_program)

    def detach(self) -> None:
        """See `Datapath.detach`. Also removes filters of ours whose pins are gone; leaves clsact that others use."""
        if not self.pin_dir.parent.is_dir():
            return  # no BPF file system here: nothing was ever pinned
        ipr = self._netlink()
        with self._exclusive():
            self._reopen()
            noted = self._pins.interfaces() if self._pins is not None else {}
            for index, name in tc_filter.interface_names(ipr).items():
                tc_filter.remove_filter(ipr, index, self._owner)
                if noted.get(index):
                    tc_filter.remove_clsact_if_empty(ipr, Interface(name, index))
            self._let_go()
            pinned.remove_directory(pinned.new_directory(self.pin_dir))
            pinned.remove_directory(self.pin_dir)

    def apply(self, settings: Settings) -> None:
        """See `Datapath.apply`; loads the data path first where it is not there yet.

        Costs an RCU grace period (milliseconds): a slot is filled only when no packet can still be reading it.
        """
        packed = pack_settings(settings).reshape(1)
        with self._exclusive():
            pins = self._ensure_loaded()
            if self._slot_in_force(pins).tobytes() == packed.tobytes():
                return
            other = self._active_index(pins) ^ 1
            bpf.wait_for_running_programs()
            bpf.update(pins.maps["slots"], np.array([other], np.uint32), packed)
            bpf.update(pins.maps["active"], _ZERO, np.array([other], np.uint32))

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
        # What was inserted, and neither forgotten nor read, made room for others: the kernel does not count evictions.
        # Inserts during the read hide some until the next one, so the count never runs ahead, nor back.
        inserted = int(self._kernel_counters(pins)["flows_inserted"]) - int(pins.identity()["flows_forgotten"][0])
        # A quarter more than last time, so that the arrays seldom have to grow while the kernel fills them.
        expected = self._last_flows + self._last_flows // 4
        keys, states = bpf.lookup_all(pins.maps["flows"], FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, expected)
        self._last_flows = len(keys)
        self._evicted = max(self._evicted, inserted - len(keys))
        return FlowTable(keys, states, read_at_ns)

    def forget(self, keys: npt.NDArray[np.void]) -> int:
        """See `Datapath.forget`."""
        pins = self._readable()
        if pins is None or len(keys) == 0:
            return 0
        forgotten = bpf.delete_all(pins.maps["flows"], keys)

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
        named["flows_evicted"] = self._evicted  # as of the last read of the flow table
        named["fresh_starts"] = int(identity["fresh_starts"])
        return named

    def close(self) -> None:
        """See `Datapath.close`."""
        self._let_go()
        if self._ipr is not None:
            self._ipr.close()
            self._ipr = None

    def _attach(self, pins: Pins, nic: Interface, program: int) -> None:
        ipr = self._netlink()
        with ExitStack() as undo:
            had_clsact = tc_filter.has_clsact(ipr, nic)
            known = pins.interfaces().get(nic.index)
            # Noted before the change: an agent killed right behind it must not leave a clsact nobody owns.
            pins.note_interface(nic.index, known is True or not had_clsact)
            if known is None:
                undo.callback(pins.drop_interface, nic.index)
            if not had_clsact:
                tc_filter.add_clsact(ipr, nic)
                undo.callback(tc_filter.remove_clsact_if_empty, ipr, nic)
            tc_filter.set_filter(ipr, nic, self._owner, pins.program, program)
            undo.pop_all()

    def _filters(self) -> dict[Interface, int]:
        """Program id behind our filter on each interface this data path was attached to, where there is one."""
        if self._pins is None:
            return {}
        ipr = self._netlink()
        names = tc_filter.interface_names(ipr)
        known = [Interface(names[index], index) for index in self._pins.interfaces() if index in names]
        programs = {nic: tc_filter.our_program_id(ipr, nic.index, self._owner) for nic in known}
        return {nic: program for nic, program in programs.items() if program is not None}

    def _readable(self) -> Pins | None:
        """The pinned data path if it is of this version."""
        if self._pins is None or self._pins.identity()["fingerprint"][0].tobytes() != self._fingerprint:
            return None
        return self._pins

    def _ensure_loaded(self) -> Pins:
        """The pinned data path of this version; loads it, in place of another version's if there is one."""
        self._reopen()
        if (pins := self._readable()) is not None:
            return pins
        new = pinned.new_directory(self.pin_dir)
        filters = self._filters()
        with ExitStack() as undo:
            new.mkdir(mode=0o700)
            undo.callback(pinned.remove_directory, new)
            said = load(new, self._flow_entries)
            try:
                pinned.complete(new, self._fingerprint, self._pins)
            except OSError as error:
                raise KernelError(f"cannot pin the data path in {new}: {error.strerror}") from error
            loaded = Pins.open(new)
            if loaded is None:
                raise KernelError(f"{new} vanished while the data path was loaded; is something else removing pins?")
            undo.callback(loaded.close)
            program = bpf.prog_id(loaded.program)
            for nic in filters:
                tc_filter.set_filter(self._netlink(), nic, self._owner, loaded.program, program)
            undo.pop_all()
        log.info("loaded the BPF program: %s instructions in %s s", said["instructions"], said["seconds"])
        if self._pins is not None:
            log.warning("the data path in %s was of another version: its flow table starts afresh", self.pin_dir)
        self._let_go()
        pinned.remove_directory(self.pin_dir)
        new.rename(self.pin_dir)
        loaded.directory = self.pin_dir
        self._pins = loaded
        return loaded

    def _reopen(self) -> None:
        """Look again at what is pinned: another process may have loaded or detached since."""
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
