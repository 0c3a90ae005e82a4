"""What is pinned: the files of one data path in a bpffs, who they belong to, and how they come and go.

    PIN_DIR/egress                                the program
    PIN_DIR/flows, slots, active, counters        its maps (ebpf/)
    PIN_DIR/interfaces                            interface index -> whether we gave it its clsact
    PIN_DIR/identity                              fingerprint, network namespace, counters of user space

A new set is made complete in PIN_DIR-new and then renamed, so PIN_DIR either holds a whole data path or none. The
last two maps are user space's own; `interfaces` is handed on from one set to the next.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import KernelError, UsageError
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.ebpf_loader import MAPS, PROGRAM_PIN

log = logging.getLogger(__name__)

IDENTITY_DTYPE: Final = np.dtype(
    [
        ("fingerprint", "u1", 32),  # of sources and layouts: equal means this version can read the maps
        ("network_namespace", "<u8"),  # inode; interface indices mean nothing in another one
        ("flows_forgotten", "<u8"),
        ("fresh_starts", "<u8"),  # how often a data path of another version was replaced here
    ]
)
_MAX_INTERFACES: Final = 1024
_ZERO: Final = np.zeros(1, np.uint32)


@dataclass
class Pins:
    """Open file descriptors of one pinned data path."""

    directory: Path
    program: int
    maps: dict[str, int]

    @classmethod
    def open(cls, directory: Path) -> "Pins | None":
        """What is pinned in `directory`; None if there is no whole data path.

        Raises:
            KernelError: it may not be opened.
        """
        with ExitStack() as undo:

            def opened(name: str) -> int:
                fd = bpf.obj_get(directory / name)
                undo.callback(os.close, fd)
                return fd

            try:
                pins = cls(directory, opened(PROGRAM_PIN), {n: opened(n) for n in (*MAPS, "interfaces", "identity")})
                if bpf.map_sizes(pins.maps["identity"])[1] != IDENTITY_DTYPE.itemsize:
                    raise KernelError(f"{directory} holds a data path of an unknown version; remove it by hand")
            except FileNotFoundError:
                return None
            except OSError as error:
                raise KernelError(f"cannot open the data path pinned in {directory}: {error.strerror}") from error
            undo.pop_all()
            return pins

    def close(self) -> None:
        """Close all file descriptors."""
        for fd in (self.program, *self.maps.values()):
            os.close(fd)

    def identity(self) -> npt.NDArray[np.void]:
        """The IDENTITY_DTYPE record, shape (1,)."""
        record = np.zeros(1, IDENTITY_DTYPE)
        bpf.lookup(self.maps["identity"], _ZERO, record)
        return record

    def change_identity(self, change: Callable[[npt.NDArray[np.void]], None]) -> None:
        """Change fields of the identity; there is one agent per data path, so nobody else writes."""
        record = self.identity()
        change(record)
        bpf.update(self.maps["identity"], _ZERO, record)

    def interfaces(self) -> dict[int, bool]:
        """Indices of the interfaces this data path was attached to, and whether their clsact is ours."""
        dtype = np.dtype([("word", "<u4")])
        keys, values = bpf.lookup_all(self.maps["interfaces"], dtype, dtype, 64)
        return {int(k): bool(v) for k, v in zip(keys["word"], values["word"], strict=True)}

    def note_interface(self, index: int, clsact_is_ours: bool) -> None:
        """Remember an interface, before anything is changed on it."""
        bpf.update(self.maps["interfaces"], np.array([index], np.uint32), np.array([clsact_is_ours], np.uint32))

    def drop_interface(self, index: int) -> None:
        """Forget an interface."""
        bpf.delete(self.maps["interfaces"], np.array([index], np.uint32))


def complete(directory: Path, fingerprint: bytes, before: Pins | None) -> None:
    """Add user space's own maps to what the loader has pinned; `before` is the data path that is replaced."""
    identity = np.zeros(1, IDENTITY_DTYPE)
    identity["fingerprint"] = np.frombuffer(fingerprint, np.uint8)
    identity["network_namespace"] = current_network_namespace()
    if before is not None:
        identity["fresh_starts"] = before.identity()["fresh_starts"] + 1
        bpf.obj_pin(before.maps["interfaces"], directory / "interfaces")
    else:
        _create_pinned(directory, "interfaces", bpf.MAP_TYPE_HASH, 4, _MAX_INTERFACES, None)
    _create_pinned(directory, "identity", bpf.MAP_TYPE_ARRAY, IDENTITY_DTYPE.itemsize, 1, identity)


def _create_pinned(
    directory: Path, name: str, kind: int, value_size: int, entries: int, first: npt.NDArray[np.void] | None
) -> None:
    fd = bpf.map_create(kind, 4, value_size, entries, name)
    try:
        if first is not None:
            bpf.update(fd, _ZERO, first)
        bpf.obj_pin(fd, directory / name)
    finally:
        os.close(fd)


def new_directory(directory: Path) -> Path:
    """Where the next set is made: beside the one in use."""
    return directory.with_name(directory.name + "-new")  # a bpffs takes no dots in names


def remove_directory(directory: Path) -> None:
    """Unpin everything in `directory`, if it is there."""
    if directory.is_dir():
        shutil.rmtree(directory)


def finish_interrupted_swap(directory: Path) -> None:
    """After an agent that was killed while it replaced a data path: keep the new one if it was ready, else drop it."""
    new = new_directory(directory)
    if not new.is_dir():
        return
    ready = Pins.open(new)
    if ready is None:
        remove_directory(new)
        return
    ready.close()
    if directory.exists():
        remove_directory(new)  # the old one is whole: the swap starts again from there
    else:
        new.rename(directory)


def current_network_namespace() -> int:
    """Inode of the network namespace this thread is in."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


def check_namespace(pins: Pins) -> bool:
    """Whether the pinned data path belongs here; False if its network namespace no longer exists.

    Raises:
        UsageError: it belongs to another network namespace that is alive.
    """
    theirs = int(pins.identity()["network_namespace"][0])
    if theirs == current_network_namespace():
        return True
    if _namespace_is_alive(theirs):
        raise UsageError(
            f"the data path in {pins.directory} belongs to another network namespace; give each namespace a "
            "datapath.pin_dir of its own"
        )
    return False


def _namespace_is_alive(inode: int) -> bool:
    named = Path("/run/netns")
    candidates = [*Path("/proc").glob("[0-9]*/ns/net"), *(named.iterdir() if named.is_dir() else ())]
    for candidate in candidates:
        try:
            if candidate.stat().st_ino == inode:
                return True
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EACCES):
                raise
    return False
