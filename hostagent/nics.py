"""The network interfaces of this namespace, and what happens to them while the agent runs.

`LinkWatch` is one rtnetlink socket in the agent's poller: first a dump of all links, then an event for each that comes,
changes or goes. It keeps a table of what there is, so whoever asks acts on the state and not on single events.

    kernel --RTM_NEWLINK, RTM_DELLINK--> read() -> links {index: Nic}, gone {index}
    receive buffer full (ENOBUFS)    --> a dump again, and `resynced`: anything may have happened meanwhile

The messages are decoded here, by hand: a thousand containers that start at once are thousands of messages, and of each
only index, name, type and state are wanted.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fabricpilot.errors import KernelError, UsageError

# Devices whose packets start with an Ethernet header: ARPHRD_ETHER, ARPHRD_LOOPBACK.
ETHERNET_TYPES: Final = (1, 772)
# Temporary interfaces, on which the agent tries what the kernel can do, begin their names so.
SCRATCH_PREFIX: Final = "fptry"

_NETLINK_ROUTE: Final = 0
_RTMGRP_LINK: Final = 1
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_NLM_F_REQUEST: Final = 1
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_IFLA_IFNAME: Final = 3
_IFLA_EXT_MASK: Final = 29
_RTEXT_FILTER_SKIP_STATS: Final = 8
_IFF_UP: Final = 1
_SO_RCVBUFFORCE: Final = 33

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK: Final = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_RECEIVE_BYTES: Final = 1 << 16
_BUFFER_BYTES: Final = 4 << 20  # some thousands of events
_DUMP_TIMEOUT_S: Final = 10.0
_DUMP_ATTEMPTS: Final = 5


@dataclass(frozen=True)
class Nic:
    """A network interface as the kernel describes it now."""

    index: int
    name: str
    ethernet: bool  # its packets begin with an Ethernet header
    up: bool  # administratively


class LinkWatch:
    """The interfaces of the network namespace this was made in, kept up to date by events.

    Attributes:
        links: what there is, by index.

    Raises:
        KernelError: rtnetlink cannot be used.
    """

    def __init__(self) -> None:
        self.links: dict[int, Nic] = {}
        self._gone: set[int] = set()
        self._resynced = False
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        try:
            self._enlarge_buffer()
            self._socket.bind((0, _RTMGRP_LINK))
            self._dump()
        except OSError as error:
            self._socket.close()
            raise KernelError(f"cannot watch network interfaces by rtnetlink: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For a poller; call `read` when it is readable."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def read(self) -> None:
        """Take in all events that wait. Never blocks.

        Raises:
            KernelError: rtnetlink failed.
        """
        while self._take_waiting():
            self._dump()  # events were lost; what the table says may be wrong in any way
            self._resynced = True

    def gone(self) -> set[int]:
        """Indices of interfaces that went away since this was asked last, also where a new one has the index now."""
        gone, self._gone = self._gone, set()
        return gone

    def resynced(self) -> bool:
        """Whether events were lost since this was asked last, so that what was done to a link may be undone."""
        resynced, self._resynced = self._resynced, False
        return resynced

    def named(self, name: str) -> Nic | None:
        """The interface of that name."""
        return next((nic for nic in self.links.values() if nic.name == name), None)

    def _take(self, kind: int, message: bytes) -> None:
        if kind not in (_RTM_NEWLINK, _RTM_DELLINK) or len(message) < _LINK.size:
            return
        family, link_type, index, flags, _ = _LINK.unpack_from(message)
        if family != socket.AF_UNSPEC:  # a bridge tells of its ports, not of links, in the same messages
            return
        if kind == _RTM_DELLINK:
            self.links.pop(index, None)
            self._gone.add(index)
            return
        name = _name(message)
        if name is not None:
            self.links[index] = Nic(index, name, link_type in ETHERNET_TYPES, bool(flags & _IFF_UP))

    def _dump(self) -> None:
        """Read all links anew. What happens during the dump is an event behind it, or in it already."""
        before = set(self.links)
        for _ in range(_DUMP_ATTEMPTS):
            try:
                if self._dump_once():
                    self._gone |= before.difference(self.links)
                    return
            except TimeoutError as error:
                raise KernelError("the kernel did not list its network interfaces in time") from error
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"rtnetlink failed: {error.strerror}") from error
        # Links come and go faster than they can be listed: what was read is nearly right, and events go on.
        self._gone |= before.difference(self.links)

    def _dump_once(self) -> bool:
        """Whether the dump is a consistent picture."""
        self._take_waiting()  # an event from before the dump, read behind it, would bring back what has gone since
        self._sequence += 1
        mask = struct.pack("=HHI", 8, _IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
        request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + mask
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        header = _HEADER.pack(_HEADER.size + len(request), _RTM_GETLINK, flags, self._sequence, 0)
        self._socket.settimeout(_DUMP_TIMEOUT_S)
        try:
            self._socket.send(header + request)
            self.links = {}
            consistent = True
            while True:
                for kind, flags, sequence, message in _messages(self._socket.recv(_RECEIVE_BYTES)):
                    if sequence == self._sequence:
                        consistent &= not flags & _NLM_F_DUMP_INTR
                        if kind == _NLMSG_DONE:
                            return consistent
                        if kind == _NLMSG_ERROR:
                            code = -struct.unpack_from("=i", message)[0]
                            raise OSError(code, os.strerror(code))
                    self._take(kind, message)
        finally:
            self._socket.settimeout(None)

    def _take_waiting(self) -> bool:
        """Take in the events that wait; returns whether some were lost. Never blocks."""
        lost = False
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return lost
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"rtnetlink failed: {error.strerror}") from error
                lost = True
                continue
            for kind, _, _, message in _messages(data):
                self._take(kind, message)

    def _enlarge_buffer(self) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and payload of each netlink message in `data`."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
        if not _HEADER.size <= length <= len(data) - position:
            return
        yield kind, flags, sequence, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def _name(message: bytes) -> str | None:
    position = _LINK.size
    while position + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, position)
        if length < _ATTRIBUTE.size:
            return None
        if kind == _IFLA_IFNAME:
            return message[position + 4 : position + length].rstrip(b"\0").decode("utf-8", "surrogateescape")
        position += (length + 3) & ~3
    return None


def link_named(ipr: IPRoute, interface: str) -> Any:
    """The link message of that name: one question to the kernel, however many interfaces there are.

    Raises:
        UsageError: there is none.
    """
    found = []
    try:
        found = ipr.link("get", ifname=interface)
    except NetlinkError as error:
        if error.code not in (errno.ENODEV, errno.ERANGE, errno.EINVAL):  # none, too long a name, an empty one
            raise
    # The kernel also finds alternative names; what is scheduled is known by its own.
    if found and found[0].get_attr("IFLA_IFNAME") == interface:
        return found[0]
    names = sorted(link.get_attr("IFLA_IFNAME") for link in ipr.get_links())
    shown = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
    raise UsageError(f"interface '{interface}' does not exist; there are: {shown or 'none'}")
