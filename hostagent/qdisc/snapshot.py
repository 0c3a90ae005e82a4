"""What somebody else had configured on a NIC: kept on disk, rehearsed before it is touched, put back on detach.

The kernel shows less than it was told for some kinds (red's table, a program behind a filter), so whether a tree can be
rebuilt is not guessed: it is rebuilt on a temporary interface, read back and compared, before anything changes.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fabricpilot.errors import FabricpilotError, KernelError, UsageError
from hostagent.qdisc.link import Link, add_scratch_link, remove_link
from hostagent.qdisc.objects import ROOT, TcObject, handle_text, is_u32_root_table, replayable
from hostagent.qdisc.plan import QueuePlan
from hostagent.qdisc.rtnetlink import create, read_objects, refused

_VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent leaves in its run directory about one NIC, for the next agent and for `detach`."""

    version: int
    boot_id: str
    ifindex: int
    plan: QueuePlan
    original: tuple[TcObject, ...]  # empty: the kernel's default was there
    changing: bool = False  # the queues are being built or put back; found so, whoever did that was killed


def record_path(run_dir: Path, link: Link) -> Path:
    """Where the record of an interface is: known by its index, as names change; the name is for people."""
    return next(_paths(run_dir, link.index), run_dir / f"qdisc-{link.name}-{link.index}.json")


def recorded(run_dir: Path) -> list[int]:
    """Indices of the interfaces there are records of."""
    return sorted({int(path.stem.rpartition("-")[2]) for path in _paths(run_dir)})


def _paths(run_dir: Path, index: int | None = None) -> Iterator[Path]:
    wanted = "" if index is None else str(index)
    for path in run_dir.glob(f"qdisc-*-{wanted or '*'}.json"):
        if path.stem.rpartition("-")[2].isdecimal():
            yield path


def save_record(
    run_dir: Path, link: Link, plan: QueuePlan, original: tuple[TcObject, ...], *, changing: bool = False
) -> None:
    """Write the record, whole or not at all, and onto the disk before anything changes.

    Raises:
        FabricpilotError: the run directory cannot be written.
    """
    record = Record(_VERSION, _BOOT_ID.read_text().strip(), link.index, plan, original, changing)
    path = record_path(run_dir, link)
    draft = path.with_suffix(".new")
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise FabricpilotError(f"cannot write {path}: {error.strerror}; check host.run_dir") from error


def load_record(run_dir: Path, link: Link) -> Record | None:
    """The record of this very interface since this boot, or None.

    Raises:
        FabricpilotError: there is one and it cannot be read.
    """
    path = record_path(run_dir, link)
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except (FileNotFoundError, NotADirectoryError):  # the latter is told when something has to be written
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise FabricpilotError(
            f"cannot read {path}: {error}; it says what was on {link.name}: put that right by hand, then remove it"
        ) from error
    # An interface made anew under the same name, or a reboot: what the record speaks of is gone.
    if record.ifindex != link.index or record.boot_id != _BOOT_ID.read_text().strip():
        return None
    return record


def drop_record(run_dir: Path, index: int) -> None:
    """Forget the record of the interface with that index, if there is one, and a draft of it."""
    for path in list(_paths(run_dir, index)):
        path.unlink(missing_ok=True)
    for path in list(run_dir.glob(f"qdisc-*-{index}.new")):
        path.unlink(missing_ok=True)


def rehearse(ipr: IPRoute, link: Link, original: tuple[TcObject, ...]) -> None:
    """Make sure that `original` can be rebuilt exactly, on a temporary interface with as many transmit queues.

    Raises:
        UsageError: it cannot; nothing was changed.
        KernelError: there is nothing to try it on.
    """
    try:
        scratch = add_scratch_link(ipr, link.transmit_queues)
    except NetlinkError as error:
        raise refused(error, "making a temporary interface") from error
    if scratch is None:
        raise KernelError(
            "cannot make a temporary interface; the kernel needs one of CONFIG_DUMMY, CONFIG_VETH, CONFIG_IFB"
        )
    try:
        replay(ipr, scratch.index, original)
        missing = differences(original, read_objects(ipr, scratch.index))
        if missing:
            raise UsageError(_cannot(link.name, f"{missing[0]} would not come back as it is"))
    except NetlinkError as error:
        raise UsageError(_cannot(link.name, str(refused(error, "rebuilding it on a temporary interface")))) from error
    finally:
        remove_link(ipr, scratch)


def replay(ipr: IPRoute, ifindex: int, original: tuple[TcObject, ...]) -> None:
    """Build `original` on an interface, its root in place of what is there.

    Raises:
        NetlinkError: the kernel refused an object.
    """
    for obj in (*parents_first(original), *_filters_in_order(original)):
        create(ipr, ifindex, replayable(obj))


def parents_first(original: tuple[TcObject, ...]) -> list[TcObject]:
    """Qdiscs and classes in an order in which each finds its parent.

    HTB takes a class whose parent is not there yet for one at the top, without a word. A parent that is nobody's handle
    is a class that came with its qdisc (a band of prio): the qdisc is what to wait for.
    """
    waiting = [o for o in original if o.noun != "filter"]
    handles = {o.handle for o in waiting}
    placed = {ROOT}
    order: list[TcObject] = []
    while waiting:
        ready = [o for o in waiting if (o.parent if o.parent in handles else _qdisc_of(o.parent)) in placed]
        if not ready:  # hangs on something that is not shown: the kernel has the last word
            return order + waiting
        order += ready
        placed |= {o.handle for o in ready}
        waiting = [o for o in waiting if o not in ready]
    return order


def differences(wanted: tuple[TcObject, ...], found: tuple[TcObject, ...]) -> list[str]:
    """Objects that are in one of the two and not in the other, by name."""
    return sorted(
        f"{obj.noun} {obj.kind} {handle_text(obj.handle)}"
        for obj in {replayable(o) for o in wanted} ^ {replayable(o) for o in found}
    )


def _qdisc_of(handle: int) -> int:
    return handle if handle == ROOT else handle & 0xFFFF_0000


def _filters_in_order(original: tuple[TcObject, ...]) -> list[TcObject]:
    """Filters so that u32's numbered hash tables come out with the numbers they had; the kernel makes the root ones."""
    filters = [o for o in original if o.noun == "filter"]
    root_table = {(o.parent, o.info): o.handle for o in filters if is_u32_root_table(o)}
    ordered = sorted(filters, key=lambda o: root_table.get((o.parent, o.info), 0))
    return [o for o in ordered if not is_u32_root_table(o)]


def _cannot(interface: str, reason: str) -> str:
    return (
        f"the qdisc on {interface} cannot be put back exactly later ({reason}), so it stays; "
        f'remove it yourself (tc qdisc del dev {interface} root) or set queues.kind = "none"'
    )


def root_kind(objects: tuple[TcObject, ...]) -> str:
    """What stands at the root, for people."""
    return next(
        (f"{o.kind} {handle_text(o.handle)}" for o in objects if o.noun == "qdisc" and o.parent == ROOT), "none"
    )
