"""Traffic control messages, raw: read every object of an interface, create, change, delete.

pyroute2 carries the messages (its socket, sequence numbers, errors); the options stay bytes, because its classes do not
know every kind and a snapshot must come back bit by bit.
"""

import errno
import socket
import struct
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, nlmsg
from pyroute2.netlink.exceptions import NetlinkError

from fabricpilot.errors import KernelError
from hostagent.qdisc.objects import HANDLE, KEPT_ATTRIBUTES, ROOT, Noun, TcObject, attributes

_NEW: dict[Noun, int] = {"qdisc": 36, "class": 40, "filter": 44}  # RTM_NEWQDISC, RTM_NEWTCLASS, RTM_NEWTFILTER
_DELETE_AFTER_NEW, _GET_AFTER_NEW = 1, 2  # RTM_DEL*, RTM_GET* follow RTM_NEW*
_KIND, _OPTIONS = 1, 2
_HEADER_BYTES, _TCMSG_BYTES = 16, 20

# clsact and ingress are no queues; they belong to the data path.
_NOT_QUEUES = ("clsact", "ingress")
# Kinds whose classes are made one by one; those of the others come with the qdisc.
_MADE_CLASSES = ("htb", "hfsc", "drr", "qfq")


class _Message(nlmsg):  # type: ignore[misc]
    """`struct tcmsg` and its attributes, none of them interpreted."""

    prefix = "TCA_"
    fields = (
        ("family", "B"),
        ("pad1", "B"),
        ("pad2", "H"),
        ("index", "i"),
        ("handle", "I"),
        ("parent", "I"),
        ("info", "I"),
    )
    nla_map = (
        (_KIND, "TCA_KIND", "asciiz"),
        (_OPTIONS, "TCA_OPTIONS", "cdata"),
        *((number, f"TCA_{number}", "cdata") for number in KEPT_ATTRIBUTES),
    )


def read_objects(ipr: IPRoute, ifindex: int) -> tuple[TcObject, ...]:
    """Every qdisc, class made by hand and filter on the interface, without clsact, ingress and what hangs on them."""
    qdiscs = [q for q in _dump(ipr, "qdisc", ifindex) if q.kind not in _NOT_QUEUES]
    kinds = {q.handle >> 16: q.kind for q in qdiscs if q.handle}
    classes = [c for c in _dump(ipr, "class", ifindex) if c.handle >> 16 in kinds]
    filters: list[TcObject] = []
    for parent in [q.handle for q in qdiscs if q.handle] + [c.handle for c in classes if c.kind in _MADE_CLASSES]:
        filters += [f for f in _dump(ipr, "filter", ifindex, parent) if f.handle]
    made = [c for c in classes if c.kind in _MADE_CLASSES]
    # Queues with handle 0 below a root come by themselves (children of mq).
    kept = [q for q in qdiscs if q.handle or q.parent == ROOT]
    return (*kept, *made, *filters)


def root_of(objects: tuple[TcObject, ...]) -> TcObject | None:
    """The root qdisc among `objects`."""
    return next((o for o in objects if o.noun == "qdisc" and o.parent == ROOT), None)


def is_ours(root: TcObject | None) -> bool:
    """Whether a root qdisc is one this project built."""
    return root is not None and root.handle == HANDLE


def is_default(root: TcObject | None) -> bool:
    """Whether a root qdisc is one the kernel chose: those have no handle."""
    return root is None or root.handle == 0


def create(ipr: IPRoute, ifindex: int, obj: TcObject) -> None:
    """Make the object; a root takes the place of the one before it. Raises NetlinkError."""
    how = NLM_F_REPLACE if obj.noun == "qdisc" and obj.parent == ROOT else NLM_F_EXCL
    _send(ipr, ifindex, obj, _NEW[obj.noun], NLM_F_CREATE | how)


def change(ipr: IPRoute, ifindex: int, obj: TcObject) -> None:
    """Change an existing object in place. Raises NetlinkError."""
    _send(ipr, ifindex, obj, _NEW[obj.noun], NLM_F_REPLACE)


def delete_root(ipr: IPRoute, ifindex: int) -> None:
    """Delete the root qdisc and all below it, so that the kernel's default returns."""
    root = TcObject("qdisc", "", 0, ROOT)
    try:
        _send(ipr, ifindex, root, _NEW["qdisc"] + _DELETE_AFTER_NEW, 0)
    except NetlinkError as error:
        if error.code != errno.ENOENT:  # nothing but the default was there
            raise


def refused(error: NetlinkError, what: str) -> KernelError:
    """The one line for a person about a request the kernel refused."""
    if error.code == errno.EPERM:
        return KernelError(f"{what} is not permitted; run as root or give CAP_NET_ADMIN")
    name = errno.errorcode.get(error.code, str(error.code))
    reason = error.args[1] if len(error.args) > 1 and error.args[1] else "no reason given"
    return KernelError(f"the kernel refused: {what} ({name}: {reason})")


def _send(ipr: IPRoute, ifindex: int, obj: TcObject, message_type: int, flags: int) -> None:
    message = _request(message_type, NLM_F_REQUEST | NLM_F_ACK | flags, ifindex)
    message["handle"], message["parent"], message["info"] = obj.handle, obj.parent, obj.info
    if obj.kind:
        message["attrs"].append(("TCA_KIND", obj.kind))
    if obj.options is not None:
        message["attrs"].append(("TCA_OPTIONS", obj.options))
    message["attrs"] += [(f"TCA_{number}", value) for number, value in obj.extra]
    ipr.nlm_request_batch([message])


def _dump(ipr: IPRoute, noun: Noun, ifindex: int, parent: int = 0) -> list[TcObject]:
    message = _request(_NEW[noun] + _GET_AFTER_NEW, NLM_F_REQUEST | NLM_F_DUMP, ifindex)
    message["parent"] = parent
    found = []
    for reply in ipr.nlm_request_batch([message]):
        header = reply["header"]
        if header["type"] == _NEW[noun]:
            raw = bytes(reply.data[reply.offset : reply.offset + header["length"]])
            index, obj = _decode(noun, raw[_HEADER_BYTES:])
            if index == ifindex:
                found.append(obj)
    return found


def _request(message_type: int, flags: int, ifindex: int) -> Any:
    message = _Message()
    message["header"]["type"] = message_type
    message["header"]["flags"] = flags
    message["family"] = socket.AF_UNSPEC
    message["index"] = ifindex
    return message


def _decode(noun: Noun, payload: bytes) -> tuple[int, TcObject]:
    index, handle, parent, info = struct.unpack_from("=4xiIII", payload)
    kind, options, extra = "", None, []
    for number, value in attributes(payload[_TCMSG_BYTES:]):
        if number == _KIND:
            kind = value.rstrip(b"\0").decode()
        elif number == _OPTIONS:
            options = value
        elif number in KEPT_ATTRIBUTES:
            extra.append((number, value))
    if noun == "class" and parent == ROOT:  # how the kernel shows a class right below its qdisc
        parent = handle & 0xFFFF_0000
    # tcm_info of a qdisc is its reference count and of a class its leaf: what is there, not what was asked for.
    return index, TcObject(noun, kind, handle, parent, options, info if noun == "filter" else 0, tuple(extra))
