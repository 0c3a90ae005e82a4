"""Which qdiscs and classifiers this kernel has, found by trying each on a temporary interface, never on the user's NIC.

Asking for a kind also loads its module where the kernel has modules, so a look at /proc or at the kernel configuration
would say less. Every try is undone.
"""

import errno
import struct

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fabricpilot.errors import KernelError
from hostagent.qdisc.link import add_scratch_link, remove_link
from hostagent.qdisc.objects import ETH_P_IP, HANDLE, ROOT, TcObject, htb_root, prio_root, u32_filter
from hostagent.qdisc.rtnetlink import create, delete_root, refused

_TRIED = (
    TcObject("qdisc", "pfifo_fast", HANDLE, ROOT),
    TcObject("qdisc", "bfifo", HANDLE, ROOT, struct.pack("=I", 65536)),
    TcObject("qdisc", "fq_codel", HANDLE, ROOT),
    htb_root(0),
    prio_root(2, (1,) * 16),
)
_CLASSFUL = ("htb", "prio")  # what a filter can hang on
_U32 = u32_filter(1, ETH_P_IP, (0, 0, 0), "u32 0 0", 0)


def supported_kinds(ipr: IPRoute) -> frozenset[str]:
    """Names of the qdiscs and classifiers to build with that this kernel has.

    Raises:
        KernelError: not permitted, no temporary interface possible, or an answer that is neither yes nor no.
    """
    try:
        scratch = add_scratch_link(ipr)
    except NetlinkError as error:
        raise refused(error, "making a temporary interface to see which qdiscs there are") from error
    if scratch is None:
        raise KernelError(
            "cannot make a temporary interface to see which qdiscs there are; "
            "the kernel needs one of CONFIG_DUMMY, CONFIG_VETH, CONFIG_IFB"
        )
    try:
        found = set()
        for obj in _TRIED:
            if _has(ipr, scratch.index, obj):
                found.add(obj.kind)
                if obj.kind in _CLASSFUL and _has(ipr, scratch.index, _U32):
                    found.add("u32")
                delete_root(ipr, scratch.index)
    finally:
        remove_link(ipr, scratch)
    return frozenset(found)


def _has(ipr: IPRoute, ifindex: int, obj: TcObject) -> bool:
    try:
        create(ipr, ifindex, obj)
    except NetlinkError as error:
        if error.code == errno.ENOENT:  # "Specified qdisc kind is unknown", likewise for a classifier
            return False
        raise refused(error, f"trying whether there is {obj.kind}") from error
    return True
