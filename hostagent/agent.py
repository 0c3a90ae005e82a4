"""The agent's loop: read the flow table, report to central, apply what central sends, answer `agent status`.

One thread and one poller; nothing here is on a packet's way. Every interval:

    flows -> observe -> report -> link          (the report is also the heartbeat)
    flows that ended a while ago -> datapath.forget

whenever a flow becomes long, and central follows that: kernel's ring -> link; and back as a verdict -> kernel's map
whenever the link has something: policy -> thresholds -> datapath.apply; whenever a network interface comes, goes or
changes: roster -> data path and queues. The systemd watchdog is fed after a successful read of the kernel's maps, so
that a hanging agent is restarted; the data path goes on without it.
"""

import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from fabricpilot import __version__, notify
from fabricpilot.config import AgentConfig
from fabricpilot.control import ControlServer
from fabricpilot.levels import Thresholds
from fabricpilot.stopping import StopSignal, stop_signal
from fabricpilot.wire import FlowSummary, FromCentral, Hello, LongFlows, Policy, Refused, Report, Verdicts
from hostagent.datapath.base import Settings
from hostagent.lifecycle import Scheduled
from hostagent.link import HostLink
from hostagent.long_flows import open_long_flow_events
from hostagent.observe import Observation, further_long_flows, observe, summaries
from hostagent.roster import Roster

log = logging.getLogger(__name__)

_NS_PER_S = 1_000_000_000
_FLOOD_QUIET_S = 60.0  # without a flood of new flows, after which one is told of again
_PAUSE_MS = 20  # between rounds of work on many interfaces
_TCP_WMEM = Path("/proc/sys/net/ipv4/tcp_wmem")  # least, first and greatest send buffer


class Agent:
    """The daemon on one server, between its kernel and central.

    Args:
        config: of this host.
        scheduled: its NICs, brought up.
        control: answers `agent status`.
        link: to central; None runs alone. Whoever made it closes it.
    """

    def __init__(
        self, config: AgentConfig, scheduled: Scheduled, control: ControlServer, link: HostLink | None
    ) -> None:
        self.config = config
        self.scheduled = scheduled
        self.datapath = scheduled.datapath
        self.settings: Settings = scheduled.settings
        self.flow_control = scheduled.flow_control
        self.roster = scheduled.roster
        self.long_flows = open_long_flow_events(scheduled.datapath) if scheduled.flow_control is not None else None
        self.name = host_name(config)
        self.control = control
        self.link = link
        self.epoch = 0  # of the policy in force; 0: none from central since this agent started
        self.refused = ""  # why the last policy was not taken, or what central refused
        self._policy_expiry_s = float("inf")
        self._sequence = 0
        self._last_report_ns = time.monotonic_ns()
        counters = self.datapath.counters()
        self._last_sent_bytes = sent_bytes(counters)
        self._over_share = counters.get("over_share", 0)
        self._flooded_at_s = -_FLOOD_QUIET_S
        self._finished_before = self.datapath.finished_messages()
        self._read_s = 0.0
        self._read_at_ns = 0
        self._active = 0
        self._long = 0
        self._turn = 0  # which of more long flows than a report has room for are told of next
        self._started_at = time.time()
        self._rng = np.random.default_rng()

    def run(self) -> None:
        """Run until SIGINT or SIGTERM."""
        with stop_signal() as stop:
            notify.ready()
            try:
                self._loop(stop)
            finally:
                notify.stopping()
                if self.long_flows is not None:
                    self.long_flows.close()
                if self.flow_control is not None:
                    self.flow_control.close()
                if self.roster is not None:
                    self.roster.close()

    def _loop(self, stop: StopSignal) -> None:
        poller = zmq.Poller()
        poller.register(stop.wake, zmq.POLLIN)
        poller.register(self.control.socket, zmq.POLLIN)
        if self.link is not None:
            poller.register(self.link.socket, zmq.POLLIN)
            poller.register(self.link.monitor, zmq.POLLIN)  # a new connection is greeted at once
        events = self.flow_control.socket if self.flow_control is not None else None
        if events is not None:
            poller.register(events, zmq.POLLIN)
        if self.roster is not None:
            poller.register(self.roster.watch.fileno(), zmq.POLLIN)
        interval_s = self.config.host.report_interval_s
        due = time.monotonic() + interval_s
        while not stop.asked:
            wait_ms = max(0, int((due - time.monotonic()) * 1000))
            if self.long_flows is not None and self.link is not None:
                self.long_flows.watch(poller, self.link.follows_long_flows)
            if self.roster is not None and self.roster.busy:
                wait_ms = min(wait_ms, _PAUSE_MS)
            ready = dict(poller.poll(wait_ms))
            if self.roster is not None:
                self._follow_interfaces(self.roster, self.roster.watch.fileno() in ready)
            if self.flow_control is not None and events is not None and events.fileno() in ready:
                self.flow_control.on_event()
            if self.long_flows is not None and self.long_flows.fileno in ready:
                self._tell_long_flows(*self.long_flows.take(self.settings.thresholds.levels))
            if self.link is not None:
                for message in self.link.receive():
                    self.handle(message)
            self.control.serve()
            if time.monotonic() >= due:
                self.report()
                notify.watchdog()
                # Skip the ticks missed while suspended or starved, so that reports never come in bursts.
                due = max(due + interval_s, time.monotonic() + interval_s / 2)

    def hello(self) -> Hello:
        """Who this host is, sent after every connect."""
        kinds = sorted({plan.kind for plan in self.scheduled.queues.values() if plan.kind != "none"})
        return Hello(
            host=self.name,
            group=self.config.host.group,
            levels=self.settings.thresholds.levels,
            backend=self.datapath.name,
            queues=", ".join(kinds) or "none",
            link_rate_bps=self.roster.link_rate_bps if self.roster else self.scheduled.link_rate_bps,
            epoch=self.epoch,
            thresholds=list(self.settings.thresholds.bytes),
            version=__version__,
            routes=list(self.flow_control.routes) if self.flow_control is not None else [],
            visible_bytes=self._visible_bytes(),
        )

    def report(self) -> None:
        """Read the flow table, forget what finished, tell central."""
        begin = time.perf_counter()
        table, finished = self.datapath.flows(), self.datapath.finished_messages()
        last_threshold, idle_timeout_s = self.settings.thresholds.bytes[-1], self.config.datapath.idle_timeout_s
        since = finished.since(self._finished_before)
        seen = observe(table, last_threshold, idle_timeout_s, self._read_at_ns, since)
        self._read_at_ns, self._finished_before = table.read_at_ns, finished
        counters = self.datapath.counters()
        self._tell_of_a_flood(counters.get("over_share", 0))
        self._read_s = time.perf_counter() - begin
        self._active, self._long = seen.active, len(seen.long)
        if len(seen.leaving):
            self.datapath.forget(seen.leaving_keys)
        if self.flow_control is not None:
            self.flow_control.tick()
        if self.roster is not None:
            self.roster.look_after_one()
        message = self._report_message(seen, counters)
        if self.link is not None:
            self.link.send(message)
            if self.link.follows_long_flows:
                for rows in further_long_flows(seen, self._turn):
                    self._tell_long_flows(summaries(seen.table, rows))
                self._turn += 1
            if self.long_flows is not None:
                self.long_flows.renew(self.link.follows_long_flows)

    def handle(self, message: FromCentral) -> None:
        """Act on one message from central."""
        if isinstance(message, Policy):
            self._handle_policy(message)
        elif isinstance(message, Verdicts):
            self._handle_verdicts(message)
        elif isinstance(message, Refused):
            self._refuse(f"central refused this host: {message.reason}")

    def status(self) -> dict[str, Any]:
        """What `fabricpilot agent status` shows."""
        link: dict[str, Any] = {"endpoint": ""}
        if self.link is not None:
            link = {
                "endpoint": self.config.link.endpoint,
                "connected": self.link.connected,
                "trouble": self.link.trouble,
                "counters": dict(self.link.counters),
            }
        interfaces = self.roster.names if self.roster is not None else self.datapath.attached()
        return {
            "host": self.name,
            "group": self.config.host.group,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started_at, 1),
            "datapath": {
                "backend": self.datapath.name,
                "interfaces": interfaces,
                "attached_by": self.datapath.attached_by(interfaces),
                "adopted": self.scheduled.adopted,
                "mode": "backlog" if self._ranks_by_backlog() else "attained",
                "thresholds": list(self.settings.thresholds.bytes),
                "dscp": list(self.settings.dscp),
                "active_flows": self._active,
                "long_flows": self._long,
                "read_s": round(self._read_s, 6),
                "counters": self.datapath.counters(),
            },
            "interfaces": self.roster.status() if self.roster is not None else {},
            "queues": {
                name: {"kind": plan.kind, "why": plan.why}
                for name, plan in sorted(self.scheduled.queues.items())
                if plan.kind != "none" or not self.roster
            },
            "policy": {
                "epoch": self.epoch,
                "stale": self._stale(),
                "refused": self.refused,
            },
            "flow_control": self.flow_control.status() if self.flow_control is not None else {},
            "long_flows": self.long_flows.status() if self.long_flows is not None else {},
            "link": link,
        }

    def _follow_interfaces(self, roster: Roster, told: bool) -> None:
        if told:
            roster.on_event()
        rate_bps = roster.link_rate_bps
        roster.step()
        if roster.priority not in (None, self.settings.priority):  # the first interface that has queues
            self.settings = replace(self.settings, priority=roster.priority)
            self.datapath.apply(self.settings)
        if roster.link_rate_bps != rate_bps and self.link is not None:
            self.link.send(self.hello())

    def _report_message(self, seen: Observation, counters: dict[str, int]) -> Report:
        now_ns = time.monotonic_ns()
        sent = sent_bytes(counters)
        self._sequence += 1
        message = Report(
            host=self.name,
            sequence=self._sequence,
            interval_ns=max(1, now_ns - self._last_report_ns),
            epoch=self.epoch,
            sent_bytes=max(0, sent - self._last_sent_bytes),
            sizes=seen.sizes().sparse(),
            durations=seen.durations().sparse(),
            finished=seen.finished_count(),
            finished_sample=seen.finished_sample(self._rng),
            long=len(seen.long),
            long_flows=seen.long_flows(),
            active=seen.active,
            counters=counters,
            usable_routes=list(self.flow_control.usable_routes) if self.flow_control is not None else [],
        )
        self._last_report_ns, self._last_sent_bytes = now_ns, sent
        return message

    def _ranks_by_backlog(self) -> bool:
        return self.settings.use_backlog and self.datapath.sees_backlog()

    def _visible_bytes(self) -> int:
        """What ranking sees of a flow beyond the bytes it has sent: the send buffer that it begins with."""
        if not self._ranks_by_backlog():
            return 0
        return self.config.datapath.send_buffer_bytes or int(_TCP_WMEM.read_text().split()[1])

    def _handle_policy(self, policy: Policy) -> None:
        if policy.epoch < self.epoch:
            return
        self._policy_expiry_s = policy.expiry_s
        if policy.epoch == self.epoch:
            return
        thresholds = Thresholds.of(policy.thresholds)  # a `Policy` holds valid ones, or it had not been decoded
        if thresholds.levels != self.settings.thresholds.levels:
            self._refuse(
                f"policy {policy.epoch} is for {thresholds.levels} levels, "
                f"this host has {self.settings.thresholds.levels}"
            )
            return
        self.epoch = policy.epoch
        self.refused = ""
        if thresholds != self.settings.thresholds:
            self.settings = replace(self.settings, thresholds=thresholds)
            self.datapath.apply(self.settings)
            log.info("policy %d: thresholds %s (%s)", policy.epoch, list(thresholds.bytes), policy.reason)

    def _handle_verdicts(self, message: Verdicts) -> None:
        if self.flow_control is None:
            self._refuse(f"the {self.datapath.name} data path takes no verdicts for single flows")
            return
        self.flow_control.take(message.verdicts)
        if self.long_flows is not None:
            self.long_flows.decided(message.verdicts)

    def _tell_long_flows(self, flows: list[FlowSummary], ended: Sequence[FlowSummary] = ()) -> None:
        if self.link is not None and (flows or ended):
            self.link.send(LongFlows(host=self.name, flows=flows, ended=list(ended)))

    def _tell_of_a_flood(self, over_share: int) -> None:
        if over_share > self._over_share:
            if time.monotonic() - self._flooded_at_s >= _FLOOD_QUIET_S:
                log.warning(
                    "a source begins more than %d flows/s (datapath.new_flows_per_s): those beyond are on the last "
                    "level, and counted as over_share",
                    self.config.datapath.new_flows_per_s,
                )
            self._flooded_at_s = time.monotonic()
        self._over_share = over_share

    def _stale(self) -> bool:
        """Whether central has been silent for longer than its policy is meant to last. The policy is kept."""
        silent_s = self.link.silent_s if self.link is not None else None
        return silent_s is not None and silent_s > self._policy_expiry_s

    def _refuse(self, why: str) -> None:
        if why != self.refused:  # log what changes, not what repeats
            log.warning("%s", why)
        self.refused = why


def host_name(config: AgentConfig) -> str:
    """The name of this host towards central."""
    return config.host.name or socket.gethostname()


def sent_bytes(counters: dict[str, int]) -> int:
    """Payload bytes sent by all tracked flows so far, from the data path's counters."""
    return sum(value for name, value in counters.items() if name.startswith("bytes_level_"))
