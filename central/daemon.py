"""Central's loop: listen to all hosts, decide every few seconds, tell those whom it concerns.

One thread and one poller over the link, its handshakes, the control socket, the workers and signals:

    Hello  -> registry -> the group's policy at once, if there is one
    Report -> registry, guard -> now and then the policy again (repairs what was lost, and shows that central lives)
    Report, LongFlows -> long-flow scheduler (another process) -> verdicts to the hosts, within milliseconds
    every policy.interval_s: summaries of all groups -> policy worker, learner worker (other processes)
    decisions, proposals -> steering (guards) -> enforcement -> new epochs to the hosts they are for

Hosts go on with what they have while central is away, and introduce themselves when it is back. What was promoted and
learned is kept in `central.state_dir`, if there is one.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from central.deciding import Deciding
from central.enforcement import Enforcement
from central.guard.memory import GuardMemory
from central.learning import Learned, Learning, Lesson, find_learner
from central.link import Arrival, CentralLink
from central.long_flows import LongFlowDesk, SchedulerWorker, start_scheduler
from central.planner.announced import Announced
from central.planner.desk import PlanDesk
from central.policy import policy_of
from central.policy.base import Decision, GroupSummary
from central.registry import Host, Registry
from central.snapshot import group_status, host_status
from central.steering import Steering
from central.threshold_log import ThresholdLog
from central.worker import Answered, Worker
from fabricpilot import __version__, notify
from fabricpilot.config import CentralConfig
from fabricpilot.control import ControlServer
from fabricpilot.errors import UsageError
from fabricpilot.stopping import StopSignal, stop_signal
from fabricpilot.wire import Hello, Identify, LongFlows, Refused, Report

log = logging.getLogger(__name__)

_SWEEP_S = 0.5  # how often lost hosts are looked for
_ADVANCE_S = 0.2  # how often trials are looked at
_DECISIONS_KEPT = 128  # for the quantiles of decision time in the status
_MAX_NAMES = 5  # of hosts in one log line
_LEARNER_GRACE_S = 10.0  # for its last checkpoint

PolicyWorker = Worker[list[GroupSummary], list[Decision]]
LearnerWorker = Worker[Lesson, Learned]


@dataclass(frozen=True)
class Workers:
    """The processes beside the daemon; learner and long-flow scheduler only if they are wanted."""

    policy: PolicyWorker
    learner: LearnerWorker | None
    long_flows: SchedulerWorker | None = None

    @classmethod
    def start(cls, config: CentralConfig) -> "Workers":
        """Start those that the configuration asks for.

        Raises:
            UsageError: the scheme or the learner does not exist; told here rather than by a worker that dies.
        """
        policy_of(config.policy)
        learner = None
        if config.policy.learn != "off":
            find_learner(config.policy.learner)
            learner = LearnerWorker("learner", partial(Learning, config.policy, state_folder(config)))
        scheduler = start_scheduler(config.long_flows)
        return cls(PolicyWorker("policy", partial(Deciding, config.policy)), learner, scheduler)

    def close(self) -> None:
        """End them; the learner may write a last checkpoint."""
        self.policy.close()
        if self.long_flows is not None:
            self.long_flows.close()
        if self.learner is not None:
            self.learner.close(_LEARNER_GRACE_S)


class Central:
    """The daemon on the controller.

    Args:
        config: everything it reads.
        link: already listening.
        control: already listening; its answer is set here.
        workers: already running.
    """

    def __init__(self, config: CentralConfig, link: CentralLink, control: ControlServer, workers: Workers) -> None:
        policy = config.policy
        self.registry = Registry(
            policy.window_s,
            config.central.host_timeout_s,
            policy.shared_rate,
            turns=config.long_flows.scheme == "in-turn",
        )
        self._enforcement = Enforcement(
            self.registry,
            link,
            ThresholdLog(config.central.threshold_log),
            policy.expiry_s,
            follows_long_flows=workers.long_flows is not None,
        )
        self.steering = Steering(config, self.registry, self._enforcement, GuardMemory(state_folder(config)))
        self._config = config
        self._link = link
        self._control = control
        self._workers = workers
        self._started_at = time.time()
        self._regroup_at = 0.0
        self._unidentified = 0
        self._decision_s: deque[float] = deque(maxlen=_DECISIONS_KEPT)
        self._learned: Answered[Lesson, Learned] | None = None
        self._reports = 0
        self._reports_per_s = 0.0
        self.announced = Announced()
        self._plans = PlanDesk(config.central.planners, link.send, self.announced)
        self._long_flows: LongFlowDesk | None = None
        if workers.long_flows is not None:
            self._long_flows = LongFlowDesk(config.long_flows, workers.long_flows, self.announced)
        control.answer = self.answer

    def run(self) -> None:
        """Run until SIGINT or SIGTERM."""
        policy = self._config.policy
        log.info(
            "central %s listens on %s, policy %s, learning %s",
            __version__,
            self._link.endpoint,
            policy.scheme,
            policy.learn,
        )
        with stop_signal() as stop:
            notify.ready()
            try:
                self._loop(stop)
            finally:
                self._plans.close()
                self.steering.write_down()
                notify.stopping()

    def handle(self, arrival: Arrival, now_s: float) -> None:
        """Act on one message from a host."""
        message = arrival.message
        if isinstance(message, Hello):
            self._introduce(arrival, message, now_s)
            return
        if isinstance(message, LongFlows):
            self._hear(self.registry.hosts.get(arrival.host), message, now_s)
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
        self._hear(host, message, now_s)
        if was_lost:
            log.info("host %s is back", host.name)
        self.steering.reported(host, message, now_s)

    def _hear(self, host: Host | None, message: Report | LongFlows, now_s: float) -> None:
        if self._long_flows is not None and host is not None:
            self._long_flows.hear(host, message, now_s)

    def apply(self, decided: Answered[list[GroupSummary], list[Decision]], now_s: float) -> None:
        """Put the scheme's decisions into force."""
        self._decision_s.append(decided.seconds)
        for summary, decision in zip(decided.asked, decided.answer, strict=True):
            self.steering.decide(summary, decision, now_s)

    def consider(self, learned: Answered[Lesson, Learned], now_s: float) -> None:
        """Hand the learner's proposals to the guards."""
        self._learned = learned
        for summary, proposal in zip(learned.asked.asked, learned.answer.proposals, strict=True):
            self.steering.propose(summary, proposal, now_s)

    def answer(self, request: str) -> dict[str, Any]:
        """The answer to a control request: `status`, or `guard MODE`."""
        what, _, mode = request.partition(" ")
        if what == "guard" and mode:
            self.steering.switch(mode, time.monotonic())
        elif what not in ("status", "guard"):
            raise UsageError(f"control request '{request[:64]}' is unknown; ask for status or guard")
        return self.status()

    def status(self) -> dict[str, Any]:
        """What `fabricpilot central status` shows."""
        now_s = time.monotonic()
        hosts = sorted(self.registry.hosts.values(), key=lambda host: host.name)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started_at, 1),
            "endpoint": self._link.endpoint,
            "insecure": self._config.link.insecure,
            "scheme": self._config.policy.scheme,
            "objective": self._config.policy.objective,
            "guard_mode": self.steering.mode,
            "epoch": self._enforcement.epoch,
            "reports_per_s": round(self._reports_per_s, 1),
            "decision_s": _quantiles(self._decision_s),
            "worker_restarts": self._workers.policy.restarts,
            "learner": self._learner_status(),
            "long_flows": self._long_flows.status() if self._long_flows is not None else {"scheme": "off"},
            "link": {**self._link.counters, "unidentified": self._unidentified, "handshakes": self._link.handshakes},
            "plans": self._plans.status(now_s),
            "groups": [
                group_status(self.registry, self.steering, summary, now_s) for summary in self.registry.summaries(now_s)
            ],
            "hosts": [host_status(self.registry, host, now_s) for host in hosts],
        }

    def _loop(self, stop: StopSignal) -> None:
        poller = zmq.Poller()
        for readable in (*self._link.sockets, self._control.socket, stop.wake):
            poller.register(readable, zmq.POLLIN)
        interval_s = self._config.policy.interval_s
        swept_s = advanced_s = time.monotonic()
        decide_at = swept_s + interval_s
        watched: list[int] = []
        while not stop.asked:
            watched = self._watch_workers(poller, watched)
            due = min(decide_at, swept_s + _SWEEP_S, advanced_s + _ADVANCE_S)
            ready = dict(poller.poll(max(0, int((due - time.monotonic()) * 1000) + 1)))
            now_s = time.monotonic()
            for arrival in self._link.receive():
                self.handle(arrival, now_s)
            if self._control.socket in ready:
                self._control.serve()
            self._collect(self._workers.policy, self.apply, now_s)
            if self._workers.learner is not None:
                self._collect(self._workers.learner, self.consider, now_s)
            if self._long_flows is not None:
                self._long_flows.step(now_s, self._send_verdicts)
            if now_s >= decide_at:
                self._ask(now_s)
                decide_at = max(decide_at + interval_s, now_s + interval_s / 2)
            if now_s - advanced_s >= _ADVANCE_S:
                self.steering.advance(now_s)
                advanced_s = now_s
            if now_s - swept_s >= _SWEEP_S:
                self._sweep(now_s, now_s - swept_s)
                swept_s = now_s

    def _watch_workers(self, poller: zmq.Poller, watched: Sequence[int]) -> list[int]:
        """Have the poller wake for the workers there are now: a worker may have been replaced, or have gone."""
        workers = [self._workers.policy, self._workers.learner, self._workers.long_flows]
        present = [worker.fileno() for worker in workers if worker is not None and worker.fileno() >= 0]
        if present != watched:
            for descriptor in watched:
                poller.unregister(descriptor)
            for descriptor in present:
                poller.register(descriptor, zmq.POLLIN)
        return present

    def _ask(self, now_s: float) -> None:
        """A new round for the workers that are done with the one before."""
        if self._config.policy.groups == "clustered" and now_s >= self._regroup_at:
            self.steering.regroup(now_s)
            self._regroup_at = now_s + self._config.policy.window_s / 2
        summaries = list(self.registry.summaries(now_s))
        if not self._workers.policy.busy:
            self._workers.policy.submit(self.steering.questions(summaries))
        self.steering.recheck(summaries, now_s)
        if self._workers.learner is not None and not self._workers.learner.busy:
            self._workers.learner.submit(self.steering.lesson(summaries, now_s))

    def _collect(
        self, worker: Worker[Any, Any], use: Callable[[Answered[Any, Any], float], None], now_s: float
    ) -> None:
        answered = worker.collect()
        if answered is not None:
            use(answered, now_s)

    def _send_verdicts(self, name: str, frame: bytes) -> None:
        host = self.registry.hosts.get(name)
        if host is not None and not host.lost:
            self._link.send_frame([host.peer], frame)

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
        self.steering.joined(host, now_s)

    def _sweep(self, now_s: float, elapsed_s: float) -> None:
        self._plans.step(now_s)
        lost = [host.name for host in self.registry.sweep(now_s)]
        if lost:
            names = ", ".join(lost[:_MAX_NAMES]) + (" ..." if len(lost) > _MAX_NAMES else "")
            log.warning("lost %d host(s), which go on with their last policy: %s", len(lost), names)
        self._reports_per_s += 0.2 * (self._reports / elapsed_s - self._reports_per_s)
        self._reports = 0
        notify.watchdog()

    def _learner_status(self) -> dict[str, Any]:
        worker, last = self._workers.learner, self._learned
        told: dict[str, Any] = {"mode": self._config.policy.learn}
        if worker is None:
            return told
        stats = last.answer.stats if last else None
        return told | {
            "name": self._config.policy.learner,
            "running": worker.pid is not None,
            "restarts": worker.restarts,
            "round_s": round(last.seconds, 6) if last else None,
            "failures": last.answer.failures if last else 0,
            "checkpoint_age_s": last.answer.checkpoint_age_s if last else None,
            "transitions": stats.transitions if stats else 0,
            "updates": stats.updates if stats else 0,
            "reward": stats.reward if stats else None,
            "noise": stats.noise if stats else None,
        }


def state_folder(config: CentralConfig) -> Path | None:
    """The folder that outlives a restart, made if it is missing; None: nothing is kept.

    Raises:
        UsageError: it cannot be made or written.
    """
    if not config.central.state_dir:
        return None
    folder = Path(config.central.state_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"cannot make {folder} (central.state_dir): {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write in {folder} (central.state_dir); give a folder of the daemon's own")
    return folder


def _quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Last, middle and longest."""
    if not seconds:
        return {"last": None, "p50": None, "max": None}
    times = sorted(seconds)
    return {
        "last": round(seconds[-1], 6),
        "p50": round(times[len(times) // 2], 6),
        "max": round(times[-1], 6),
    }
