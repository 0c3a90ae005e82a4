"""Put a plan on a NIC, recognise it again, take it away. Every step says beforehand what it would do.

The NIC's root qdisc is one of three: the kernel's own choice (it has no handle), ours (`fab:`), or somebody else's.
Ours is adopted if it is what the plan wants, else changed or rebuilt. Somebody else's is put aside only when that is
allowed and after its return was rehearsed. What was there is on disk before anything changes, and says that a change
is under way until it is over: an agent killed at any point leaves enough for the next one to finish.
"""

from collections.abc import Collection
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fabricpilot.config import QueuesSection, parse_rate
from fabricpilot.errors import KernelError, UsageError
from hostagent.qdisc.link import Link, find_link, link_rate_bps
from hostagent.qdisc.objects import TcObject, same_tree, signature
from hostagent.qdisc.plan import QueuePlan, choose_kind, make_plan
from hostagent.qdisc.rtnetlink import change, create, delete_root, is_default, is_ours, read_objects, refused, root_of
from hostagent.qdisc.snapshot import (
    Record,
    differences,
    drop_record,
    load_record,
    record_path,
    recorded,
    rehearse,
    replay,
    root_kind,
    save_record,
)
from hostagent.qdisc.support import supported_kinds


def plan_queues(
    interface: str, section: QueuesSection, levels: int, ipr: IPRoute, supported: frozenset[str] | None = None
) -> QueuePlan:
    """The queues `section` asks for on `interface`, given what this kernel and this NIC have. Changes nothing.

    Args:
        interface: name of a NIC in the namespace of `ipr`.
        section: `[queues]` of the configuration.
        levels: K.
        ipr: one long-lived rtnetlink socket.
        supported: what `supported_kinds` found; None looks (25 ms).

    Raises:
        UsageError: no such interface; HTB without a link rate; a foreign qdisc that may not be replaced.
        KernelError: the kernel lacks the wanted kind, or it is not permitted to look.
    """
    link = find_link(ipr, interface)
    rate_bps, source = None, "configured"
    if section.link_rate:
        rate_bps = parse_rate(section.link_rate)
    if section.kind == "none":
        return make_plan("none", frozenset(), levels)
    _refuse_foreign(link, read_objects(ipr, link.index), section.replace_foreign)
    supported = supported_kinds(ipr) if supported is None else supported
    if rate_bps is None and choose_kind(section.kind, supported) == "htb":
        rate_bps, source = link_rate_bps(link), f"what {interface} reports"
    return make_plan(
        section.kind,
        supported,
        levels,
        rate_bps=rate_bps,
        rate_source=source,
        replace_foreign=section.replace_foreign,
    )


def install(plan: QueuePlan, interface: str, ipr: IPRoute, run_dir: Path) -> None:
    """Make the NIC's queues what `plan` says. Idempotent; adopts what an agent before this one built.

    Raises:
        UsageError: no such interface; a foreign qdisc that may not be replaced or could not be put back.
        KernelError: the kernel refused; what was there is back.
        FabricpilotError: `run_dir` cannot be written; nothing was changed.
    """
    if plan.kind == "none":
        restore(interface, ipr, run_dir)
        return
    link = find_link(ipr, interface)
    found = read_objects(ipr, link.index)
    _refuse_foreign(link, found, plan.replace_foreign)
    record = load_record(run_dir, link)
    ours = is_ours(root_of(found))
    original: tuple[TcObject, ...] = ()
    if record is not None and (ours or _left_halfway(record, found)):
        original = record.original
    elif not ours and not is_default(root_of(found)):
        original = found
        rehearse(ipr, link, original)
    if ours and same_tree(found, plan.objects):
        save_record(run_dir, link, plan, original)
        return
    save_record(run_dir, link, plan, original, changing=True)
    try:
        if ours and _differ_in_classes_only(found, plan.objects):
            for obj in plan.objects:
                if obj.noun == "class":
                    change(ipr, link.index, obj)
        else:
            if ours:
                delete_root(ipr, link.index)
            for obj in plan.objects:
                create(ipr, link.index, obj)
        save_record(run_dir, link, plan, original)
    except NetlinkError as error:
        _put_back(ipr, link, original, run_dir)
        raise refused(error, f"building {plan.kind} queues on {interface}") from error


def restore(interface: str, ipr: IPRoute, run_dir: Path) -> bool:
    """Put back what was on the NIC before; True if there was anything of ours. Idempotent.

    If somebody put another qdisc in our place meanwhile, that one stays: the administrator wins.

    Raises:
        KernelError: the kernel refused to rebuild it; the record stays in `run_dir`.
    """
    try:
        link = find_link(ipr, interface)
    except UsageError:  # the NIC is gone, and its queues with it
        drop_records_of_missing(run_dir, {link["index"] for link in ipr.get_links()})
        return False
    found = read_objects(ipr, link.index)
    record = load_record(run_dir, link)
    to_undo = _is_to_undo(record, found)
    if to_undo:
        if record is not None and record.original:
            save_record(run_dir, link, record.plan, record.original, changing=True)
        _put_back(ipr, link, record.original if record else (), run_dir)
    drop_record(run_dir, link.index)
    return to_undo


def drop_records_of_missing(run_dir: Path, present: Collection[int]) -> None:
    """Forget the records of interfaces whose index is not among `present`: their queues went with them."""
    for index in set(recorded(run_dir)).difference(present):
        drop_record(run_dir, index)


def restore_preview(interface: str, ipr: IPRoute, run_dir: Path) -> tuple[str, ...]:
    """What `restore` would do, in words; empty if nothing."""
    link = find_link(ipr, interface)
    record = load_record(run_dir, link)
    if not _is_to_undo(record, read_objects(ipr, link.index)):
        return ()
    steps = [f"tc qdisc del dev {interface} root"]
    if record and record.original:
        count = len(record.original)
        steps.append(f"rebuild {root_kind(record.original)} ({count} objects) from {record_path(run_dir, link)}")
    return tuple(steps)


def installed(interface: str, ipr: IPRoute, run_dir: Path) -> QueuePlan | None:
    """The plan that is on the NIC now, by its handle and the record; None if it is not, or was changed by hand.

    Raises:
        UsageError: no such interface.
    """
    link = find_link(ipr, interface)
    record = load_record(run_dir, link)
    if record is None or not same_tree(read_objects(ipr, link.index), record.plan.objects):
        return None
    return record.plan


def _is_to_undo(record: Record | None, found: tuple[TcObject, ...]) -> bool:
    """Whether the queues that were found are ours, or somebody else's half put back."""
    if is_ours(root_of(found)):
        return True
    return record is not None and _left_halfway(record, found) and bool(differences(record.original, found))


def _left_halfway(record: Record, found: tuple[TcObject, ...]) -> bool:
    """Whether an agent was killed while it took somebody's queues away or put them back: none are there, or a part.

    Anything else was put there by the administrator since, and stays.
    """
    if not record.changing or not record.original:
        return False
    return is_default(root_of(found)) or _places(found) <= _places(record.original)


def _places(objects: tuple[TcObject, ...]) -> set[tuple[object, ...]]:
    """What stands where. Options are left out: those of a class change when another one is put below it."""
    return {(o.noun, o.kind, o.parent, o.info, 0 if o.noun == "filter" else o.handle) for o in objects}


def _refuse_foreign(link: Link, found: tuple[TcObject, ...], allowed: bool) -> None:
    root = root_of(found)
    if allowed or is_ours(root) or is_default(root):
        return
    raise UsageError(
        f"{link.name} has a qdisc that somebody configured ({root_kind(found)}); set queues.replace_foreign = true "
        f'to put it aside until detach, or queues.kind = "none" to leave it'
    )


def _differ_in_classes_only(found: tuple[TcObject, ...], wanted: tuple[TcObject, ...]) -> bool:
    """Whether changing classes in place is enough, which loses no queued packet (a new link rate)."""

    def rest(objects: tuple[TcObject, ...]) -> list[TcObject]:
        return [o for o in objects if o.noun != "class"]

    def classes(objects: tuple[TcObject, ...]) -> set[tuple[object, ...]]:
        return {signature(o)[:5] for o in objects if o.noun == "class"}

    return same_tree(rest(found), rest(wanted)) and classes(found) == classes(wanted)


def _put_back(ipr: IPRoute, link: Link, original: tuple[TcObject, ...], run_dir: Path) -> None:
    try:
        delete_root(ipr, link.index)
        if original:
            replay(ipr, link.index, original)
    except NetlinkError as error:
        raise KernelError(
            f"{refused(error, f'putting back the qdisc of {link.name}')}; "
            f"it is described in {record_path(run_dir, link)}"
        ) from error
    if original and (missing := differences(original, read_objects(ipr, link.index))):
        raise KernelError(f"{link.name} got its qdisc back, but not exactly: {', '.join(missing)}")
    drop_record(run_dir, link.index)
