"""The local control socket: how `agent status` and `central status` ask the daemon that runs.

A ZeroMQ ROUTER on a Unix socket in the daemon's run_dir, mode 0600, so only its own user (and root) can ask. Its
socket joins the daemon's poller; `serve` answers what waits and never blocks. A request is one word, an answer is one
JSON object. A lock beside the socket file makes one daemon per run_dir, and is released by the kernel however the
daemon ends, so that a stale socket file is nobody's problem.
"""

import fcntl
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import zmq

from fabricpilot.errors import FabricpilotError, UsageError

log = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 4096
_MAX_PATH_BYTES = 107  # sockaddr_un holds 108 with the final zero
_MAX_PER_CALL = 64  # answers in one `serve`, so that a flood of questions cannot hold up the daemon

Answer = Callable[[str], dict[str, Any]]


class ControlServer:
    """The daemon's end.

    Args:
        path: of the socket file; its folder is made if missing.
        answer: request -> answer; may be set later. A `FabricpilotError` it raises is told to who asked.

    Raises:
        UsageError: another daemon runs there, or the path is too long.
        FabricpilotError: the folder or the socket cannot be made.
    """

    def __init__(self, path: Path, answer: Answer | None = None, context: zmq.Context[Any] | None = None) -> None:
        self.path = path
        self.answer: Answer = answer or _not_ready
        self.malformed = 0
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise UsageError(f"control socket {path} is too long a path; choose a run_dir of fewer characters")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            self._lock = _lock(path.with_name(path.name + ".lock"), path)
        except OSError as error:
            raise FabricpilotError(f"cannot make control socket {path}: {error.strerror}; see run_dir") from error
        self.socket: zmq.Socket[bytes] = (context or zmq.Context.instance()).socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.maxmsgsize = _MAX_REQUEST_BYTES
        try:
            _bind_private(self.socket, path)
        except zmq.ZMQError as error:
            self.socket.close()
            os.close(self._lock)
            raise FabricpilotError(f"cannot listen on control socket {path}: {error.strerror}") from error

    def __enter__(self) -> "ControlServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def serve(self) -> None:
        """Answer everything that waits. Never blocks, never raises for what somebody sent."""
        for _ in range(_MAX_PER_CALL):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                self.malformed += 1
                continue
            try:
                self.socket.send_multipart([frames[0], self._reply(frames[1])], zmq.NOBLOCK)
            except zmq.ZMQError:  # who asked has left
                continue

    def close(self) -> None:
        """Stop answering and remove the socket file. Idempotent."""
        if self.socket.closed:
            return
        self.socket.close()
        self.path.unlink(missing_ok=True)
        os.close(self._lock)  # the lock file stays: unlinking it would let two daemons lock two files

    def _reply(self, request: bytes) -> bytes:
        try:
            return msgspec.json.encode(self.answer(request.decode("utf-8", "replace")))
        except FabricpilotError as error:
            return msgspec.json.encode({"error": str(error)})
        except Exception:
            # A question about the daemon must not end it; the traceback tells what to mend.
            log.exception("cannot answer control request %r", request[:64])
            return msgspec.json.encode({"error": "the daemon could not answer; its log says why"})


def ask(path: Path, request: str, timeout_s: float = 2.0) -> dict[str, Any]:
    """Ask the daemon that listens at `path`.

    Raises:
        FabricpilotError: nobody listens there, no answer within `timeout_s`, or the daemon could not answer.
    """
    _probe(path)
    with zmq.Context() as context, context.socket(zmq.DEALER) as asking:
        asking.linger = 0
        asking.connect(f"ipc://{path}")
        asking.send(request.encode())
        if not asking.poll(int(timeout_s * 1000)):
            raise FabricpilotError(f"the daemon at {path} did not answer within {timeout_s:g} s")
        try:
            answer = msgspec.json.decode(asking.recv(), type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FabricpilotError(f"what answers at {path} is no fabricpilot daemon") from error
    if "error" in answer:
        raise FabricpilotError(str(answer["error"]))
    return answer


def _probe(path: Path) -> None:
    """Raise the precise reason when nobody listens at `path`; ZeroMQ itself would silently wait."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except PermissionError as error:
            raise FabricpilotError(f"no right to ask the daemon at {path}; run as root or as its user") from error
        except OSError as error:
            raise FabricpilotError(
                f"no daemon answers at {path} ({error.strerror or error}); is it running, with this run_dir?"
            ) from error


def _lock(path: Path, socket_path: Path) -> int:
    """An exclusive lock on `path`, held until its descriptor is closed or the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"a daemon runs already with {socket_path}; stop it, or choose another run_dir") from None
    return descriptor


def _bind_private(server: "zmq.Socket[bytes]", path: Path) -> None:
    """Bind with mode 0600 from the first moment: the umask covers the time between bind and chmod."""
    before = os.umask(0o177)
    try:
        server.bind(f"ipc://{path}")
    finally:
        os.umask(before)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def _not_ready(request: str) -> dict[str, Any]:
    raise FabricpilotError("the daemon is still starting")
