"""Bring a host under scheduling, and take it out again: data path and queues of all its NICs together.

    bring_up: check -> plan the queues -> attach the data path (no settings yet: packets pass untouched)
              -> build the queues -> apply the settings (from here on packets are tagged)

Whatever fails on the way undoes what this call did, so nothing stays half-attached; what an earlier agent left
running is adopted, and never undone by a failure of ours.
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from pyroute2 import IPRoute

from fabricpilot.config import AgentConfig, parse_rate
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from hostagent.datapath import open_datapath
from hostagent.datapath.base import Datapath, Settings
from hostagent.flow_control import FlowControl, check, open_flow_control, require
from hostagent.qdisc import QueuePlan, install, installed, plan_queues, restore
from hostagent.qdisc.link import find_link, link_rate_bps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheduled:
    """A host under scheduling: the data path in force and the queues of each NIC."""

    datapath: Datapath
    queues: Mapping[str, QueuePlan]
    settings: Settings
    adopted: bool  # an agent before this one had attached it
    link_rate_bps: int  # of all NICs together; 0: not known
    flow_control: FlowControl | None = None  # None: the data path has none


def plan_all(config: AgentConfig, ipr: IPRoute) -> dict[str, QueuePlan]:
    """The queues each configured NIC would get; changes nothing.

    Raises:
        UsageError: no NIC configured, a NIC that does not exist, or queues that cannot be built as configured.
    """
    interfaces = config.host.interfaces
    if not interfaces:
        raise UsageError("no interface to schedule; give --interface NAME or set interfaces in [host]")
    if len(set(interfaces)) != len(interfaces):
        raise UsageError(f"host.interfaces = {interfaces} names an interface twice")
    present = {link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}
    for interface in interfaces:
        if interface not in present:
            raise UsageError(f"interface '{interface}' does not exist; there are: {', '.join(sorted(present))}")
    queues = config.queues
    if config.datapath.observe:  # packets keep their order, too
        queues = msgspec.structs.replace(queues, kind="none")
    plans = {name: plan_queues(name, queues, config.datapath.levels, ipr) for name in interfaces}
    kinds = {plan.kind for plan in plans.values()}
    if len({plan.priority for plan in plans.values()}) > 1:
        # One vector of skb->priority serves all NICs, so their qdiscs must read it alike.
        raise UsageError(
            f"the NICs would get different queues ({', '.join(sorted(kinds))}); set queues.kind to one kind"
        )
    return plans


def bring_up(config: AgentConfig, ipr: IPRoute) -> Scheduled:
    """Schedule all configured NICs, adopting what an earlier agent left.

    Raises:
        UsageError, KernelError: one line that says what to do; nothing is left half-attached.
    """
    plans = plan_all(config, ipr)
    check(config)
    run_dir = Path(config.host.run_dir)
    datapath = open_datapath(config.datapath)
    with contextlib.ExitStack() as undo:
        undo.callback(datapath.close)
        require(config, datapath)
        already = set(datapath.attached())
        if not already:
            undo.callback(datapath.detach)
        before = datapath.settings()
        for name, plan in plans.items():
            datapath.attach(name)
            if installed(name, ipr, run_dir) is None:
                undo.callback(restore, name, ipr, run_dir)
            install(plan, name, ipr, run_dir)
            log.info("%s: queues %s: %s", name, plan.kind, plan.why)
        settings = Settings(
            thresholds=_thresholds(config, before),
            dscp=config.dscp,
            priority=next(iter(plans.values())).priority,
            respect_dscp=config.datapath.respect_dscp,
            observe=config.datapath.observe,
        )
        datapath.apply(settings)
        flow_control = open_flow_control(config, datapath, ipr)
        undo.pop_all()
    log.info(
        "%s data path %s on %s, thresholds %s",
        datapath.name,
        "adopted" if already else "attached",
        ", ".join(plans),
        list(settings.thresholds.bytes),
    )
    return Scheduled(
        datapath,
        plans,
        settings,
        adopted=bool(already),
        link_rate_bps=_link_rate_bps(config, ipr),
        flow_control=flow_control,
    )


def take_down(config: AgentConfig, ipr: IPRoute) -> list[str]:
    """Remove every trace of the data path and restore the queues; returns what was done, one line each. Idempotent."""
    done = []
    datapath = open_datapath(config.datapath)
    try:
        interfaces = datapath.attached()
        datapath.detach()
    finally:
        datapath.close()
    if interfaces:
        done.append(f"{datapath.name} data path removed from {', '.join(interfaces)}")
    for name in dict.fromkeys([*interfaces, *config.host.interfaces]):
        if restore(name, ipr, Path(config.host.run_dir)):
            done.append(f"{name}: queues restored")
    return done


def _link_rate_bps(config: AgentConfig, ipr: IPRoute) -> int:
    """What the NICs can send together, as configured or as they report; 0 if one of them does not say."""
    if config.queues.link_rate:
        return parse_rate(config.queues.link_rate) * len(config.host.interfaces)
    rates = [link_rate_bps(find_link(ipr, name)) for name in config.host.interfaces]
    return sum(rate for rate in rates if rate) if all(rates) else 0


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
