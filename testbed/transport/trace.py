"""Watch DCTCP work: the traced build (`bpf_dctcp_trace`), which writes down every ACK and every reduction.

It stands beside `bpf_dctcp` and never replaces it. The log holds the first 65,536 records of the block.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from testbed.transport.bpftool import bpftool, open_map
from testbed.transport.dctcp import is_registered, register, unregister

TRACED_DCTCP = "bpf_dctcp_trace"

# struct dctcp_record and its kinds, ebpf/transport/dctcp_trace.h
RECORD = np.dtype(
    [
        ("time_ns", "u8"),
        ("snd_una", "u4"),
        ("snd_nxt", "u4"),
        ("alpha", "u4"),  # unit 1 / ALPHA_ONE
        ("cwnd_pkts", "u4"),
        ("ssthresh_pkts", "u4"),
        ("fraction", "u4"),
        ("local_port", "u2"),
        ("remote_port", "u2"),
        ("kind", "u1"),
        ("ece", "u1"),
        ("window_ended", "u1"),
        ("reducing", "u1"),
    ],
    align=True,
)
ACK, REDUCTION, INIT = range(3)
ALPHA_ONE = 1 << 20
CAPACITY = 65_536


@dataclass(frozen=True)
class DctcpTrace:
    """The log, mapped from the kernel."""

    _records: mmap.mmap
    _count: mmap.mmap

    @property
    def written(self) -> int:
        """Records asked for so far; those beyond `CAPACITY` are lost."""
        return int.from_bytes(self._count[:8], "little")

    def records(self) -> npt.NDArray[np.void]:
        """A copy of the log so far, dtype `RECORD`, shape (n,), in the order it was written."""
        return np.frombuffer(self._records, RECORD, min(self.written, CAPACITY)).copy()


@contextmanager
def dctcp_traced() -> Iterator[DctcpTrace]:
    """Have `bpf_dctcp_trace` registered inside the block and read what its sockets do.

    Raises:
        KernelError: the kernel refused it, or tools are missing.
    """
    if is_registered(TRACED_DCTCP):
        unregister(TRACED_DCTCP)  # of a run that was killed
    register(TRACED_DCTCP, ("DCTCP_TRACE",))
    try:
        with _mapped("dctcp_records", RECORD.itemsize * CAPACITY) as records, _mapped("dctcp_count", 8) as count:
            yield DctcpTrace(records, count)
    finally:
        unregister(TRACED_DCTCP)


@contextmanager
def _mapped(name: str, size_bytes: int) -> Iterator[mmap.mmap]:
    """The newest map of that name, mapped read-only."""
    shown = bpftool("map", "show", "name", name)
    newest = max(found["id"] for found in (shown if isinstance(shown, list) else [shown]))
    fd = open_map(newest)
    try:
        memory = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    with memory:
        yield memory
