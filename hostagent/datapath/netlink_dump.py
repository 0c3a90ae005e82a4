"""Dumps of the netfilter netlink families into numpy columns.

    messages = NetfilterDump().read(subsystem, message, family, attributes)
    for shape in shapes(messages, header): shape.uint32(path), shape.octets(path, width) ...

Entries of one kind have the same attributes at the same offsets, so each distinct shape is parsed once in Python
and its columns are gathered for all its entries at once. 50,000 conntrack entries have two to ten shapes. pyroute2
builds an object per attribute instead, which takes over ten times as long (`fabricpilot bench netfilter`).
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Path = tuple[int, ...]  # attribute types from the outermost to the one meant

_NETLINK_NETFILTER: Final = 12
_NLM_F_REQUEST: Final = 1
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF

MESSAGE_HEADER_BYTES: Final = 20  # nlmsghdr, nfgenmsg
ATTRIBUTE_HEADER_BYTES: Final = 4
_RECEIVE_BYTES: Final = 1 << 20
_TIMEOUT_S: Final = 10.0
_ATTEMPTS: Final = 3  # a dump that something changed meanwhile is read again so often


@dataclass(frozen=True)
class Entries:
    """Equal things in one buffer: `offsets` and `lengths` (shape (n,)) of messages or of nested attributes."""

    buffer: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.intp]
    lengths: npt.NDArray[np.intp]


class NetfilterDump:
    """A socket that dumps what nfnetlink subsystems hold, of the network namespace it was made in."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def read(self, subsystem: int, message: int, family: int = 0, attributes: bytes = b"") -> Entries:
        """All messages of one dump.

        Args:
            subsystem: NFNL_SUBSYS_*.
            message: its message type that asks for the dump.
            family: AF_* or NFPROTO_*; 0 is all.
            attributes: packed by `attribute`.

        Raises:
            OSError: what the kernel answered (ENOENT: there is no such table), or a timeout.
        """
        for _ in range(_ATTEMPTS):
            entries, interrupted = self._read_once(subsystem, message, family, attributes)
            if not interrupted:
                break
        return entries

    def _read_once(self, subsystem: int, message: int, family: int, attributes: bytes) -> tuple[Entries, bool]:
        self._sequence += 1
        length = MESSAGE_HEADER_BYTES + len(attributes)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        header = struct.pack("=IHHIIBBH", length, subsystem << 8 | message, flags, self._sequence, 0, family, 0, 0)
        self._socket.send(header + attributes)
        received = bytearray()
        offsets: list[int] = []
        lengths: list[int] = []
        interrupted = False
        unpack = struct.Struct("=IHHI").unpack_from
        while True:
            chunk = self._socket.recv(_RECEIVE_BYTES)
            base, position, end = len(received), 0, len(chunk)
            received += chunk
            while position < end:
                size, kind, flags, sequence = unpack(chunk, position)
                if sequence == self._sequence:  # else the rest of a dump that was given up
                    interrupted |= bool(flags & _NLM_F_DUMP_INTR)
                    if kind <= _NLMSG_DONE:
                        _raise_error(chunk, position, kind)
                        if kind == _NLMSG_DONE:
                            return _entries(received, offsets, lengths), interrupted
                    else:
                        offsets.append(base + position)
                        lengths.append(size)
                position += (size + 3) & ~3


@dataclass(frozen=True)
class Shape:
    """Entries whose attributes lie at the same offsets.

    Attributes:
        rows: which entries (indices into those given to `shapes`).
        starts: byte offset of each in `buffer`, shape (n,).
        fields: where each attribute's payload lies within an entry, by path: offset and length.
    """

    buffer: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    fields: dict[Path, tuple[int, int]]

    def __contains__(self, path: Path) -> bool:
        return path in self.fields

    def octets(self, path: Path, width: int | None = None) -> npt.NDArray[np.uint8]:
        """The first `width` bytes of an attribute, by default all of it, shape (n, width)."""
        offset, length = self.fields[path]
        width = length if width is None else width
        if width > length:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        gathered: npt.NDArray[np.uint8] = self.buffer[(self.starts + offset)[:, None] + np.arange(width)]
        return gathered

    def number(self, path: Path, width: int) -> npt.NDArray[np.uint64]:
        """An attribute of `width` bytes in network order as numbers, shape (n,)."""
        return self.octets(path, width).view(f">u{width}")[:, 0].astype(np.uint64)


def shapes(entries: Entries, header_bytes: int, nests: frozenset[Path] = frozenset()) -> Iterator[Shape]:
    """Sort entries by shape.

    Args:
        entries: of one kind.
        header_bytes: what precedes the attributes of each.
        nests: attributes that hold others without the flag that says so (nf_tables' are all like that).
    """
    words = entries.buffer.view(np.uint32)  # everything in netlink is aligned to 4 bytes
    for length in np.unique(entries.lengths):
        rows = np.flatnonzero(entries.lengths == length)
        while len(rows):
            starts = entries.offsets[rows]
            sample = entries.buffer[starts[0] : starts[0] + length].tobytes()
            fields: dict[Path, tuple[int, int]] = {}
            headers = np.array(list(_walk(sample, header_bytes, length, (), fields, nests)), np.intp) // 4
            same = np.ones(len(rows), np.bool_)
            for header in headers.tolist():  # one by one: all at once would take as much memory as the dump itself
                found = words[starts // 4 + header]
                same &= found == found[0]
            yield Shape(entries.buffer, rows[same], starts[same], fields)
            rows = rows[~same]


def nested(entries: Entries, path: Path) -> Entries:
    """The attributes inside one attribute of each message, as entries: the elements of a list."""
    offsets = [np.zeros(0, np.intp)]
    lengths = [np.zeros(0, np.intp)]
    for shape in shapes(entries, MESSAGE_HEADER_BYTES):
        if path not in shape:
            continue
        start, size = shape.fields[path]
        for position in (shape.starts + start).tolist():
            found = _equal_attributes(entries.buffer, position, size) or _attributes(entries.buffer, position, size)
            offsets.append(found[0])
            lengths.append(found[1])
    return Entries(entries.buffer, np.concatenate(offsets), np.concatenate(lengths))


def _equal_attributes(
    buffer: npt.NDArray[np.uint8], start: int, size: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]] | None:
    """Offsets and lengths of attributes that are all of one length, the usual case; None if they are not."""
    length = int(buffer[start : start + 2].view(np.uint16)[0]) if size >= ATTRIBUTE_HEADER_BYTES else 0
    step = (length + 3) & ~3
    if length < ATTRIBUTE_HEADER_BYTES or size % step:
        return None
    each = buffer[start : start + size].view(np.uint16)[:: step // 2]
    if (each != length).any():
        return None
    return np.arange(start, start + size, step, dtype=np.intp), np.full(len(each), length, np.intp)


def _attributes(
    buffer: npt.NDArray[np.uint8], start: int, size: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    offsets: list[int] = []
    lengths: list[int] = []
    data = buffer[start : start + size].tobytes()
    position = 0
    while position + ATTRIBUTE_HEADER_BYTES <= size:
        (length,) = struct.unpack_from("=H", data, position)
        if length < ATTRIBUTE_HEADER_BYTES:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        offsets.append(start + position)
        lengths.append(length)
        position += (length + 3) & ~3
    return np.array(offsets, np.intp), np.array(lengths, np.intp)


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _walk(
    data: bytes, begin: int, end: int, path: Path, fields: dict[Path, tuple[int, int]], nests: frozenset[Path]
) -> Iterator[int]:
    """Offsets of all attribute headers; fills `fields`."""
    position = begin
    while position + 4 <= end:
        length, kind = struct.unpack_from("=HH", data, position)
        if not 4 <= length <= end - position:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        yield position
        here = (*path, kind & _TYPE_MASK)
        fields.setdefault(here, (position + 4, length - 4))
        if kind & _NESTED or here in nests:
            yield from _walk(data, position + 4, position + length, here, fields, nests)
        position += (length + 3) & ~3


def _raise_error(chunk: bytes, position: int, kind: int) -> None:
    """Raise what an NLMSG_ERROR or NLMSG_DONE says, if it says something."""
    size = struct.unpack_from("=I", chunk, position)[0]
    if kind in (_NLMSG_ERROR, _NLMSG_DONE) and size >= MESSAGE_HEADER_BYTES:
        (code,) = struct.unpack_from("=i", chunk, position + 16)
        if code < 0:
            raise OSError(-code, os.strerror(-code))


def _entries(received: bytearray, offsets: list[int], lengths: list[int]) -> Entries:
    return Entries(np.frombuffer(received, np.uint8), np.array(offsets, np.intp), np.array(lengths, np.intp))
