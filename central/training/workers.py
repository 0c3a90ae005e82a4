"""Objects that work beside the learner: in this process, in processes of this machine, or on a Ray cluster.

All three look alike: one object per worker, `begin` calls a method of each with its own arguments, `collect` takes the
results in the order of the workers. Between the two the learner may learn. Results depend on the arguments alone, never
on who was first, so a run with the same seed is the same run on any of them.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from fabricpilot.errors import FabricpilotError, UsageError

Make = Callable[[int], Any]  # makes the object of worker 0, 1, ...; pickled to where it runs


class Workers(Protocol):
    """Objects that work side by side."""

    count: int

    def begin(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call `method` of every object, each with its own arguments."""

    def collect(self) -> list[Any]:
        """The results of the last `begin`, in the order of the workers."""

    def close(self) -> None:
        """End them."""


def start(make: Make, count: int, ray_address: str | None = None) -> Workers:
    """`count` objects made by `make`: on the Ray cluster at `ray_address`, else in processes; one works right here.

    Raises:
        UsageError: a count below 1, or Ray asked for but not installed or not reached.
    """
    if count < 1:
        raise UsageError(f"{count} workers; at least 1 is needed")
    if ray_address is not None:
        return RayWorkers(make, count, ray_address)
    return Here(make) if count == 1 else Processes(make, count)


class Here:
    """One object in this process; it works when the results are asked for."""

    def __init__(self, make: Make) -> None:
        self.count = 1
        self._object = make(0)
        self._asked: tuple[str, tuple[Any, ...]] = ("", ())

    def begin(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """As `Workers.begin`."""
        (only,) = arguments
        self._asked = (method, only)

    def collect(self) -> list[Any]:
        """As `Workers.collect`."""
        method, arguments = self._asked
        return [getattr(self._object, method)(*arguments)]

    def close(self) -> None:
        """Nothing to end."""


class Processes:
    """One process per object, with a pipe to each. They end with this one, however it ends."""

    def __init__(self, make: Make, count: int) -> None:
        self.count = count
        self._running: list[tuple[BaseProcess, Connection]] = []
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        for index in range(count):
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, make, index), name=f"worker-{index}", daemon=True)
            process.start()
            far.close()
            self._running.append((process, near))

    def begin(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """As `Workers.begin`."""
        for (_, pipe), one in zip(self._running, arguments, strict=True):
            pipe.send((method, one))

    def collect(self) -> list[Any]:
        """As `Workers.collect`.

        Raises:
            FabricpilotError: a worker failed or died.
        """
        answers = []
        for process, pipe in self._running:
            try:
                answers.append(pipe.recv())
            except (EOFError, OSError):
                raise FabricpilotError(f"{process.name} died; go on with --resume") from None
        for (process, _), (_, failure) in zip(self._running, answers, strict=True):
            if failure:
                raise FabricpilotError(f"{process.name} failed: {failure}")
        return [result for result, _ in answers]

    def close(self) -> None:
        """End the processes. Idempotent."""
        for process, pipe in self._running:
            pipe.close()
            process.join(2.0)
            process.kill()
            process.join()
        self._running = []


def _serve(pipe: Connection, make: Make, index: int) -> None:
    """A worker process: answer calls until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the learner ends us
    try:
        made, failure = make(index), ""
    except Exception:
        made, failure = None, traceback.format_exc(limit=-2)
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (None, failure) if failure else (getattr(made, method)(*arguments), "")
        except Exception:
            answer = (None, traceback.format_exc(limit=-2))
        try:
            pipe.send(answer)
        except OSError:
            return


class RayWorkers:
    """One Ray actor per object, wherever the cluster has room ("local": a cluster of this machine, ended with us)."""

    def __init__(self, make: Make, count: int, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--ray needs Ray; install the extra: pip install 'fabricpilot[scale]'") from None
        self.count = count
        self._ray = ray
        try:
            ray.init(address, log_to_driver=False, include_dashboard=False if address == "local" else None)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"no Ray cluster at '{address}': {error}") from None
        actor = ray.remote(num_cpus=1)(_Actor)
        self._actors = [actor.remote(make, index) for index in range(count)]
        self._pending: list[Any] = []

    def begin(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """As `Workers.begin`."""
        pairs = zip(self._actors, arguments, strict=True)
        self._pending = [actor.call.remote(method, *one) for actor, one in pairs]

    def collect(self) -> list[Any]:
        """As `Workers.collect`.

        Raises:
            FabricpilotError: an actor failed or its machine is gone.
        """
        try:
            return list(self._ray.get(self._pending))
        except self._ray.exceptions.RayError as error:
            raise FabricpilotError(f"a Ray worker failed: {error}") from None

    def close(self) -> None:
        """End the actors and leave the cluster."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


class _Actor:
    """What runs in a Ray actor."""

    def __init__(self, make: Make, index: int) -> None:
        self._object = make(index)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._object, method)(*arguments)
