"""`fabricpilot plan --central`: ask a central daemon, over the link the hosts use.

Logic: a DEALER with the client's own key connects, sends the request in parts and waits for the parts of the answer.
What becomes of the connection is read from ZeroMQ's monitor, so that a wrong key is told at once and not by a timeout.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from central.planner.desk import START_S
from central.planner.request import MOST_SECONDS, PlanOutcome, PlanRequest, pack, parts_of, unpack_outcome
from fabricpilot.client_socket import Named, prepare
from fabricpilot.config import LinkSection
from fabricpilot.endpoints import split_endpoint
from fabricpilot.errors import FabricpilotError
from fabricpilot.keys import check_host_name
from fabricpilot.wire import (
    Message,
    Migrations,
    PlanAnswer,
    PlanPart,
    Refused,
    decode_from_central,
    encode,
)

CONNECT_S = 10.0
_REFUSED_WAIT_S = 0.5  # for a refusal of an announcement; silence means that it was taken

_FAILED: dict[int, str] = {
    zmq.EVENT_CLOSED: "nobody listens there",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed; is --central-key its public key?",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "central speaks another protocol; is one end insecure and the other not?",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "central does not know this key; put its public file into link.authorized_keys",
}
_UP = zmq.EVENT_HANDSHAKE_SUCCEEDED


def ask(section: LinkSection, name: str, request: PlanRequest) -> PlanOutcome:
    """Send a request to the central at `section.endpoint` and wait for its answer; `name` is the key's.

    Raises:
        UsageError: no such endpoint or key, or a request too large for the link.
        FabricpilotError: central cannot be reached, refuses the key, or does not answer in time.
    """
    ticket = uuid.uuid4().hex
    parts = parts_of(pack(request))
    seconds = min(request.deadline_s, MOST_SECONDS)
    with _connected(section, name) as socket:
        for number, data in enumerate(parts):
            socket.send(encode(PlanPart(host=name, ticket=ticket, part=number, parts=len(parts), data=data)))
        found: list[bytes] = []
        # Others may be planned for first; what central itself allows for each is the most to wait for.
        end = time.monotonic() + seconds + 2 * (MOST_SECONDS + START_S)
        while True:
            message = _next(socket, end - time.monotonic())
            if message is None:
                raise FabricpilotError(f"central at {section.endpoint} did not answer in time; look at its log")
            if isinstance(message, Refused):
                raise FabricpilotError(f"central refuses: {message.reason}")
            if isinstance(message, PlanAnswer) and message.ticket == ticket and message.part == len(found):
                found.append(message.data)
                if len(found) == message.parts:
                    return unpack_outcome(b"".join(found))


def announce(section: LinkSection, message: Migrations) -> None:
    """Announce migrations, or their end.

    Raises:
        UsageError, FabricpilotError: as `ask`.
    """
    with _connected(section, message.host) as socket:
        socket.send(encode(message))
        answer = _next(socket, _REFUSED_WAIT_S)
    if isinstance(answer, Refused):
        raise FabricpilotError(f"central refuses: {answer.reason}")


def _next(socket: "zmq.Socket[bytes]", seconds: float) -> Message | None:
    """The next valid message; None when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        if not socket.poll(max(0, int(1000 * (end - time.monotonic())))):
            return None
        message = decode_from_central(socket.recv())
        if message is not None:
            return message


@contextmanager
def _connected(section: LinkSection, name: str) -> Iterator["zmq.Socket[bytes]"]:
    split_endpoint(section.endpoint, "--central")
    check_host_name(name)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.linger = 1000
        prepare(socket, section, Named("--central", "--key", "--central-key"))
        monitor = socket.get_monitor_socket(_UP | sum(_FAILED))
        try:
            socket.connect(section.endpoint)
            _await_handshake(monitor, section.endpoint)
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
        yield socket
    finally:
        socket.close()
        context.term()


def _await_handshake(monitor: "zmq.Socket[bytes]", endpoint: str) -> None:
    end = time.monotonic() + CONNECT_S
    why = f"no answer within {CONNECT_S:g} s"
    while monitor.poll(max(0, int(1000 * (end - time.monotonic())))):
        event = parse_monitor_message(monitor.recv_multipart())["event"]
        if event == _UP:
            return
        why = _FAILED[event]
        break
    raise FabricpilotError(f"cannot ask central at {endpoint}: {why}")
