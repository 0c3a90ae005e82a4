"""Where the egress program is attached on each NIC: by tcx where the kernel has it, else by clsact.

A NIC keeps the way it has until it is let go, whatever is preferred by now: moving it would count packets twice, or
miss some, between the two. So a data path has one program on a NIC at most, and the next agent, of whatever
configuration or version, finds it. Of several NICs some may have it one way, some the other.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from fabricpilot.errors import KernelError
from hostagent.datapath.hook import Hook, Interface
from hostagent.datapath.pins import Pins
from hostagent.datapath.tc_filter import ClsactFilter, remove_clsact_if_empty
from hostagent.datapath.tcx_link import TcxLink, has_tcx

log = logging.getLogger(__name__)

AUTO: Final = "auto"


class Hooks:
    """The programs of the data path pinned in `pin_dir`, NIC by NIC.

    Args:
        pin_dir: where its programs, maps and links are pinned.
        netlink: one long-lived rtnetlink socket, made when it is first needed.
        wanted: for NICs that have none yet: "auto", "tcx" or "clsact".
    """

    def __init__(self, pin_dir: Path, netlink: Callable[[], IPRoute], wanted: str) -> None:
        self._netlink = netlink
        self._wanted = wanted
        self._tcx = TcxLink(pin_dir)
        self._clsact = ClsactFilter(pin_dir, netlink)
        self._told_ahead: dict[int, int] = {}

    def find(self, index: int) -> tuple[Hook, int] | None:
        """How the program is on the interface with that index, and its id; None if it is not."""
        ways: tuple[Hook, ...] = (self._tcx, self._clsact)
        found = ((way, way.program_id(index)) for way in ways)
        return next(((way, program) for way, program in found if program is not None), None)

    def put(self, nic: Interface, pins: Pins) -> None:
        """Have the program of `pins` on the interface, in place of the one before if there is one.

        Raises:
            KernelError: the kernel refused, or another data path has it; nothing is left half-attached.
        """
        if rival := self._tcx.rival(nic.index) or self._clsact.rival(nic.index):
            raise KernelError(
                f"{nic.name} is scheduled by another data path already, by {rival}; detach that one first, or leave "
                "the interface to it"
            )
        there = self.find(nic.index)
        way = there[0] if there else self._preferred()
        known = pins.interfaces()
        with ExitStack() as undo:
            if nic.index not in known:
                undo.callback(pins.drop_interface, nic.index)
                pins.note_interface(nic.index, False)
            way.put(nic, pins)
            undo.pop_all()

    def remove(self, index: int, clsact_is_ours: bool) -> None:
        """Take the program off the interface with that index, however it is there.

        Raises:
            KernelError: the kernel refused.
        """
        self._told_ahead.pop(index, None)
        self._tcx.remove(index)
        self._clsact.remove(index)
        if clsact_is_ours:
            remove_clsact_if_empty(self._netlink(), index)

    def remove_strays(self, present: Collection[int]) -> None:
        """Remove links whose interface is not among those `present`, and those that are no longer on theirs."""
        for index in self._tcx.pinned():
            if index not in present or self._tcx.program_id(index) is None:
                self._told_ahead.pop(index, None)
                self._tcx.remove(index)

    def describe(self, indices: Mapping[int, bool]) -> dict[int, str]:
        """How the program is, or would be, on interfaces, and behind how many programs of others.

        Args:
            indices: of the interfaces, and whether the program is on it.
        """
        linked = set(self._tcx.pinned())
        told = {}
        for index, is_there in indices.items():
            way = self._tcx if index in linked else self._clsact if is_there else self._preferred()
            ahead = self._tcx.ahead(index) if is_there else 0
            told[index] = way.name + (f" behind {ahead} tcx programs" if ahead else "")
        return told

    def tell_of_others(self, nic: Interface) -> None:
        """Log when there are more programs in front of ours than before."""
        ahead = self._tcx.ahead(nic.index)
        if ahead > self._told_ahead.get(nic.index, 0):
            log.warning(
                "%s: %d tcx programs run before ours; a packet for which one of them returns anything but TCX_NEXT "
                "stays untouched",
                nic.name,
                ahead,
            )
        if ahead:
            self._told_ahead[nic.index] = ahead
        else:
            self._told_ahead.pop(nic.index, None)

    def _preferred(self) -> Hook:
        if self._wanted == self._clsact.name:
            return self._clsact
        if has_tcx():
            return self._tcx
        if self._wanted == AUTO:
            return self._clsact
        raise KernelError("datapath.hook = tcx: this kernel has none (Linux 6.6, CONFIG_NET_XGRESS); set it to auto")
