"""Central's loop: listen to all hosts, decide every few seconds, tell those whom it concerns.

One thread and one poller over the link, its handshakes, the control socket, the policy worker and signals:

    Hello  -> registry -> the group's policy at once, if there is one
    Report -> registry -> now and then the policy again (repairs what was lost, and shows that central lives)
    every policy.interval_s: summaries of all groups -> worker (another process)
    decisions from the worker -> new epoch -> broadcast to the group's hosts

Nothing is kept on disk: hosts go on with what they have while central is away, and introduce themselves when it is
back. Epochs come from the clock, so those of a restarted central are above those the hosts know.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import zmq

from central.link import Arrival, CentralLink
from central.planner.announced import Announced
from central.planner.desk import PlanDesk
from central.policy.base import Decision, GroupSummary
from central.registry import Host, InForce, Registry
from central.threshold_log import ThresholdLog
from central.worker import Decided, Worker
from fabricpilot import __version__, notify
from fabricpilot.config import CentralConfig
from fabricpilot.control import ControlServer
from fabricpilot.stopping import StopSignal, stop_signal
from fabricpilot.wire import Ack, Hello, Identify, Policy, Refused, Report

log = logging.getLogger(__name__)

_SWEEP_S = 0.5  # how often lost hosts are looked for
_REPEAT_S = 5.0  # how often a host is sent its policy again
_DECISIONS_KEPT = 128  # for the quantiles of decision time in the status
_MAX_NAMES = 5  # of hosts in one log line
_MS_PER_DAY = 86_400_000


class Central:
    """The daemon on the controller.

    Args:
        config: everything it reads.
        link: already listening.
        control: already listening; its answer is set here.
        worker: already running.
    """

    def __init__(self, config: CentralConfig, link: CentralLink, control: ControlServer, worker: Worker) -> None:
        policy = config.policy
        self.registry = Registry(policy.window_s, config.central.host_timeout_s, policy.shared_rate)
        self._config = config
        self._link = link
        self._control = control
        self._worker = worker
        self._log = ThresholdLog(config.central.threshold_log)
        self._repeat_s = min(_REPEAT_S, policy.expiry_s / 3)
        self._epoch = 0
        self._started_at = time.time()
        self._unidentified = 0
        self._decision_s: deque[float] = deque(maxlen=_DECISIONS_KEPT)
        self._reports = 0
        self._reports_per_s = 0.0
        self.announced = Announced()
        self._plans = PlanDesk(config.central.planners, link.send, self.announced)
        control.answer = lambda _request: self.status()

    def run(self) -> None:
        """Run until SIGINT or SIGTERM."""
        log.info("central %s listens on %s, policy %s", __version__, self._link.endpoint, self._config.policy.scheme)
        with stop_signal() as stop:
            notify.ready()
            try:
                self._loop(stop)
            finally:
                self._plans.close()
                notify.stopping()

    def handle(self, arrival: Arrival, now_s: float) -> None:
        """Act on one message from a host."""
        message = arrival.message
        if isinstance(message, Hello):
            self._introduce(arrival, message, now_s)
            return
        if not isinstance(message, Report):
            self._plans.take(arrival.peer, message, now_s)
            return
        known = self.registry.hosts.get(arrival.host)
        was_lost = known is not None and known.lost
        host = self.registry.report(arrival.host, arrival.peer, message, now_s)
        if host is None:
            self._unidentified += 1
            self._link.send([arrival.peer], Identify())
            return
        self._reports += 1
        if was_lost:
            log.info("host %s is back", host.name)
        if now_s - host.told_s >= self._repeat_s:
            self._tell([host], now_s)

    def apply(self, decided: Decided, now_s: float) -> None:
        """Put the worker's decisions into force."""
        self._decision_s.append(decided.seconds)
        for summary, decision in zip(decided.summaries, decided.decisions, strict=True):
            group = self.registry.groups.get(summary.group)
            if group is None:  # its last host was forgotten meanwhile
                continue
            group.verdict[summary.levels] = decision.reason
            if decision.thresholds is not None:
                self._enforce(summary, decision, now_s)

    def status(self) -> dict[str, Any]:
        """What `fabricpilot central status` shows."""
        now_s = time.monotonic()
        times = sorted(self._decision_s)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started_at, 1),
            "endpoint": self._link.endpoint,
            "insecure": self._config.link.insecure,
            "scheme": self._config.policy.scheme,
            "epoch": self._epoch,
            "reports_per_s": round(self._reports_per_s, 1),
            "decision_s": {
                "last": round(self._decision_s[-1], 6) if times else None,
                "p50": round(times[len(times) // 2], 6) if times else None,
                "max": round(times[-1], 6) if times else None,
            },
            "worker_restarts": self._worker.restarts,
            "link": {**self._link.counters, "unidentified": self._unidentified, "handshakes": self._link.handshakes},
            "plans": self._plans.status(now_s),
            "groups": [self._group_status(summary, now_s) for summary in self.registry.summaries(now_s)],
            "hosts": [
                _host_status(host, now_s) for host in sorted(self.registry.hosts.values(), key=lambda host: host.name)
            ],
        }

    def _loop(self, stop: StopSignal) -> None:
        poller = zmq.Poller()
        for readable in (*self._link.sockets, self._control.socket, stop.wake):
            poller.register(readable, zmq.POLLIN)
        interval_s = self._config.policy.interval_s
        started_s = swept_s = time.monotonic()
        decide_at = started_s + interval_s
        worker_fd = -1
        while not stop.asked:
            if worker_fd != self._worker.fileno():  # another worker, or none until the next round
                if worker_fd >= 0:
                    poller.unregister(worker_fd)
                worker_fd = self._worker.fileno()
                if worker_fd >= 0:
                    poller.register(worker_fd, zmq.POLLIN)
            due = min(decide_at, swept_s + _SWEEP_S)
            ready = dict(poller.poll(max(0, int((due - time.monotonic()) * 1000) + 1)))
            now_s = time.monotonic()
            for arrival in self._link.receive():
                self.handle(arrival, now_s)
            if self._control.socket in ready:
                self._control.serve()
            if worker_fd in ready or self._worker.busy:
                decided = self._worker.collect()
                if decided is not None:
                    self.apply(decided, now_s)
            if now_s >= decide_at:
                if not self._worker.busy:
                    self._worker.submit(list(self.registry.summaries(now_s)))
                decide_at = max(decide_at + interval_s, now_s + interval_s / 2)
            if now_s - swept_s >= _SWEEP_S:
                self._sweep(now_s, now_s - swept_s)
                swept_s = now_s

    def _introduce(self, arrival: Arrival, hello: Hello, now_s: float) -> None:
        known = self.registry.hosts.get(arrival.host)
        before = (known.hello.group, known.hello.levels) if known is not None and not known.lost else None
        host = self.registry.hello(arrival.host, arrival.peer, hello, now_s)
        if host is None:
            self._link.send([arrival.peer], Refused(reason=f"levels = {hello.levels}; K must be 2 to 8"))
            return
        if before != (hello.group, hello.levels):
            log.info(
                "host %s joined group %s: K = %d, %s, %s",
                host.name,
                hello.group,
                hello.levels,
                hello.backend,
                hello.queues,
            )
        self._tell([host], now_s)

    def _enforce(self, summary: GroupSummary, decision: Decision, now_s: float) -> None:
        assert decision.thresholds is not None
        reported = [host.epoch for host in self.registry.hosts.values()]
        self._epoch = next_epoch(self._epoch, reported, int(time.time() * 1000))
        in_force = InForce(decision.thresholds, self._epoch, decision.reason, time.time())
        self.registry.groups[summary.group].in_force[summary.levels] = in_force
        hosts = self.registry.members(summary.group, summary.levels)
        log.info(
            "group %s, K = %d: thresholds %s to %d hosts, epoch %d (%s)",
            summary.group,
            summary.levels,
            list(decision.thresholds.bytes),
            len(hosts),
            self._epoch,
            decision.reason,
        )
        self._log.write(summary, in_force)
        self._tell(hosts, now_s)

    def _tell(self, hosts: list[Host], now_s: float) -> None:
        """Send hosts of one group and K the policy in force there, or that central is there."""
        in_force = self.registry.groups[hosts[0].hello.group].in_force.get(hosts[0].hello.levels) if hosts else None
        message: Policy | Ack = Ack(epoch=0)
        if in_force is not None:
            message = Policy(
                epoch=in_force.epoch,
                thresholds=list(in_force.thresholds.bytes),
                expiry_s=self._config.policy.expiry_s,
                reason=in_force.reason[:256],
            )
        self._link.send([host.peer for host in hosts], message)
        for host in hosts:
            host.told_s = now_s

    def _sweep(self, now_s: float, elapsed_s: float) -> None:
        self._plans.step(now_s)
        lost = [host.name for host in self.registry.sweep(now_s)]
        if lost:
            names = ", ".join(lost[:_MAX_NAMES]) + (" ..." if len(lost) > _MAX_NAMES else "")
            log.warning("lost %d host(s), which go on with their last policy: %s", len(lost), names)
        self._reports_per_s += 0.2 * (self._reports / elapsed_s - self._reports_per_s)
        self._reports = 0
        notify.watchdog()

    def _group_status(self, summary: GroupSummary, now_s: float) -> dict[str, Any]:
        group = self.registry.groups[summary.group]
        in_force = group.in_force.get(summary.levels)
        hosts = self.registry.members(summary.group, summary.levels)
        return {
            "name": summary.group,
            "levels": summary.levels,
            "hosts": summary.hosts,
            "applied": sum(host.epoch == in_force.epoch for host in hosts) if in_force else 0,
            "thresholds": list(in_force.thresholds.bytes) if in_force else None,
            "epoch": in_force.epoch if in_force else 0,
            "reason": in_force.reason if in_force else "",
            "last_decision": group.verdict.get(summary.levels, ""),
            "since": round(in_force.since, 3) if in_force else None,
            "flows": round(summary.flows, 1),
            "load": round(summary.load, 4),
            "size_p50_bytes": _number(summary.sizes.quantile(0.5)),
            "size_p99_bytes": _number(summary.sizes.quantile(0.99)),
            "duration_p50_us": _number(group.durations.quantile(0.5, now_s)),
            "duration_p99_us": _number(group.durations.quantile(0.99, now_s)),
        }


def next_epoch(last: int, reported: Iterable[int], now_ms: int) -> int:
    """The epoch of a new policy: Unix milliseconds, but always above what was given out or reported before.

    A reported epoch more than a day ahead of the clock is no epoch of ours and is not followed, so that no host can
    drive the count to its end.
    """
    ours = (epoch for epoch in reported if epoch < now_ms + _MS_PER_DAY)
    return max(now_ms, last + 1, max(ours, default=0) + 1)


def _host_status(host: Host, now_s: float) -> dict[str, Any]:
    return {
        "name": host.name,
        "group": host.hello.group,
        "state": "lost" if host.lost else "up",
        "seen_s": round(now_s - host.seen_s, 2),
        "levels": host.hello.levels,
        "backend": host.hello.backend,
        "queues": host.hello.queues,
        "version": host.hello.version,
        "epoch": host.epoch,
        "link_rate_bps": host.hello.link_rate_bps,
        "sent_bps": round(host.sent_bps),
        "reports": host.reports,
        "missed": host.missed,
        "restarts": host.restarts,
        "active": host.active,
        "long": host.long,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else round(value, 1)
