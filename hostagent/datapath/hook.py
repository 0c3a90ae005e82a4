"""A way of having the egress program on a NIC: what tc_filter.py (clsact) and tcx_link.py (tcx) both are.

Whoever attaches, upgrades or detaches speaks to this interface; hooks.py chooses the way for each NIC.
"""

from dataclasses import dataclass
from typing import Protocol

from pyroute2 import IPRoute

from fabricpilot.errors import UsageError
from hostagent.datapath.pins import Pins
from hostagent.nics import ETHERNET_TYPES, link_named


@dataclass(frozen=True)
class Interface:
    """A network interface of the current network namespace."""

    name: str
    index: int


class Hook(Protocol):
    """There is never more than one program of a data path on a NIC by the same way."""

    name: str

    def program_id(self, index: int) -> int | None:
        """Id of this data path's program on the interface with that index; None if it has none there."""

    def put(self, nic: Interface, pins: Pins) -> None:
        """Have the program of `pins` on the interface, in one step in place of the one before if there is one.

        Raises:
            KernelError: the kernel refused; the one before stays.
        """

    def remove(self, index: int) -> None:
        """Take this data path's program off the interface with that index, if it is there.

        Raises:
            KernelError: the kernel refused.
        """

    def rival(self, index: int) -> str:
        """What another data path of fabricpilot has on the interface with that index; empty: nothing."""


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
