"""Our one program on a NIC by tcx (Linux 6.6): a BPF link at the head of what runs at egress, before all of clsact.

    PIN_DIR/egress_<interface index>     the link; whoever has it pinned is whose it is

The pin keeps it when the agent goes, and BPF_LINK_UPDATE exchanges its program in one step. A link dies with its device
and leaves the pin behind, and a device that moves to another network namespace takes it along, while either's index may
be another device's by now. So a pin alone says nothing: the device is asked whether that link is on it.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fabricpilot.errors import KernelError
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.hook import Interface
from hostagent.datapath.pinned_names import PROGRAM_PIN
from hostagent.datapath.pins import Pins, new_directory

_LOOPBACK: Final = 1  # its index, in every network namespace


def has_tcx() -> bool:
    """Whether the running kernel has it."""
    return bpf.tcx_egress(_LOOPBACK) is not None


def why_not() -> str:
    """Why a program cannot be attached by tcx in this network namespace, tried on its loopback; empty: it can."""
    try:
        if not has_tcx():
            return "not in this kernel (Linux 6.6, CONFIG_NET_XGRESS)"
        program = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC)
        try:
            os.close(bpf.link_create(program, _LOOPBACK, bpf.TCX_EGRESS, bpf.FIRST))
        finally:
            os.close(program)
    except OSError as error:
        return f"refused: {error.strerror}"
    return ""


class TcxLink:
    """The links of the data path pinned in `pin_dir`."""

    name = "tcx"

    def __init__(self, pin_dir: Path) -> None:
        self._pin_dir = pin_dir

    def program_id(self, index: int) -> int | None:
        """See `Hook.program_id`."""
        return _program_behind(_pin(self._pin_dir, index), index)

    def put(self, nic: Interface, pins: Pins) -> None:
        """See `Hook.put`; pins the link beside that program, too."""
        try:
            if self.program_id(nic.index) is None:
                self.remove(nic.index)  # what an interface of that index before this one has left
                link = bpf.link_create(pins.program, nic.index, bpf.TCX_EGRESS, bpf.FIRST)
            else:
                link = bpf.obj_get(_pin(self._pin_dir, nic.index))
                bpf.link_update(link, pins.program)
            try:
                if not (pin := _pin(pins.directory, nic.index)).exists():
                    bpf.obj_pin(link, pin)
            finally:
                os.close(link)
        except OSError as error:
            why = "it has 64 programs there already" if error.errno == errno.ERANGE else error.strerror
            raise KernelError(f"cannot attach the program to {nic.name} by tcx: {why}") from error

    def remove(self, index: int) -> None:
        """See `Hook.remove`; also a link that is on another interface by now, or on none."""
        pin = _pin(self._pin_dir, index)
        try:
            with _opened(pin) as link:
                if link is not None:
                    bpf.link_detach(link)
            pin.unlink(missing_ok=True)
        except OSError as error:
            raise KernelError(f"cannot take the program off interface {index}: {error.strerror}") from error

    def rival(self, index: int) -> str:
        """See `Hook.rival`; looks at the folders beside this one."""
        ours = (self._pin_dir, new_directory(self._pin_dir))
        for pin in self._pin_dir.parent.glob(f"*/{PROGRAM_PIN}_{index}"):
            if pin.parent not in ours and _program_behind(pin, index) is not None:
                return f"the tcx link pinned as {pin}"
        return ""

    def pinned(self) -> list[int]:
        """Indices of the interfaces that there are pins for, dead ones included."""
        return [int(pin.name.removeprefix(f"{PROGRAM_PIN}_")) for pin in self._pin_dir.glob(f"{PROGRAM_PIN}_[0-9]*")]

    def ahead(self, index: int) -> int:
        """How many tcx programs run before ours on an interface; if ours is not one of them, all do."""
        there = bpf.tcx_egress(index) or []
        ours = _link_id(_pin(self._pin_dir, index))
        return next((place for place, (_, link) in enumerate(there) if link == ours), len(there))


def _pin(directory: Path, index: int) -> Path:
    return directory / f"{PROGRAM_PIN}_{index}"


@contextmanager
def _opened(pin: Path) -> Iterator[int | None]:
    try:
        fd = bpf.obj_get(pin)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _link_id(pin: Path) -> int | None:
    with _opened(pin) as link:
        return None if link is None else bpf.link_id(link)


def _program_behind(pin: Path, index: int) -> int | None:
    """Id of the program that the pinned link has on the interface with that index; None if it is not there."""
    with suppress(PermissionError):  # somebody else's
        if (ours := _link_id(pin)) is not None:
            return next((program for program, link in bpf.tcx_egress(index) or () if link == ours), None)
    return None
