"""What is pinned: the files of one data path in a bpffs, who they belong to, and how they come and go.

    PIN_DIR/egress                                the program
    PIN_DIR/flows, slots, active, counters ...    its maps (ebpf/)
    PIN_DIR/became_long                           ring of flows that became long, this set's own
    PIN_DIR/egress_<interface index>              the link that has the program on an interface (tcx_link.py)
    PIN_DIR/interfaces                            interface index -> whether we gave it its clsact
    PIN_DIR/layouts                               map name -> fingerprint of what the map holds
    PIN_DIR/identity                              fingerprint, network namespace, counters of user space

A new set is made complete in PIN_DIR-new and then renamed. `identity` is the last to come and the first to go, so a
folder that has it holds a whole data path. The last three maps are user space's own; `interfaces` is handed on from one
set to the next, and so is every map of the program whose layout stays (`kept_maps`).
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import KernelError, UsageError
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.pinned_names import LONG_FLOW_RING, MAPS, PROGRAM_PIN, RUN_BY_US

log = logging.getLogger(__name__)

IDENTITY_DTYPE: Final = np.dtype(
    [
        ("fingerprint", "u1", 32),  # of sources and layouts: equal means this version can read the maps
        ("network_namespace", "<u8"),  # inode; interface indices mean nothing in another one
        ("flows_forgotten", "<u8"),
        ("fresh_starts", "<u8"),  # how often the flow table of another version could not be kept
        # Only ever append here: a shorter record of an earlier version reads as zeros.
        ("upgrades", "<u8"),  # how often another version took over in place
        ("unused", "<u8"),
        ("sees_backlog", "<u8"),  # 1: the program knows where this kernel keeps what a socket has to send
    ]
)
_LAYOUT_DTYPE: Final = np.dtype([("fingerprint", "u1", 32)])
_NAME_DTYPE: Final = np.dtype([("name", "S16")])
MAX_INTERFACES: Final = 8192
_MAX_MAPS: Final = 64

# Maps that mean something only together: each is kept only if all of its companions are. Flows remember which rules
# and verdicts were applied to them by generation, and `steering` counts the generations.
_STEERING: Final = ("steering", "prefixes", "rule_sets", "verdicts")
_COMPANIONS: Final = {
    "flows": (*_STEERING, "flow_tags", "flow_hash"),
    "flow_tags": ("flows",),
    "flow_hash": ("flows",),
    "counters": ("flows",),
    "slots": ("active",),
    "active": ("slots",),
    **dict.fromkeys(_STEERING, _STEERING),
}
_OPENED: Final = (*MAPS, *RUN_BY_US, LONG_FLOW_RING, "layouts")  # those of another version may lack some
_ZERO: Final = np.zeros(1, np.uint32)


@dataclass
class Pins:
    """Open file descriptors of one pinned data path."""

    directory: Path
    program: int
    maps: dict[str, int]  # and the programs that we run; of another version: those that this one knows by name
    layouts: dict[str, bytes]

    @classmethod
    def open(cls, directory: Path) -> "Pins | None":
        """What is pinned in `directory`, of whichever version; None if there is no whole data path.

        Raises:
            KernelError: it may not be opened.
        """
        with ExitStack() as undo:

            def opened(name: str) -> int:
                fd = bpf.obj_get(directory / name)
                undo.callback(os.close, fd)
                return fd

            try:
                needed = (opened("identity"), opened("interfaces"), opened(PROGRAM_PIN))
                maps = {"identity": needed[0], "interfaces": needed[1]}
                maps |= {name: opened(name) for name in _OPENED if (directory / name).exists()}
                pins = cls(directory, needed[2], maps, _read_layouts(maps.get("layouts")))
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
        there_bytes = bpf.map_sizes(self.maps["identity"])[1]
        raw = np.zeros(max(there_bytes, IDENTITY_DTYPE.itemsize), np.uint8)
        bpf.lookup(self.maps["identity"], _ZERO, raw)
        return raw[: IDENTITY_DTYPE.itemsize].view(IDENTITY_DTYPE)

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
        """Remember an interface, before anything is changed on it.

        Raises:
            KernelError: there are too many.
        """
        try:
            bpf.update(self.maps["interfaces"], np.array([index], np.uint32), np.array([clsact_is_ours], np.uint32))
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            most = bpf.map_sizes(self.maps["interfaces"])[2]
            raise KernelError(f"{most} interfaces are scheduled already; that is the most one agent can") from error

    def drop_interface(self, index: int) -> None:
        """Forget an interface."""
        bpf.delete(self.maps["interfaces"], np.array([index], np.uint32))


def _read_layouts(fd: int | None) -> dict[str, bytes]:
    if fd is None:
        return {}
    names, layouts = bpf.lookup_all(fd, _NAME_DTYPE, _LAYOUT_DTYPE, _MAX_MAPS)
    return {name.decode(): layout.tobytes() for name, layout in zip(names["name"], layouts["fingerprint"], strict=True)}


def kept_maps(agreeing: Collection[str]) -> set[str]:
    """Those of the maps whose layouts agree that may be kept: whatever one of them needs is kept with it."""
    kept = set(agreeing)
    while lonely := {name for name in kept if not kept.issuperset(_COMPANIONS.get(name, ()))}:
        kept -= lonely
    return kept


def complete(
    directory: Path,
    fingerprint: bytes,
    layouts: Mapping[str, bytes],
    before: Pins | None,
    kept: Collection[str],
    sees_backlog: bool,
) -> None:
    """Add user space's own maps to what the loader has pinned, `identity` last.

    Args:
        directory: the new set.
        fingerprint: of this version.
        layouts: what its maps hold.
        before: the data path that is replaced.
        kept: names of the maps that were taken over from it.
        sees_backlog: the program can see what sockets have left to send.
    """
    identity = np.zeros(1, IDENTITY_DTYPE)
    if before is None:
        _create_pinned(directory, "interfaces", bpf.MAP_TYPE_HASH, 4, 4, MAX_INTERFACES)
    else:
        bpf.obj_pin(before.maps["interfaces"], directory / "interfaces")
        identity = _successor(before, kept)
    identity["sees_backlog"] = sees_backlog
    identity["fingerprint"] = np.frombuffer(fingerprint, np.uint8)
    identity["network_namespace"] = current_network_namespace()
    names = np.array([name.encode() for name in layouts], _NAME_DTYPE["name"]).view(_NAME_DTYPE)
    held = np.frombuffer(b"".join(layouts.values()), _LAYOUT_DTYPE)
    _create_pinned(directory, "layouts", bpf.MAP_TYPE_HASH, 16, 32, _MAX_MAPS, names, held)
    zero = np.zeros(1, np.dtype([("index", "<u4")]))
    _create_pinned(directory, "identity", bpf.MAP_TYPE_ARRAY, 4, IDENTITY_DTYPE.itemsize, 1, zero, identity)


def _successor(before: Pins, kept: Collection[str]) -> npt.NDArray[np.void]:
    """What of the replaced data path's identity goes on in the one that takes its place."""
    identity = before.identity()
    identity["upgrades"] += 1
    if "flows" not in kept:
        identity["fresh_starts"] += 1
    if "counters" not in kept:
        identity["flows_forgotten"] = 0
    return identity


def _create_pinned(
    directory: Path,
    name: str,
    kind: int,
    key_size: int,
    value_size: int,
    entries: int,
    keys: npt.NDArray[np.void] | None = None,
    values: npt.NDArray[np.void] | None = None,
) -> None:
    fd = bpf.map_create(kind, key_size, value_size, entries, name)
    try:
        if keys is not None and values is not None:
            for row in range(len(keys)):
                bpf.update(fd, keys[row : row + 1], values[row : row + 1])
        bpf.obj_pin(fd, directory / name)
    finally:
        os.close(fd)


def new_directory(directory: Path) -> Path:
    """Where the next set is made: beside the one in use."""
    return directory.with_name(directory.name + "-new")  # a bpffs takes no dots in names


def remove_directory(directory: Path) -> None:
    """Unpin everything in `directory`, if it is there; it stops being a whole data path at once."""
    if directory.is_dir():
        (directory / "identity").unlink(missing_ok=True)
        shutil.rmtree(directory)


def finish_interrupted_swap(directory: Path) -> None:
    """After an agent that was killed while it replaced a data path: keep the new one if it was ready, else drop it."""
    new = new_directory(directory)
    if not new.is_dir():
        return
    if not _is_whole(new) or _is_whole(directory):
        remove_directory(new)  # the old one is whole, if there is one: the swap starts again from there
        return
    remove_directory(directory)
    new.rename(directory)


def _is_whole(directory: Path) -> bool:
    pins = Pins.open(directory)
    if pins is not None:
        pins.close()
    return pins is not None


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
