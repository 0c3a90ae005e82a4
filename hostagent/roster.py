"""Keeps what is scheduled in line with the interfaces there are, while the agent runs.

    a wanted one appears      -> data path, then queues unless it is tag-only
    one goes away             -> its entry and its record are forgotten (a new one of that name has another index)
    one is renamed            -> stays if the new name is wanted, else it is let go, as after a restart
    down, up, new addresses   -> nothing: program and queues stay
    one is wanted and refused -> said once, tried again every half minute
    somebody took our program -> put back (one interface is looked at per report)

It works on the table of links that LinkWatch keeps and not on single events, so a lost event costs nothing. A thousand
interfaces that appear at once are worked off in rounds of `_ROUND_S`, between which the agent reports and answers.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fabricpilot.errors import FabricpilotError, UsageError
from hostagent.datapath.base import Datapath
from hostagent.nics import LinkWatch, Nic
from hostagent.qdisc import QueuePlan, install, restore
from hostagent.qdisc.install import drop_records_of_missing
from hostagent.qdisc.snapshot import recorded
from hostagent.selection import Selection

log = logging.getLogger(__name__)

_ROUND_S: Final = 0.05  # of work on interfaces before the agent sees to the rest
_RETRY_S: Final = 30.0
_LINES_PER_S: Final = 5  # beyond that many changes in a second, one line tells of all of a kind
_NAMES_PER_LINE: Final = 8


@dataclass(frozen=True)
class _Refusal:
    name: str
    why: str
    retry_at_s: float


class Roster:
    """What is scheduled, interface by interface.

    Args:
        selection: what the configuration wants.
        datapath: loaded, and attached to those in `queues`.
        queues: the queues of each interface that is scheduled already; kept up to date from here on.
        plan: the queues that an interface of that name is to get.
        rate_bps: what an interface can send; 0: not known.
        ipr: one long-lived rtnetlink socket.
        watch: the interfaces there are.
        run_dir: where the records of queues are.
    """

    def __init__(
        self,
        selection: Selection,
        datapath: Datapath,
        queues: dict[str, QueuePlan],
        plan: Callable[[str], QueuePlan],
        rate_bps: Callable[[str], int],
        ipr: IPRoute,
        watch: LinkWatch,
        run_dir: Path,
    ) -> None:
        self.queues = queues
        self.watch = watch
        self._selection = selection
        self._datapath = datapath
        self._plan = plan
        self._rate_bps = rate_bps
        self._ipr = ipr
        self._run_dir = run_dir
        self._refused: dict[int, _Refusal] = {}
        self._to_look_at: list[int] = []
        self._changes = Changes()
        self._scheduled = {nic.index: nic.name for nic in watch.links.values() if nic.name in queues}
        self._rates = {name: rate_bps(name) for name in queues}
        self._work = True
        # What an agent before this one was told to schedule, and this one is not.
        former = {nic.index: nic.name for nic in watch.links.values() if nic.name in set(datapath.attached())}
        self._let_go({index: name for index, name in former.items() if not selection.wants(watch.links[index])})

    @property
    def busy(self) -> bool:
        """Whether there is more to do at once."""
        return self._work

    @property
    def names(self) -> list[str]:
        """Interfaces that are scheduled, sorted."""
        return sorted(self._scheduled.values())

    @property
    def link_rate_bps(self) -> int:
        """What the interfaces with queues can send together; 0 if one of them does not say."""
        rates = [rate for name, rate in self._rates.items() if not self._selection.is_tag_only(name)]
        return sum(rates) if all(rates) else 0

    @property
    def priority(self) -> tuple[int, ...] | None:
        """The `skb->priority` of each level that the queues read; None if no interface has queues of ours."""
        return common_priority(self.queues)

    def on_event(self) -> None:
        """The watch's socket is readable."""
        self.watch.read()
        self._work = True

    def step(self) -> None:
        """A bounded part of what is to be done; call it in every turn of the loop."""
        now_s = time.monotonic()
        if self._work or any(refusal.retry_at_s <= now_s for refusal in self._refused.values()):
            if self.watch.resynced():
                self._to_look_at = list(self._scheduled)
            self._forget(self.watch.gone())
            self._follow_names()
            self._work = not self._take_on(now_s)
        self._changes.tell(now_s)

    def look_after_one(self) -> None:
        """Make sure that one of the interfaces still has our program, the next one each time; once per report."""
        if not self._to_look_at:
            self._to_look_at = list(self._scheduled)
        if self._to_look_at:
            self._look_at(self._to_look_at.pop(0))

    def close(self) -> None:
        """Stop watching; what is scheduled stays so."""
        self._changes.tell(float("inf"))
        self.watch.close()

    def status(self) -> dict[str, Any]:
        """What `fabricpilot agent status` shows."""
        tagged_only = [name for name, plan in self.queues.items() if plan.kind == "none"]
        present = {nic.name: nic for nic in self.watch.links.values()}
        return {
            "scheduled": len(self._scheduled),
            "tag_only": len(tagged_only),
            "down": [name for name in self.names if name in present and not present[name].up],
            "waiting_for": [name for name in self._selection.names if name not in present],
            "refused": {refusal.name: refusal.why for refusal in self._refused.values()},
        }

    # --- changes ------------------------------------------------------------------------------------------------------

    def _forget(self, gone: set[int]) -> None:
        for index in gone:
            self._refused.pop(index, None)
        lost = {index: name for index in gone if (name := self._scheduled.pop(index, None)) is not None}
        if not lost:
            return
        for name in lost.values():
            if name not in self._scheduled.values():
                self.queues.pop(name, None)
                self._rates.pop(name, None)
            self._changes.note("is gone", name)
        self._datapath.release(())
        drop_records_of_missing(self._run_dir, self.watch.links)

    def _follow_names(self) -> None:
        renamed = {
            index: name
            for index, name in self._scheduled.items()
            if index in self.watch.links and self.watch.links[index].name != name
        }
        plans = {index: self.queues.pop(name) for index, name in renamed.items()}
        rates = {index: self._rates.pop(name) for index, name in renamed.items()}
        unwanted = {}
        for index, before in renamed.items():
            nic = self.watch.links[index]
            self._scheduled[index] = nic.name
            self.queues[nic.name], self._rates[nic.name] = plans[index], rates[index]
            if not self._selection.wants(nic):
                unwanted[index] = nic.name
                continue
            if self._datapath.attach(nic.name):  # a data path that goes by names; by index there is nothing to do
                self._datapath.release([before])
            self._changes.note("goes on under a new name", f"{before} -> {nic.name}")
        self._let_go(unwanted)

    def _let_go(self, interfaces: Mapping[int, str]) -> None:
        if not interfaces:
            return
        self._datapath.release(list(interfaces.values()))
        for index, name in interfaces.items():
            try:
                restore(name, self._ipr, self._run_dir)
            except FabricpilotError as error:
                log.warning("%s", error)
            self._scheduled.pop(index, None)
            self.queues.pop(name, None)
            self._rates.pop(name, None)
            self._changes.note("is not configured, and let go", name)

    def _take_on(self, now_s: float) -> bool:
        """Schedule what is wanted and is not yet, named ones first; False if the round was too short."""
        waiting = [
            nic
            for nic in self.watch.links.values()
            if nic.index not in self._scheduled
            and self._selection.wants(nic)
            and not (nic.index in self._refused and now_s < self._refused[nic.index].retry_at_s)
        ]
        waiting.sort(key=lambda nic: (nic.name not in self._selection.names, nic.index))
        end_s = time.monotonic() + _ROUND_S
        for done, nic in enumerate(waiting, 1):
            self._schedule(nic)
            if time.monotonic() >= end_s:
                return done == len(waiting)
        return True

    def _schedule(self, nic: Nic) -> None:
        try:
            plan = self._plan(nic.name)
            if plan.kind != "none" and self.priority not in (None, plan.priority):
                raise UsageError(f"{nic.name} would get queues of another kind ({plan.kind}) than the others")
            self._datapath.attach(nic.name)
            if plan.kind != "none" or nic.index in recorded(self._run_dir):  # else it has no queues of ours
                install(plan, nic.name, self._ipr, self._run_dir)
        except (FabricpilotError, NetlinkError) as error:
            self._datapath.release([nic.name])
            self.watch.read()
            if nic.index in self.watch.links:  # else it went while it was taken on
                self._refuse(nic, str(error))
            return
        self._refused.pop(nic.index, None)
        self._scheduled[nic.index] = nic.name
        self.queues[nic.name] = plan
        self._rates[nic.name] = self._rate_bps(nic.name)
        self._changes.note("attached, tag only" if plan.kind == "none" else f"attached, queues {plan.why}", nic.name)

    def _refuse(self, nic: Nic, why: str) -> None:
        before = self._refused.get(nic.index)
        if before is None or before.why != why:
            self._changes.note(f"cannot be scheduled: {why}", nic.name, logging.WARNING)
        self._refused[nic.index] = _Refusal(nic.name, why, time.monotonic() + _RETRY_S)

    def _look_at(self, index: int) -> None:
        name = self._scheduled.get(index)
        if name is None:
            return
        try:
            if self._datapath.attach(name):
                self._changes.note("had lost our program; it is back", name, logging.WARNING)
        except (FabricpilotError, NetlinkError) as error:
            self.watch.read()
            if index in self.watch.links:
                self._scheduled.pop(index)
                self.queues.pop(name, None)
                self._rates.pop(name, None)
                self._refuse(self.watch.links[index], str(error))
            self._work = True


class Changes:
    """Tells what happened to interfaces: one line for each, and one for all of a kind when they are many."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str, str]] = []
        self._told_at_s = float("-inf")

    def note(self, what: str, interface: str, level: int = logging.INFO) -> None:
        """`what` happened to `interface`."""
        self._waiting.append((level, what, interface))

    def tell(self, now_s: float) -> None:
        """Write the lines, once per second at most."""
        if not self._waiting or now_s < self._told_at_s + 1:
            return
        self._told_at_s = now_s
        waiting, self._waiting = self._waiting, []
        if len(waiting) <= _LINES_PER_S:
            for level, what, interface in waiting:
                log.log(level, "%s %s", interface, what)
            return
        alike = defaultdict(list)
        for level, what, interface in waiting:
            alike[level, what.partition(":")[0]].append(interface)
        for (level, what), interfaces in alike.items():
            log.log(level, "%d interfaces %s: %s", len(interfaces), what, shortened(interfaces))


def shortened(names: list[str]) -> str:
    """A list for a line: the first few, and how many more."""
    more = len(names) - _NAMES_PER_LINE
    return ", ".join(names[:_NAMES_PER_LINE]) + (f" and {more} more" if more > 0 else "")


def common_priority(queues: Mapping[str, QueuePlan]) -> tuple[int, ...] | None:
    """The `skb->priority` of each level that queues of ours read; None if there are none."""
    return next((plan.priority for plan in queues.values() if plan.kind != "none"), None)
