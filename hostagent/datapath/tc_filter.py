"""Our one program on a NIC by clsact, on any kernel: a filter on its egress side, by netlink.

There is never more than one filter of ours on a NIC: preference and handle are fixed, so setting it again replaces it
in one step, without a packet missing it. Its name says whose it is (`owner`, from the folder of the pins) and which
program it runs, so that what a former version left is told from what is in force, and a data path with other pins is
never disturbed. Filters and qdiscs of others are not touched.
"""

import errno
import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_GETQDISC
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from fabricpilot.errors import KernelError
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.hook import Interface
from hostagent.datapath.pins import Pins

# Low, so that it runs before filters whose verdict ends the chain; odd enough that nobody else is likely to use it.
PREFERENCE: Final = 53
_HANDLE: Final = 1

_EGRESS: Final = 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)
_INGRESS: Final = 0xFFFFFFF2
_CLSACT_PARENT: Final = 0xFFFFFFF1
_ANY_OWNER: Final = "fabricpilot:"


class ClsactFilter:
    """The filters of the data path pinned in `pin_dir`.

    Args:
        pin_dir: decides how their names begin.
        netlink: one long-lived rtnetlink socket, made when it is first needed.
    """

    name = "clsact"

    def __init__(self, pin_dir: Path, netlink: Callable[[], IPRoute]) -> None:
        self._owner = f"{_ANY_OWNER}{hashlib.sha256(str(pin_dir).encode()).hexdigest()[:8]}:"
        self._netlink = netlink

    def program_id(self, index: int) -> int | None:
        """See `Hook.program_id`."""
        name = _filter_name(self._netlink(), index)
        if name is None or not name.startswith(self._owner):
            return None
        return int(name.removeprefix(self._owner))

    def put(self, nic: Interface, pins: Pins) -> None:
        """See `Hook.put`; adds clsact where there is none, and notes whose it is."""
        ipr = self._netlink()
        with ExitStack() as undo:
            if not has_clsact(ipr, nic):
                # Noted before the change: an agent killed right behind it must not leave a clsact nobody owns.
                pins.note_interface(nic.index, True)
                add_clsact(ipr, nic)
                undo.callback(remove_clsact_if_empty, ipr, nic.index)
            set_filter(ipr, nic, self._owner, pins.program, bpf.prog_id(pins.program))
            undo.pop_all()

    def remove(self, index: int) -> None:
        """See `Hook.remove`."""
        if self.program_id(index) is not None:
            remove_filter(self._netlink(), index)

    def rival(self, index: int) -> str:
        """See `Hook.rival`."""
        name = _filter_name(self._netlink(), index) or ""
        theirs = name.startswith(_ANY_OWNER) and not name.startswith(self._owner)
        return f"the filter {name} on clsact, preference {PREFERENCE}" if theirs else ""


def has_clsact(ipr: IPRoute, interface: Interface) -> bool:
    """Whether the interface has a clsact qdisc.

    Raises:
        KernelError: an ingress qdisc is in its place.
    """
    # Mostly there is none, and one question tells. A dump lists those of all interfaces, and there may be thousands.
    question = tcmsg()
    question["header"]["type"], question["header"]["flags"] = RTM_GETQDISC, NLM_F_REQUEST | NLM_F_ACK
    question["index"], question["parent"] = interface.index, _CLSACT_PARENT
    try:
        ipr.nlm_request_batch([question])
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            return False
        raise KernelError(f"cannot list the qdiscs of {interface.name}: {error.args[1]}") from error
    kinds = [q.get_attr("TCA_KIND") for q in ipr.get_qdiscs(interface.index) if q["parent"] == _CLSACT_PARENT]
    if not kinds or kinds == ["clsact"]:  # none: there was one once
        return bool(kinds)
    raise KernelError(
        f"{interface.name} has an ingress qdisc where clsact has to go; whoever set it can use clsact instead "
        f"(`tc qdisc del dev {interface.name} ingress` removes it)"
    )


def add_clsact(ipr: IPRoute, interface: Interface) -> None:
    """Give the interface a clsact qdisc.

    Raises:
        KernelError: the kernel refused.
    """
    try:
        ipr.tc("add", "clsact", interface.index)
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            raise KernelError("this kernel has no clsact qdisc (CONFIG_NET_SCH_INGRESS)") from error
        raise KernelError(f"cannot add clsact to {interface.name}: {error.args[1]}") from error


def remove_clsact_if_empty(ipr: IPRoute, index: int) -> None:
    """Remove an interface's clsact unless somebody has filters there.

    Raises:
        KernelError: the kernel refused.
    """
    if any(ipr.get_filters(index=index, parent=side) for side in (_EGRESS, _INGRESS)):
        return
    try:
        ipr.tc("del", "clsact", index)
    except NetlinkError as error:
        if error.code not in _GONE:
            raise KernelError(f"cannot remove clsact from interface {index}: {error.args[1]}") from error


def _filter_name(ipr: IPRoute, index: int) -> str | None:
    """Name of the filter that has our preference, whoever set it ("" if it has no name); None if there is none."""
    try:
        filters = ipr.get_filters(index=index, parent=_EGRESS)
    except NetlinkError as error:
        if error.code in _GONE:
            return None
        raise KernelError(f"cannot list the filters of interface {index}: {error.args[1]}") from error
    for found in filters:
        if found["info"] >> 16 == PREFERENCE and found["handle"] != 0:  # handle 0 stands for the list of filters
            options = found.get_attr("TCA_OPTIONS")
            name = options.get_attr("TCA_BPF_NAME") if found.get_attr("TCA_KIND") == "bpf" and options else None
            return name or ""
    return None


def set_filter(ipr: IPRoute, interface: Interface, owner: str, program_fd: int, program_id: int) -> None:
    """Make the program our filter on the interface, in place of the one before if there is one.

    Raises:
        KernelError: the kernel refused, or somebody else's filter has our preference.
    """
    taken_by = _filter_name(ipr, interface.index)
    if taken_by is not None and not taken_by.startswith(owner):
        raise KernelError(
            f"egress filter preference {PREFERENCE} of {interface.name} is taken by another filter, '{taken_by}'; move "
            f"it to another preference, or remove it with `tc filter del dev {interface.name} egress pref {PREFERENCE}`"
        )
    try:
        ipr.tc(
            "replace-filter",
            "bpf",
            interface.index,
            _HANDLE,
            fd=program_fd,
            name=f"{owner}{program_id}",
            parent=_EGRESS,
            prio=PREFERENCE,
            direct_action=True,
        )
    except NetlinkError as error:
        raise KernelError(f"cannot attach the program to {interface.name}: {error.args[1]}") from error


def remove_filter(ipr: IPRoute, index: int) -> None:
    """Remove the filter that has our preference and handle.

    Raises:
        KernelError: the kernel refused.
    """
    try:
        ipr.tc("del-filter", "bpf", index, _HANDLE, parent=_EGRESS, prio=PREFERENCE)
    except NetlinkError as error:
        if error.code not in _GONE:
            raise KernelError(f"cannot remove the filter of interface {index}: {error.args[1]}") from error


_GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EINVAL)  # EINVAL: no clsact there
