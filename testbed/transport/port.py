"""A switch port as the marker needs it: does its qdisc count a backlog; put our filter on its egress, take it off.

Everything goes through one netlink socket that is open in the port's namespace.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from fabricpilot.errors import FabricpilotError, KernelError, UsageError
from testbed.netns.enter import NETNS_DIR, call_in

PRIORITY: Final = 0xC001  # of our filter: after other programs of the port, which see the packet unmarked
_HANDLE: Final = 1
_EGRESS: Final = "ffff:fff3"
_CLSACT_SIDES: Final = (0xFFFFFFF2, 0xFFFFFFF3)  # ingress, egress
_ROOT: Final = 0xFFFFFFFF
_UNCOUNTED_QDISCS: Final = frozenset({"noqueue", "pfifo_fast", "mq", "mqprio", "none"})  # no one backlog to read
_ETH_P_ALL: Final = 0x0003


@contextmanager
def open_port(netns: str | None, interface: str) -> Iterator["Port"]:
    """The port of that name, inside the block.

    Raises:
        UsageError: no such namespace, or no such interface in it.
    """
    from pyroute2 import IPRoute

    if netns is not None and not (NETNS_DIR / netns).exists():
        raise UsageError(f"no network namespace '{netns}'; `ip netns list` shows those that exist")
    # Not IPRoute(netns=...): it forks, and beside other threads (a progress bar's) the child's socket is not ours.
    descriptor = call_in(netns, _open_netlink) if netns else _open_netlink()
    with IPRoute(fileno=descriptor) as netlink:  # closes it
        yield Port(netlink, interface, netns)


def _open_netlink() -> int:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE).detach()


class Port:
    """The interface, through an open netlink socket in its namespace."""

    _ADDRESS: Final[dict[str, Any]] = {"parent": _EGRESS, "prio": PRIORITY, "handle": _HANDLE, "protocol": _ETH_P_ALL}

    def __init__(self, netlink: Any, interface: str, netns: str | None) -> None:
        found = netlink.link_lookup(ifname=interface)
        self.name = f"{netns}/{interface}" if netns else interface
        if not found:
            raise UsageError(f"no interface {self.name}; give a port that exists")
        self._netlink, self._index = netlink, int(found[0])

    def backlog_bytes(self) -> int:
        """What is queued on the port now, as its root qdisc says (the marker reads the same number)."""
        root = self._root_qdisc()
        return int(root.get_attr("TCA_STATS2").get_attr("TCA_STATS_QUEUE")["backlog"]) if root else 0

    def check_backlog(self) -> None:
        """Raise `KernelError` unless the root qdisc counts its own backlog."""
        root = self._root_qdisc()
        kind = root.get_attr("TCA_KIND") if root else "none"
        if kind in _UNCOUNTED_QDISCS:
            raise KernelError(f"its root qdisc is '{kind}', which has no backlog of its own (htb, tbf or bfifo have)")

    @contextmanager
    def filtered_by(self, program_fd: int) -> Iterator[None]:
        """Have the program run for every packet that leaves, inside the block."""
        from pyroute2.netlink.exceptions import NetlinkError

        ours = self._add_clsact()
        try:
            try:
                self._netlink.tc(
                    "add-filter",
                    "bpf",
                    self._index,
                    fd=program_fd,
                    name="ecn_marker",
                    direct_action=True,
                    **self._ADDRESS,
                )
            except NetlinkError as error:
                if error.code == errno.EEXIST:
                    raise UsageError(f"{self.name} has an ECN marker already; detach that one first") from error
                raise FabricpilotError(f"cannot attach the ECN marker to {self.name}: {error}") from error
            try:
                yield
            finally:
                self.remove_filter()
        finally:
            if ours and not self._filters():
                self._remove_clsact()

    def remove_filter(self) -> bool:
        """Remove our filter; returns whether there was one. A port that has gone took it along."""
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            self._netlink.tc("del-filter", "bpf", self._index, **self._ADDRESS)
        except NetlinkError as error:
            if error.code in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
                return False
            raise
        return True

    def _add_clsact(self) -> bool:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            self._netlink.tc("add", "clsact", self._index)
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                return False
            raise KernelError(f"{self.name} takes no clsact qdisc (CONFIG_NET_SCH_INGRESS): {error}") from error
        return True

    def _remove_clsact(self) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        with suppress(NetlinkError):  # gone with its port
            self._netlink.tc("del", "clsact", self._index)

    def _filters(self) -> bool:
        """Whether any program or filter is attached at either side of the clsact."""
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            return any(self._netlink.get_filters(index=self._index, parent=p) for p in _CLSACT_SIDES)
        except NetlinkError:
            return False

    def _root_qdisc(self) -> Any:
        return next((q for q in self._netlink.get_qdiscs(index=self._index) if q["parent"] == _ROOT), None)
