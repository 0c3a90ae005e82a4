"""The daemon's side of long-flow scheduling: hands what hosts say to the scheduler's process, and its verdicts to them.

    LongFlows, Report --hear--> waiting --step--> process (lrla/process.py) --step--> Verdicts, encoded

At most one round is under way; what is heard meanwhile waits for the next, with a bound, and what finds no room is
counted: the next report has it again. A process that dies or hangs is replaced (worker.py); flows keep their verdicts
until those end, and the reports fill its table again.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from central.lrla.process import Answer, Round, Scheduler
from central.lrla.table import HostFlows
from central.lrla.weights import deployable
from central.planner.announced import Announced
from central.registry import Host
from central.worker import Worker
from fabricpilot.config import LongFlowsSection
from fabricpilot.errors import UsageError
from fabricpilot.wire import LongFlows, Report

SchedulerWorker = Worker[Round, Answer]

_MAX_WAITING: Final = 4096  # messages; some seconds of a thousand hosts
_KEPT: Final = 1024  # rounds, for the quantiles in the status


def start_scheduler(section: LongFlowsSection) -> SchedulerWorker | None:
    """The process; None if nobody is to schedule long flows.

    Raises:
        UsageError: there are no such weights, or they are not for a running central; told here rather than by a process
            that dies.
    """
    if section.scheme == "off":
        return None
    if section.weights:
        try:
            deployable(Path(section.weights))
        except UsageError as error:
            raise UsageError(f"long_flows.weights: {error}") from None
    return SchedulerWorker("long-flow", partial(Scheduler, section))


class LongFlowDesk:
    """Between the link and the scheduler.

    Args:
        section: `[long_flows]`.
        worker: already running.
        announced: migrations of virtual machines; their flows get the lowest priority.
    """

    def __init__(self, section: LongFlowsSection, worker: SchedulerWorker, announced: Announced) -> None:
        self.dropped = 0
        self._section = section
        self._worker = worker
        self._announced = announced
        self._waiting: deque[HostFlows] = deque(maxlen=_MAX_WAITING)
        self._more = False  # verdicts wait to be renewed
        self._rounds: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # inference and whole round, ms
        self._flows = self._decided = 0

    def hear(self, host: Host, message: LongFlows | Report, now_s: float) -> None:
        """What a host says of its long flows."""
        if isinstance(message, Report):
            flows, ended, whole = message.long_flows, [], message.long <= len(message.long_flows)
        else:
            flows, ended, whole = message.flows, message.ended, False
        moving = []
        if self._announced.plans(now_s):
            moving = [n for n, flow in enumerate(flows) if self._announced.match(host.name, flow, now_s)]
        self.dropped += len(self._waiting) == _MAX_WAITING
        hello, routes = host.hello, host.usable_routes
        told = HostFlows(host.name, hello.levels, hello.link_rate_bps, routes, whole, flows, ended, moving)
        self._waiting.append(told)

    def step(self, now_s: float, send: Callable[[str, bytes], None]) -> None:
        """Send the verdicts that are there, by host's name; begin a round if something waits and none is under way."""
        answered = self._worker.collect()
        if answered is not None:
            answer = answered.answer
            self._flows, self._more = answer.flows, answer.more
            self._decided += answer.decided
            if answer.decided:
                self._rounds.append((answer.inference_ms, answer.round_ms))
            for name, frame in answer.frames:
                send(name, frame)
        if (self._waiting or self._more) and not self._worker.busy:
            self._worker.submit(Round(now_s, list(self._waiting)))
            self._waiting.clear()
            self._more = False

    def status(self) -> dict[str, Any]:
        """What `fabricpilot central status` shows."""
        inference, whole = (sorted(column) for column in zip(*self._rounds, strict=True)) if self._rounds else ([], [])
        return {
            "scheme": self._section.scheme,
            "flows": self._flows,
            "decided": self._decided,
            "inference_ms": _quantiles(inference),
            "round_ms": _quantiles(whole),
            "dropped": self.dropped,
            "restarts": self._worker.restarts,
        }


def _quantiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    return {"p50": round(values[len(values) // 2], 3), "p99": round(values[int(0.99 * (len(values) - 1))], 3)}
