"""A process beside the daemon for what takes time or may fail: the policy scheme in one, the learner in another.

The daemon `submit`s a question, goes on serving its sockets, and `collect`s the answer when `fileno` becomes readable.
Neither waits: questions are written by a thread, as a worker that still loads its libraries does not read. A worker
that dies or takes too long is replaced at the next question; hosts keep meanwhile what they have. When the daemon ends,
however it ends, its end of the pipe closes and the worker leaves.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Generic, Protocol, TypeVar

from fabricpilot.options import start_logging

log = logging.getLogger(__name__)

MAX_SECONDS = 60.0  # for one answer; the first one also loads the libraries
MAX_REST_S = 300.0  # a worker that dies again and again is started so seldom at last
_FIRST_REST_S = 1.0  # after the second death without an answer in between; doubles with each further one

AskedT = TypeVar("AskedT")
AnswerT = TypeVar("AnswerT")
AskedC = TypeVar("AskedC", contravariant=True)
AnswerC = TypeVar("AnswerC", covariant=True)


def one_blas_thread() -> None:
    """Where matrices are small, threads of BLAS would only wait for each other; call before numpy is loaded."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Service(Protocol[AskedC, AnswerC]):
    """What runs in a worker."""

    def answer(self, asked: AskedC, /) -> AnswerC:
        """The answer to one question."""

    def close(self) -> None:
        """The last call, when the daemon ends in good order."""


@dataclass(frozen=True)
class Answered(Generic[AskedT, AnswerT]):
    """A question, its answer and the time the service itself took."""

    asked: AskedT
    answer: AnswerT
    seconds: float


class Worker(Generic[AskedT, AnswerT]):
    """A service in a process of its own.

    Args:
        name: of the service, for the log.
        build: makes the service, in the new process; a function that pickles.
    """

    def __init__(self, name: str, build: Callable[[], Service[AskedT, AnswerT]]) -> None:
        self.name = name
        self.restarts = 0
        self._build = build
        self._asked: AskedT | None = None
        self._asked_at = 0.0
        self._running: tuple[BaseProcess, Connection] | None = None
        self._deaths = 0  # since the last answer
        self._rest_until = 0.0
        self._start()

    @property
    def busy(self) -> bool:
        """Whether it takes no question now: one is open, or it has died too often to be started again already."""
        return self._asked is not None or (self._running is None and time.monotonic() < self._rest_until)

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._running[0].pid if self._running else None

    def fileno(self) -> int:
        """Readable when the answer is there or the worker has died; -1 while there is no worker."""
        return self._running[1].fileno() if self._running else -1

    def submit(self, asked: AskedT) -> None:
        """Ask; no question must be open. Starts a worker if the one before has died."""
        if self._running is None:
            self.restarts += 1
            self._start()
        assert self._running is not None
        self._asked, self._asked_at = asked, time.monotonic()
        threading.Thread(target=_send, args=(self._running[1], asked), daemon=True).start()

    def collect(self) -> Answered[AskedT, AnswerT] | None:
        """The answer if it is there. Gives a worker up that died or takes too long."""
        if self._running is None:
            return None
        pipe = self._running[1]
        try:
            if not pipe.poll():
                if self._asked is not None and time.monotonic() - self._asked_at > MAX_SECONDS:
                    self._drop(f"no answer within {MAX_SECONDS:g} s")
                return None
            answer, seconds = pipe.recv()
        except (EOFError, OSError):
            self._drop("it died")
            return None
        except (pickle.UnpicklingError, ImportError, AttributeError, TypeError, ValueError) as error:
            self._drop(f"its answer is none: {error}")
            return None
        asked, self._asked = self._asked, None
        self._deaths = 0
        return Answered(asked, answer, seconds) if asked is not None else None

    def close(self, grace_s: float = 0.0) -> None:
        """End the process: at once, or after its service had `grace_s` seconds to close. Idempotent."""
        if self._running is not None:
            process, pipe = self._running
            self._running = self._asked = None
            pipe.close()
            if grace_s:
                process.join(grace_s)
            process.kill()
            process.join()
            process.close()

    def _start(self) -> None:
        one_blas_thread()
        # spawn: a fork would share ZeroMQ's threads and sockets.
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        process = context.Process(target=_serve, args=(far, self._build), name=f"fabricpilot-{self.name}", daemon=True)
        process.start()
        far.close()
        self._running = (process, near)

    def _drop(self, why: str) -> None:
        """Without a worker until the next question that it may be started for."""
        rest_s = min(MAX_REST_S, _FIRST_REST_S * 2.0 ** min(self._deaths - 1, 16)) if self._deaths else 0.0
        self._deaths += 1
        self._rest_until = time.monotonic() + rest_s
        log.error(
            "%s worker dropped: %s; hosts keep what they have, another is started in %.0f s or later",
            self.name,
            why,
            rest_s,
        )
        self.close()


def _send(pipe: Connection, asked: object) -> None:
    """Write a question, as soon as there is room; `collect` finds out if the worker has gone."""
    with contextlib.suppress(OSError, TypeError):  # TypeError: the pipe was closed while this waited
        pipe.send(asked)


def _serve(pipe: Connection, build: Callable[[], Service[AskedT, AnswerT]]) -> None:
    """The worker process: answer whatever comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon ends us
    start_logging()
    service = build()
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            service.close()
            return
        begin = time.perf_counter()
        answer = service.answer(asked)
        try:
            pipe.send((answer, time.perf_counter() - begin))
        except OSError:
            service.close()
            return
