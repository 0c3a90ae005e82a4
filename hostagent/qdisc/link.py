"""The network interface the queues go on: its index, its transmit queues, and the rate it says it has."""

import errno
import fcntl
import os
import re
import secrets
import socket
import struct
from array import array
from dataclasses import dataclass

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from hostagent.nics import SCRATCH_PREFIX, link_named

_SIOCETHTOOL = 0x8946
_ETHTOOL_GSET = 1
_ETHTOOL_CMD_BYTES = 44  # struct ethtool_cmd; speed in Mbit/s is 16 bits at 12 and 16 more at 28
_UNKNOWN_SPEED = 0xFFFF_FFFF

# Names of temporary interfaces: fptry<process id><2 random digits>, all hexadecimal, the other end of a pair with a p.
# The process id tells those of a process that was killed from those in use.
_SCRATCH = re.compile(SCRATCH_PREFIX + r"([0-9a-f]{7})[0-9a-f]{2}")


@dataclass(frozen=True)
class Link:
    """An interface as the kernel lists it."""

    index: int
    name: str
    transmit_queues: int


def find_link(ipr: IPRoute, interface: str) -> Link:
    """The interface of that name in the namespace of `ipr`.

    Raises:
        UsageError: there is none.
    """
    link = link_named(ipr, interface)
    return Link(link["index"], interface, link.get_attr("IFLA_NUM_TX_QUEUES") or 1)


def link_rate_bps(link: Link) -> int | None:
    """The speed the NIC reports, bit/s; None where it knows none or is not in this process's namespace.

    Asked by ioctl and not in /sys, which shows the namespace it was mounted in.
    """
    request = array("B", struct.pack(f"=I{_ETHTOOL_CMD_BYTES - 4}x", _ETHTOOL_GSET))
    ifreq = struct.pack("16sP8x", link.name.encode(), request.buffer_info()[0])  # the kernel answers into `request`
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            if socket.if_nametoindex(link.name) != link.index:
                return None
            fcntl.ioctl(sock, _SIOCETHTOOL, ifreq)
        except OSError:  # no such device here, or a driver without ethtool
            return None
    low, high = struct.unpack_from("=12xH14xH", request)
    speed_mbps: int = high << 16 | low
    return speed_mbps * 1_000_000 if speed_mbps not in (0, _UNKNOWN_SPEED, 0xFFFF) else None


def add_scratch_link(ipr: IPRoute, transmit_queues: int = 1) -> Link | None:
    """A temporary interface to try things on, down and unaddressed; None if this kernel has no virtual ones.

    Raises:
        NetlinkError: not permitted.
    """
    name = f"{SCRATCH_PREFIX}{os.getpid():07x}{secrets.token_hex(1)}"
    for kind in ("dummy", "veth", "ifb"):
        other_end = {"peer": {"ifname": f"{name}p"}} if kind == "veth" else {}
        try:
            ipr.link("add", ifname=name, kind=kind, num_tx_queues=transmit_queues, **other_end)
        except NetlinkError as error:
            if error.code == errno.EPERM:
                raise
            continue  # this kernel lacks the kind
        return find_link(ipr, name)
    return None


def remove_link(ipr: IPRoute, link: Link) -> None:
    """Remove a temporary interface."""
    ipr.link("del", index=link.index)


def remove_abandoned_links(ipr: IPRoute) -> list[str]:
    """Remove the temporary interfaces of processes that were killed; returns their names."""
    removed = []
    for index, name in [(link["index"], link.get_attr("IFLA_IFNAME")) for link in ipr.get_links()]:
        made = _SCRATCH.fullmatch(name)
        if made is None or _is_alive(int(made[1], 16)):
            continue
        try:
            ipr.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise
        removed.append(name)
    return removed


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
