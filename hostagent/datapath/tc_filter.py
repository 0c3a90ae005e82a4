"""Our one filter on each NIC: a BPF program on clsact's egress side, by netlink.

There is never more than one filter of ours on a NIC: preference and handle are fixed, so setting it again replaces it
in one step, without a packet missing it. Its name says whose it is (`owner`, from the folder of the pins) and which
program it runs, so that what a former version left is told from what is in force, and a data path with other pins is
never disturbed. Filters and qdiscs of others are not touched.
"""

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_GETQDISC
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from fabricpilot.errors import KernelError, UsageError
from hostagent.nics import ETHERNET_TYPES, link_named

# Low, so that it runs before filters whose verdict ends the chain; odd enough that nobody else is likely to use it.
PREFERENCE: Final = 53
_HANDLE: Final = 1

_EGRESS: Final = 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)
_INGRESS: Final = 0xFFFFFFF2
_CLSACT_PARENT: Final = 0xFFFFFFF1


@dataclass(frozen=True)
class Interface:
    """A network interface of the current network namespace."""

    name: str
    index: int


def owner_of(pin_dir: Path) -> str:
    """How the filters of the data path pinned in `pin_dir` begin their names."""
    return f"fabricpilot:{hashlib.sha256(str(pin_dir).encode()).hexdigest()[:8]}:"


def find_interface(ipr: IPRoute, name: str) -> Interface:
    """The interface of that name.

    Raises:
        UsageError: there is none, or its packets do not start with an Ethernet header.
    """
    link = link_named(ipr, name)
    if link["ifi_type"] not in ETHERNET_TYPES:
        raise UsageError(f"interface '{name}' is no Ethernet interface; give the Ethernet NIC that carries its packets")
    return Interface(name, link["index"])


def interface_names(ipr: IPRoute) -> dict[int, str]:
    """Names of all interfaces of the current network namespace by index."""
    return {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}


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


def remove_clsact_if_empty(ipr: IPRoute, interface: Interface) -> bool:
    """Remove clsact unless somebody has filters there; returns whether it was removed."""
    if any(ipr.get_filters(index=interface.index, parent=side) for side in (_EGRESS, _INGRESS)):
        return False
    try:
        ipr.tc("del", "clsact", interface.index)
    except NetlinkError as error:
        if error.code not in _GONE:
            raise KernelError(f"cannot remove clsact from {interface.name}: {error.args[1]}") from error
        return False
    return True


def our_program_id(ipr: IPRoute, index: int, owner: str) -> int | None:
    """Id of the program behind our filter on the interface with that index; None if we have no filter there."""
    name = _filter_name(ipr, index)
    if name is None or not name.startswith(owner):
        return None
    return int(name.removeprefix(owner))


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


def remove_filter(ipr: IPRoute, index: int, owner: str) -> bool:
    """Remove our filter; returns whether there was one."""
    if our_program_id(ipr, index, owner) is None:
        return False
    try:
        ipr.tc("del-filter", "bpf", index, _HANDLE, parent=_EGRESS, prio=PREFERENCE)
    except NetlinkError as error:
        if error.code in _GONE:
            return False
        raise KernelError(f"cannot remove the filter of interface {index}: {error.args[1]}") from error
    return True


_GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EINVAL)  # EINVAL: no clsact there
