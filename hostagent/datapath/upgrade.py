"""Bring this version's data path into the kernel, in place of another version's if there is one.

    load_beside   program and maps into PIN_DIR-new; every map of the old set whose layout agrees is taken over, so that
                  flows, counters, settings and rules go on (pins.py says which maps belong together)
    hand_over     the programs on cgroups (hints, send buffers) to the new ones, in one step each (cgroup_links.py)
    turn_over     each NIC to the new program, the way it has it (hooks.py), in one step each: no packet in between
                  meets none or both
    take_place    PIN_DIR-new becomes PIN_DIR

While NICs are turned over, old and new program work on the same maps. An agent killed at any point leaves one whole
set, and the next one starts from there. What cannot be kept begins afresh, and is counted.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from fabricpilot.errors import KernelError
from hostagent.datapath import pins as pinned
from hostagent.datapath.ebpf_loader import load
from hostagent.datapath.flow_table import draw_hash
from hostagent.datapath.hook import Hook, Interface, interface_names
from hostagent.datapath.pins import Pins

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A data path that is whole and pinned beside the one in use."""

    pins: Pins
    message: str  # what became of the one before, for the log
    lost: bool  # the flow table of the one before could not be kept

    def abandon(self) -> None:
        """Unpin it again."""
        self.pins.close()
        pinned.remove_directory(self.pins.directory)


def load_beside(
    pin_dir: Path, flow_entries: int, fingerprint: bytes, layouts: Mapping[str, bytes], before: Pins | None
) -> Loaded:
    """Compile, load and pin a data path in a folder beside `pin_dir`.

    Raises:
        KernelError: it could not be loaded or pinned; nothing is left of it.
    """
    new = pinned.new_directory(pin_dir)
    agreeing = [] if before is None else [n for n, held in layouts.items() if before.layouts.get(n) == held]
    with ExitStack() as undo:
        new.mkdir(mode=0o700)
        undo.callback(pinned.remove_directory, new)
        said = load(new, flow_entries, before.directory if before is not None else None, agreeing)
        kept = said.get("kept", [])
        try:
            pinned.complete(new, fingerprint, layouts, before, kept, not said["blind"])
        except OSError as error:
            raise KernelError(f"cannot pin the data path in {new}: {error.strerror}") from error
        pins = Pins.open(new)
        if pins is None:
            raise KernelError(f"{new} vanished while the data path was loaded; is something else removing pins?")
        if "flows" not in kept:
            draw_hash(pins.maps["flow_hash"])
        undo.pop_all()
    log.info("loaded the BPF program: %s instructions in %s s", said["instructions"], said["seconds"])
    if said["blind"]:
        log.warning("the backlog of sockets cannot be seen, levels follow bytes sent: %s", said["blind"])
    if before is None:
        return Loaded(pins, "", False)
    afresh = sorted(set(layouts).difference(kept))
    message = f"replaced the data path of another version in {pin_dir}"
    message += f"; begun afresh: {', '.join(afresh)}" if afresh else ", all of its state kept"
    return Loaded(pins, message, "flows" not in kept)


def turn_over(ipr: IPRoute, ways: Mapping[Interface, Hook], before: Pins | None, after: Pins) -> None:
    """Put the new program on every NIC that had the old one.

    Raises:
        KernelError: the kernel refused on a NIC that is still there; all have the old program again.
    """
    with ExitStack() as undo:
        for nic, way in ways.items():
            try:
                way.put(nic, after)
            except KernelError:
                if nic.index not in interface_names(ipr):
                    continue
                raise
            if before is not None:
                undo.callback(way.put, nic, before)
        undo.pop_all()


def take_place(loaded: Loaded, pin_dir: Path) -> None:
    """The folder beside becomes the one in use."""
    if loaded.message:
        log.log(logging.WARNING if loaded.lost else logging.INFO, "%s", loaded.message)
    pinned.remove_directory(pin_dir)
    loaded.pins.directory.rename(pin_dir)
    loaded.pins.directory = pin_dir
