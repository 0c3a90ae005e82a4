"""Register `bpf_dctcp` (DCTCP, RFC 8257, as struct_ops) with the kernel while somebody needs it.

A registration is for the whole machine and outlives the process that made it, so its users share it: each holds a
shared lock on one file, and the last to leave unregisters. A killed user's lock is released by the kernel; whoever
leaves last after it cleans up for it. A registration made to stay (`keep`) is left alone. Sockets that use
the algorithm keep it until they close, also after it was unregistered.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fabricpilot.errors import FabricpilotError
from testbed.transport.bpftool import bpftool
from testbed.transport.build import compile_program

DCTCP = "bpf_dctcp"
LOCK = Path("/run/fabricpilot-dctcp.lock")  # holds _KEPT or nothing

_SOURCE = "dctcp.bpf.c"
_KEPT = b"kept"
_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def is_registered(name: str = DCTCP) -> bool:
    """Whether the kernel offers a congestion control of that name."""
    return name in _AVAILABLE.read_text().split()


@contextmanager
def dctcp_registered() -> Iterator[str]:
    """Have `bpf_dctcp` registered inside the block; yields its name for TCP_CONGESTION.

    Raises:
        KernelError: the kernel refused it, or tools are missing.
    """
    with _lock_file() as lock:
        _share(lock)
        try:
            yield DCTCP
        finally:
            _leave(lock)


def keep() -> None:
    """Register `bpf_dctcp` until `forget`, whatever `dctcp_registered` blocks come and go."""
    with _lock_file() as lock:
        _share(lock)
        os.pwrite(lock, _KEPT, 0)


def forget() -> bool:
    """Unregister `bpf_dctcp`, or leave that to the blocks that use it now; returns whether it is gone."""
    with _lock_file() as lock:
        os.ftruncate(lock, 0)
        return _leave(lock)


def register(name: str = DCTCP, defines: tuple[str, ...] = ()) -> None:
    """Compile and register once, without regard to others."""
    with tempfile.TemporaryDirectory(prefix="fabricpilot-") as directory:
        bpftool("struct_ops", "register", str(compile_program(_SOURCE, Path(directory), defines)))
    if not is_registered(name):
        raise FabricpilotError(f"bpftool registered {_SOURCE}, but the kernel does not offer '{name}'")


def unregister(name: str = DCTCP) -> None:
    """Unregister once, without regard to others.

    By id: earlier registrations stay listed under the same name until their last socket has closed.
    """
    listed = bpftool("struct_ops", "list") or []
    bpftool("struct_ops", "unregister", "id", str(max(found["id"] for found in listed if found["name"] == name)))


@contextmanager
def _lock_file() -> Iterator[int]:
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield lock
    finally:
        os.close(lock)


def _share(lock: int) -> None:
    """Return holding the shared lock, with the algorithm registered."""
    while True:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if is_registered():
            return
        # Changing a lock's kind releases it for a moment: look again under the other kind, and once more after it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_registered():
            os.ftruncate(lock, 0)
            register()


def _leave(lock: int) -> bool:
    """Unregister if nobody else holds the lock and it was not made to stay; returns whether it is gone."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if is_registered() and os.pread(lock, len(_KEPT), 0) != _KEPT:
        unregister()
    return not is_registered()
