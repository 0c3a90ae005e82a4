"""Where things are in this kernel's structs: member offsets from BTF, without a library.

The running kernel describes its types in /sys/kernel/btf/vmlinux (Documentation/bpf/btf.rst): a header, a list of
types of varying length, and a pool of names. Only the loader child reads it; five to ten megabytes are walked once,
in about a tenth of a second.

    Btf.of_kernel().offset("tcp_sock", "write_seq")
    Btf.of_kernel().offset("tcp_sock", "inet_conn.icsk_inet.sk.sk_socket")
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

KERNEL_BTF: Final = Path("/sys/kernel/btf/vmlinux")

_MAGIC: Final = 0xEB9F
_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _FUNC_PROTO, _VAR, _DATASEC, _DECL_TAG, _ENUM64 = (
    1,
    3,
    4,
    5,
    6,
    13,
    14,
    15,
    17,
    19,
)
# What follows the 12 bytes that all types have: a fixed part, and a part per item (`vlen` of them).
_FIXED_BYTES: Final = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}
_ITEM_BYTES: Final = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
_QUALIFIERS: Final = (8, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag: they name another type


class Btf:
    """One BTF blob.

    Args:
        blob: as in /sys/kernel/btf/vmlinux.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, blob: bytes) -> None:
        if len(blob) < 24 or struct.unpack_from("=H", blob)[0] != _MAGIC:
            raise ValueError("not BTF of this machine's byte order")
        header_bytes, types_at, types_bytes, names_at, names_bytes = struct.unpack_from("=IIIII", blob, 4)
        self._types = blob[header_bytes + types_at : header_bytes + types_at + types_bytes]
        self._names = blob[header_bytes + names_at : header_bytes + names_at + names_bytes]
        self._places = [0, *self._walk()]  # of each type, by its id; id 0 is void

    @classmethod
    def of_kernel(cls) -> "Btf":
        """The running kernel's.

        Raises:
            OSError: it has none (CONFIG_DEBUG_INFO_BTF).
            ValueError: it is not understood.
        """
        return cls(KERNEL_BTF.read_bytes())

    def offset(self, name: str, path: str) -> int:
        """Offset in bytes of a member of struct `name`; `path` may lead through structs inside it, with dots.

        Raises:
            KeyError: no such struct or member; says which.
        """
        place = self._struct(name)
        bits = 0
        for part in path.split("."):
            found = self._member(place, part)
            if found is None:
                raise KeyError(f"struct {name} has no member {path}")
            bits += found[0]
            place = self._places[self._unqualified(found[1])]
        return bits // 8

    def _walk(self) -> Iterator[int]:
        at = 0
        while at < len(self._types):
            yield at
            info = struct.unpack_from("=I", self._types, at + 4)[0]
            kind, items = info >> 24 & 0x1F, info & 0xFFFF
            at += 12 + _FIXED_BYTES.get(kind, 0) + items * _ITEM_BYTES.get(kind, 0)

    def _struct(self, name: str) -> int:
        wanted = self._names.find(b"\0" + name.encode() + b"\0") + 1
        if wanted > 0:
            for place in self._places[1:]:
                name_at, info = struct.unpack_from("=II", self._types, place)
                if name_at == wanted and info >> 24 & 0x1F == _STRUCT:
                    return place
        raise KeyError(f"there is no struct {name}")

    def _member(self, place: int, wanted: str) -> tuple[int, int] | None:
        """Offset in bits and type id of a member, also of one inside an anonymous struct or union."""
        info = struct.unpack_from("=I", self._types, place + 4)[0]
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return None
        for item in range(info & 0xFFFF):
            name_at, type_id, bits = struct.unpack_from("=III", self._types, place + 12 + 12 * item)
            if info >> 31:  # a struct with bit fields keeps their width in the upper byte
                bits &= 0xFFFFFF
            if name_at == 0:
                inside = self._member(self._places[self._unqualified(type_id)], wanted)
                if inside is not None:
                    return bits + inside[0], inside[1]
            elif self._name(name_at) == wanted:
                return bits, type_id
        return None

    def _unqualified(self, type_id: int) -> int:
        while True:
            info, other = struct.unpack_from("=II", self._types, self._places[type_id] + 4)
            if info >> 24 & 0x1F not in _QUALIFIERS:
                return type_id
            type_id = other

    def _name(self, at: int) -> str:
        return self._names[at : self._names.index(b"\0", at)].decode()


# What ebpf/socket.h wants to know, as macro -> (struct, member).
_MACROS: Final = {
    "WRITE_SEQ_OFFSET": ("tcp_sock", "write_seq"),
    "SND_UNA_OFFSET": ("tcp_sock", "snd_una"),
    "SND_NXT_OFFSET": ("tcp_sock", "snd_nxt"),
    "SRTT_OFFSET": ("tcp_sock", "srtt_us"),
}


def backlog_macros() -> dict[str, int]:
    """The offsets that let the egress program see the backlog, by macro name.

    Raises:
        OSError: this kernel has no BTF.
        ValueError, KeyError: it has, but what is wanted is not found in it.
    """
    btf = Btf.of_kernel()
    return {macro: btf.offset(*member) for macro, member in _MACROS.items()}
