"""Where central takes planning requests from the link; planning itself is another process.

Logic: only keys named in `central.planners` may ask. A request is larger than a message, so it comes in parts, which
are put together per connection; whole requests wait in a short queue; one at a time is handed, as a file, to a process
of its own (`python -m central.planner.serve`), whose answer, again a file, goes back in parts. The daemon's loop never
waits for any of it: `take` and `step` only copy bytes and look whether the process has ended.
"""

import logging
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

from central.planner.announced import Announced
from central.planner.request import MOST_SECONDS, PlanOutcome, pack, parts_of
from fabricpilot.wire import Message, Migrations, PlanAnswer, PlanPart, Refused

log = logging.getLogger(__name__)

MAX_WAITING = 4  # whole requests
MAX_COLLECTING = 8  # clients that are sending theirs
PART_TIMEOUT_S = 30.0  # from part to part
START_S = 30.0  # that the process may take beside planning: it loads libraries, and the first one compiles kernels

Send = Callable[[Iterable[bytes], Message], int]


@dataclass
class _Coming:
    ticket: str
    parts: int
    seen_s: float
    data: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class _Request:
    peer: bytes
    client: str
    ticket: str
    data: bytes


@dataclass(frozen=True)
class _Running:
    request: _Request
    process: subprocess.Popen[bytes]
    answer: IO[bytes]
    until_s: float


class PlanDesk:
    """Planning requests of all clients.

    Args:
        clients: names of the keys that may ask.
        send: the link's.
        announced: told of running migrations.
    """

    def __init__(self, clients: Iterable[str], send: Send, announced: Announced) -> None:
        self._clients = frozenset(clients)
        self._send = send
        self._announced = announced
        self._coming: dict[bytes, _Coming] = {}
        self._waiting: deque[_Request] = deque()
        self._running: _Running | None = None
        self.counters = dict.fromkeys(("requests", "answered", "refused", "failed"), 0)

    def take(self, peer: bytes, message: PlanPart | Migrations, now_s: float) -> None:
        """Act on one message of a client."""
        if message.host not in self._clients:
            self.counters["refused"] += 1
            why = f"key '{message.host[:64]}' may not plan; name it in central.planners"
            if isinstance(message, PlanPart):
                self._answer(peer, message.ticket, PlanOutcome(error=why, exit_code=1))
            else:
                self._send([peer], Refused(reason=why))
        elif isinstance(message, Migrations):
            self._announce(peer, message, now_s)
        else:
            self._collect(peer, message, now_s)

    def step(self, now_s: float) -> None:
        """Look after the process and the queue; call it now and then."""
        for peer in [peer for peer, coming in self._coming.items() if now_s - coming.seen_s > PART_TIMEOUT_S]:
            del self._coming[peer]
        if self._running is not None:
            self._look(self._running, now_s)
        if self._running is None and self._waiting:
            self._start(self._waiting.popleft(), now_s)

    def status(self, now_s: float) -> dict[str, Any]:
        """For `central status`."""
        return {
            **self.counters,
            "waiting": len(self._waiting),
            "running": self._running.request.client if self._running else None,
            "announced": self._announced.plans(now_s),
        }

    def close(self) -> None:
        """End the process, if there is one. Idempotent."""
        if self._running is not None:
            self._running.process.kill()
            self._running.process.wait()
            self._running.answer.close()
            self._running = None

    def _announce(self, peer: bytes, message: Migrations, now_s: float) -> None:
        if not self._announced.tell(message, now_s):
            self._send([peer], Refused(reason="too many plans are announced already; end some of them"))
            return
        what = f"{len(message.flows)} migrations for {message.ttl_s:g} s" if message.flows else "it has ended"
        log.info("plan %s of %s: %s", message.plan, message.host, what)

    def _collect(self, peer: bytes, message: PlanPart, now_s: float) -> None:
        coming = self._coming.get(peer)
        if message.part == 0:
            if peer not in self._coming and len(self._coming) >= MAX_COLLECTING:
                self._refuse(peer, message.ticket, "too many planning requests are coming in; try again in a minute")
                return
            coming = self._coming[peer] = _Coming(message.ticket, message.parts, now_s)
        if coming is None or (message.ticket, message.part) != (coming.ticket, len(coming.data)):
            return  # a part of something that was refused or given up
        coming.data.append(message.data)
        coming.seen_s = now_s
        if len(coming.data) < coming.parts:
            return
        del self._coming[peer]
        if len(self._waiting) >= MAX_WAITING:
            self._refuse(peer, message.ticket, f"{len(self._waiting)} planning requests are waiting; try again later")
            return
        self.counters["requests"] += 1
        self._waiting.append(_Request(peer, message.host, message.ticket, b"".join(coming.data)))
        self.step(now_s)

    def _start(self, request: _Request, now_s: float) -> None:
        answer = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        with tempfile.TemporaryFile() as asked:
            asked.write(request.data)
            asked.seek(0)
            command = [sys.executable, "-m", "central.planner.serve"]
            process = subprocess.Popen(command, stdin=asked, stdout=answer, stderr=subprocess.DEVNULL)
        log.info("planning for %s (process %d)", request.client, process.pid)
        self._running = _Running(request, process, answer, now_s + MOST_SECONDS + START_S)

    def _look(self, running: _Running, now_s: float) -> None:
        """Send the answer if the process has ended, end it if it takes too long."""
        code = running.process.poll()
        if code is None and now_s < running.until_s:
            return
        request = running.request
        if code == 0:
            with running.answer as file:
                file.seek(0)
                self._reply(request.peer, request.ticket, file.read())
            self.counters["answered"] += 1
        else:
            why = f"took more than {MOST_SECONDS + START_S:g} s" if code is None else f"ended with status {code}"
            log.error("planning for %s failed: the process %s", request.client, why)
            self.counters["failed"] += 1
            self.close()
            self._answer(request.peer, request.ticket, PlanOutcome(error=f"central's planner {why}", exit_code=1))
        self._running = None

    def _refuse(self, peer: bytes, ticket: str, why: str) -> None:
        self.counters["refused"] += 1
        self._answer(peer, ticket, PlanOutcome(error=why, exit_code=1))

    def _answer(self, peer: bytes, ticket: str, outcome: PlanOutcome) -> None:
        self._reply(peer, ticket, pack(outcome))

    def _reply(self, peer: bytes, ticket: str, raw: bytes) -> None:
        parts = parts_of(raw)
        for number, data in enumerate(parts):
            self._send([peer], PlanAnswer(ticket=ticket, part=number, parts=len(parts), data=data))
