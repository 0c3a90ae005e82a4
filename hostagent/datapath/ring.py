"""Reads a BPF ring buffer, in which programs leave records for user space, without a library.

The kernel maps it as three parts: a page with the position up to which we have read, a page with the position up to
which there are records, and the data twice in a row, so that no record is split (Documentation/bpf/ringbuf.rst). Each
record has a header of 8 bytes: its length and two bits, then padding to 8 bytes. Reading is polling a file descriptor
and copying memory; there is no system call per record.
"""

import mmap
from typing import Final

import numpy as np
import numpy.typing as npt

from hostagent.datapath import bpf_syscall as bpf

_HEADER_BYTES: Final = 8
_BUSY: Final = 1 << 31  # reserved by a program that has not finished it
_DISCARDED: Final = 1 << 30


class Ring:
    """The reader's end of one ring buffer; there must be only one reader.

    Args:
        fd: of the map; stays its owner's.
        dtype: of its records.
    """

    def __init__(self, fd: int, dtype: np.dtype[np.void]) -> None:
        self.fd = fd  # readable while there are records
        self._dtype = dtype
        self._size = bpf.map_sizes(fd)[2]
        page = mmap.PAGESIZE
        self._ours = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._theirs = mmap.mmap(fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumed = np.frombuffer(self._ours, np.uint64, 1)
        self._produced = np.frombuffer(self._theirs, np.uint64, 1)
        self._data = np.frombuffer(self._theirs, np.uint8, offset=page)

    def read(self, most: int) -> npt.NDArray[np.void]:
        """At most `most` records, oldest first, shape (n,); they leave the ring."""
        records = np.zeros(most, self._dtype)
        position, found = int(self._consumed[0]), 0
        while found < most and position < int(self._produced[0]):
            at = position & (self._size - 1)
            header = int(self._data[at : at + 4].view(np.uint32)[0])
            if header & _BUSY:
                break
            length = header & ~(_BUSY | _DISCARDED)
            if not header & _DISCARDED:
                begin = at + _HEADER_BYTES
                records[found : found + 1] = self._data[begin : begin + self._dtype.itemsize].view(self._dtype)
                found += 1
            position += _HEADER_BYTES + -(-length // 8) * 8
            self._consumed[0] = position
        return records[:found]

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        # A mapping cannot be closed while an array looks into it.
        self._consumed = self._produced = np.zeros(1, np.uint64)
        self._data = np.zeros(0, np.uint8)
        self._ours.close()
        self._theirs.close()
