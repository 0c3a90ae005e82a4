"""Bring a host under scheduling, and take it out again: data path and queues of all its NICs together.

    bring_up:  check -> plan the queues -> attach the data path (no settings yet: packets pass untouched)
               -> build the queues -> apply the settings (from here on packets are tagged)
    take_down: programs, clsact and pins -> queues of every interface there is a record of -> temporary interfaces

Whatever fails on the way undoes what this call did, so nothing stays half-attached; what an earlier agent left
running is adopted, and never undone by a failure of ours. An agent that is killed on the way leaves what the next one,
or a `take_down`, finishes. Interfaces that only a pattern selects, or that are waited for, are roster.py's.
"""

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from pyroute2 import IPRoute

from fabricpilot.config import AgentConfig, DatapathSection, parse_rate
from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import Thresholds
from hostagent.datapath import open_datapath
from hostagent.datapath.base import Datapath, MessageRule, Settings, SocketRule
from hostagent.datapath.cgroup_links import cgroup_directory
from hostagent.flow_control import FlowControl, check, open_flow_control, require
from hostagent.nics import LinkWatch
from hostagent.qdisc import (
    QueuePlan,
    install,
    installed,
    make_plan,
    plan_queues,
    restore,
    restore_preview,
    supported_kinds,
)
from hostagent.qdisc.install import drop_records_of_missing
from hostagent.qdisc.link import find_link, link_rate_bps, remove_abandoned_links
from hostagent.qdisc.snapshot import recorded
from hostagent.roster import Roster, common_priority, shortened
from hostagent.selection import Selection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheduled:
    """A host under scheduling: the data path in force and the queues of each NIC."""

    datapath: Datapath
    queues: dict[str, QueuePlan]  # the roster keeps it up to date
    settings: Settings
    adopted: bool  # an agent before this one had attached it
    link_rate_bps: int  # of all NICs together; 0: not known
    flow_control: FlowControl | None = None  # None: the data path has none
    roster: Roster | None = None  # None: the NICs stay as they are


class QueuePlanner:
    """The queues an interface is to get, by the configuration and what this kernel has."""

    def __init__(self, config: AgentConfig, ipr: IPRoute) -> None:
        self._config = config
        self._ipr = ipr
        self._selection = Selection.of(config)
        self._supported: frozenset[str] | None = None

    def __call__(self, interface: str) -> QueuePlan:
        """The plan; changes nothing.

        Raises:
            UsageError, KernelError: the queues cannot be built as configured.
        """
        queues, levels = self._config.queues, self._config.datapath.levels
        if self._selection.is_tag_only(interface):
            return replace(make_plan("none", frozenset(), levels), why="none: queues.tag_only fits its name")
        if self._config.datapath.observe:  # packets keep their order, too
            queues = msgspec.structs.replace(queues, kind="none")
        if self._supported is None and queues.kind != "none":
            self._supported = supported_kinds(self._ipr)
        return plan_queues(interface, queues, levels, self._ipr, self._supported)


def plan_all(config: AgentConfig, ipr: IPRoute) -> dict[str, QueuePlan]:
    """The queues each NIC that is configured by name would get; changes nothing.

    Raises:
        UsageError: no NIC configured, one that does not exist (unless it is waited for), or queues that cannot be
            built as configured.
    """
    selection = Selection.of(config)
    present = {link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}
    for name in selection.names:
        if name not in present and not config.host.wait_for_interfaces:
            raise UsageError(
                f"interface '{name}' does not exist; there are: {shortened(sorted(present))} "
                "(host.wait_for_interfaces = true waits for it)"
            )
    planner = QueuePlanner(config, ipr)
    plans = {name: planner(name) for name in selection.names if name in present}
    with_queues = [plan for plan in plans.values() if plan.kind != "none"]
    if len({plan.priority for plan in with_queues}) > 1:
        # One vector of skb->priority serves all NICs, so their qdiscs must read it alike.
        kinds = {plan.kind for plan in with_queues}
        raise UsageError(
            f"the NICs would get different queues ({', '.join(sorted(kinds))}); set queues.kind to one kind"
        )
    return plans


def bring_up(config: AgentConfig, ipr: IPRoute) -> Scheduled:
    """Schedule all NICs configured by name, adopting what an earlier agent left; the roster does the others.

    Raises:
        UsageError, KernelError: one line that says what to do; nothing is left half-attached.
    """
    plans = plan_all(config, ipr)
    check(config)
    for cgroup in (*config.datapath.hint_cgroups, *config.datapath.send_buffer_cgroups):
        cgroup_directory(cgroup)
    run_dir = Path(config.host.run_dir)
    datapath = open_datapath(config.datapath)
    with contextlib.ExitStack() as undo:
        undo.callback(datapath.close)
        require(config, datapath)
        already = set(datapath.attached())
        datapath.claim()
        if not already:
            undo.callback(datapath.detach)
        remove_abandoned_links(ipr)
        before = datapath.settings()
        settings = Settings(
            thresholds=_thresholds(config, before),
            dscp=config.dscp,
            priority=common_priority(plans) or (before.priority if before else (0,) * config.datapath.levels),
            respect_dscp=config.datapath.respect_dscp,
            observe=config.datapath.observe,
            messages=_message_rule(config.datapath),
            use_backlog=config.datapath.mode != "attained" and "backlog" in datapath.capabilities,
            use_hints=bool(config.datapath.hint_cgroups),
            new_flows_per_s=config.datapath.new_flows_per_s if "share" in datapath.capabilities else 0,
        )
        if already:  # if another version's takes its place, it is to go on tagging
            datapath.apply(settings)
        for name, plan in plans.items():
            datapath.attach(name)
            if installed(name, ipr, run_dir) is None:
                undo.callback(restore, name, ipr, run_dir)
            install(plan, name, ipr, run_dir)
            log.info("%s: queues %s: %s", name, plan.kind, plan.why)
        datapath.apply(settings)
        if config.datapath.mode == "backlog" and not datapath.sees_backlog():
            raise KernelError("datapath.mode = backlog: this kernel does not let it be seen; mode = auto goes without")
        datapath.serve_sockets(_socket_rule(config.datapath))
        roster = _roster(config, datapath, plans, ipr)
        undo.callback(roster.close)
        flow_control = open_flow_control(config, datapath, ipr, lambda: roster.names)
        undo.pop_all()
    log.info(
        "%s data path %s on %s, thresholds %s",
        datapath.name,
        "adopted" if already else "attached",
        ", ".join(plans) or "no interface yet",
        list(settings.thresholds.bytes),
    )
    return Scheduled(
        datapath,
        plans,
        settings,
        adopted=bool(already),
        link_rate_bps=roster.link_rate_bps,
        flow_control=flow_control,
        roster=roster,
    )


def take_down(config: AgentConfig, ipr: IPRoute) -> list[str]:
    """Remove every trace of the data path and restore the queues; returns what was done, one line each. Idempotent.

    Finishes what a killed agent, or a killed `take_down`, has left.
    """
    done = []
    run_dir = Path(config.host.run_dir)
    datapath = open_datapath(config.datapath)
    try:
        interfaces = datapath.attached()
        datapath.detach()
    finally:
        datapath.close()
    if interfaces:
        done.append(f"{datapath.name} data path removed from {shortened(interfaces)}")
    names = _names_by_index(ipr)
    for name in _perhaps_with_queues(config, interfaces, names):
        if restore(name, ipr, run_dir):
            done.append(f"{name}: queues restored")
    drop_records_of_missing(run_dir, names)
    done += [f"{name}: temporary interface of a killed agent removed" for name in remove_abandoned_links(ipr)]
    return done


def take_down_preview(config: AgentConfig, ipr: IPRoute) -> list[str]:
    """What `take_down` would do to the data path and the queues, one line each; changes nothing."""
    datapath = open_datapath(config.datapath)
    try:
        interfaces = datapath.attached()
    finally:
        datapath.close()
    told = [f"would remove the {datapath.name} data path from {shortened(interfaces)}"] if interfaces else []
    for name in _perhaps_with_queues(config, interfaces, _names_by_index(ipr)):
        if steps := restore_preview(name, ipr, Path(config.host.run_dir)):
            told.append(f"{name}: would restore the queues: {', then '.join(steps)}")
    return told


def _names_by_index(ipr: IPRoute) -> dict[int, str]:
    return {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}


def _perhaps_with_queues(config: AgentConfig, attached: list[str], names: dict[int, str]) -> list[str]:
    """NICs that may have queues of ours: scheduled ones, those with a record, configured ones."""
    with_records = [names[index] for index in recorded(Path(config.host.run_dir)) if index in names]
    configured = [name for name in config.host.interfaces if name in names.values()]
    return list(dict.fromkeys([*attached, *with_records, *configured]))


def _roster(config: AgentConfig, datapath: Datapath, queues: dict[str, QueuePlan], ipr: IPRoute) -> Roster:
    def rate_bps(interface: str) -> int:
        if config.queues.link_rate:
            return parse_rate(config.queues.link_rate)
        try:
            return link_rate_bps(find_link(ipr, interface)) or 0
        except UsageError:  # gone already
            return 0

    watch = LinkWatch()
    try:
        return Roster(
            Selection.of(config),
            datapath,
            queues,
            QueuePlanner(config, ipr),
            rate_bps,
            ipr,
            watch,
            Path(config.host.run_dir),
        )
    except BaseException:
        watch.close()
        raise


def _socket_rule(section: DatapathSection) -> SocketRule:
    return SocketRule(
        hint_cgroups=tuple(section.hint_cgroups),
        send_buffer_bytes=section.send_buffer_bytes,
        send_buffer_ports=tuple(section.send_buffer_ports),
        send_buffer_cgroups=tuple(section.send_buffer_cgroups) or ("/",),
    )


def _message_rule(section: DatapathSection) -> MessageRule:
    return MessageRule(
        gap_ns=section.message_gap_us * 1_000,
        blind_gap_ns=section.blind_message_gap_ms * 1_000_000,
        starved_ns=section.starved_ms * 1_000_000,
        turn_bytes=section.turn_bytes,
    )


def _thresholds(config: AgentConfig, before: Settings | None) -> Thresholds:
    """What to start with: the adopted thresholds, unless the operator fixed others or the number of levels changed.

    A host that listens to central keeps what it has until central says otherwise. One that runs alone follows its
    configuration.
    """
    runs_alone = not config.link.endpoint
    if before is None or before.thresholds.levels != config.datapath.levels:
        return config.thresholds
    if runs_alone and config.datapath.thresholds:
        return config.thresholds
    return before.thresholds
