"""The host's end of the link to central: a ZeroMQ DEALER that never holds up the agent.

Where it sits: the agent's loop polls `socket`, calls `receive` when it is readable, and `send`s a report every
interval. Nothing here blocks; what cannot be sent now is dropped and counted, since the next report supersedes it.

Logic: a connection's life is told by ZeroMQ's socket monitor. When it is up, Hello goes first. When it is lost or
refused, the next attempt is made at a random time in (0, min(cap, base * 2^n)) seconds ("full jitter"), so that
thousands of hosts do not return at once to a central that restarts. The attempts are ours, because ZeroMQ's own have
no jitter with a growing interval, and end for good when central refuses a key (which may be added to central later).
`send` and `receive` drive all of this; there is no thread.

No routing id is set: central knows a host by its key alone (docs/link.md says why).
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from fabricpilot.client_socket import Named, prepare
from fabricpilot.config import LinkSection
from fabricpilot.endpoints import split_endpoint
from fabricpilot.errors import UsageError
from fabricpilot.keys import check_host_name
from fabricpilot.wire import (
    Ack,
    FromCentral,
    Hello,
    Identify,
    Message,
    Policy,
    Refused,
    decode_from_central,
    encode,
)

log = logging.getLogger(__name__)

_SEND_QUEUE = 8  # messages; old reports are worth nothing, so the queue is short
_RECEIVE_QUEUE = 64
_MAX_PER_CALL = 256  # messages in one `receive`, so that a flood from central cannot hold up the agent

_RETRY_BASE_S = 1.0
_RETRY_CAP_S = 5.0
_RETRY_LEAST_S = 0.02  # lets the last events of the old connection arrive before the new one begins
_ATTEMPT_S = 15.0  # an attempt without any event for so long (an unresolvable name) is begun again

_CONNECT_TIMEOUT_MS = 5_000
_HANDSHAKE_TIMEOUT_MS = 10_000
_DEAD_PEER_MS = 20_000  # unacknowledged for so long: central's machine is gone, not just its daemon

_LOST: dict[int, str] = {
    zmq.EVENT_DISCONNECTED: "the connection was lost",
    zmq.EVENT_CLOSED: "central cannot be reached",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "central did not finish the handshake; is link.central_key its public key?",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "central speaks another protocol; is one end insecure and the other not?",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "central does not know this host's key; is it in its authorized_keys?",
}
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | sum(_LOST)


class HostLink:
    """The connection to central.

    Args:
        section: `[link]` of the configuration; `endpoint` must be set.
        host_name: this host's name, which is also the name of its key file at central.
        hello: makes the message that introduces this host, afresh for every connection.

    Attributes:
        socket: for a `zmq.Poller`; call `receive` when it is readable.
        monitor: the same, for what happens to the connection. Without it in the poller a new connection is noticed, and
            Hello sent, at the next `send` or `receive`.
        connected: the handshake with central is done and the connection has not been lost since.
        follows_long_flows: central wants to be told at once when a flow becomes long.
        trouble: why it is not connected, in words; empty when it is.
        counters: sent, dropped, received, malformed, refused, connects, losses; they only grow.

    Raises:
        UsageError: no such endpoint or key file, or an insecure link over a network.
    """

    def __init__(
        self,
        section: LinkSection,
        host_name: str,
        hello: Callable[[], Hello],
        *,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        split_endpoint(section.endpoint, "link.endpoint")
        check_host_name(host_name)
        self.endpoint = section.endpoint
        self.connected = False
        self.follows_long_flows = False
        self.trouble = "not connected yet"
        self.counters = dict.fromkeys(("sent", "dropped", "received", "malformed", "refused", "connects", "losses"), 0)
        self._hello = hello
        self._context = context or zmq.Context.instance()
        self._attempts = 0
        self._retry_at = 0.0  # monotonic seconds; when to begin the next attempt
        self._heard_at: float | None = None
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        try:
            self._configure(section)
            self.monitor = self.socket.get_monitor_socket(_EVENTS)
            self._attempt()
        except BaseException:
            self.socket.close()
            raise

    @property
    def silent_s(self) -> float | None:
        """Seconds since central last said anything valid; None if it never did."""
        return None if self._heard_at is None else time.monotonic() - self._heard_at

    def send(self, message: Message) -> bool:
        """Send one message now or drop it; True if it is on its way. Never blocks."""
        self._follow()
        return self._send(message)

    def receive(self) -> list[FromCentral]:
        """Everything central said that the agent has to act on (Policy, Refused), oldest first. Never blocks."""
        self._follow()
        heard: list[FromCentral] = []
        for _ in range(_MAX_PER_CALL):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            message = decode_from_central(frames[0]) if len(frames) == 1 else None
            if message is None:
                self.counters["malformed"] += 1
                continue
            self.counters["received"] += 1
            self._heard_at = time.monotonic()
            if isinstance(message, Ack | Policy):
                self.follows_long_flows = message.follows_long_flows
            if isinstance(message, Identify):
                self._send(self._hello())
            elif not isinstance(message, Ack):
                self.counters["refused"] += isinstance(message, Refused)
                heard.append(message)
        return heard

    def close(self) -> None:
        """Close the connection; what waits to be sent is dropped. Idempotent."""
        if not self.socket.closed:
            self.connected = False
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
            self.socket.close(linger=0)

    def _configure(self, section: LinkSection) -> None:
        options = self.socket
        options.linger = 0
        options.sndhwm, options.rcvhwm = _SEND_QUEUE, _RECEIVE_QUEUE
        options.immediate = True  # nothing is queued for a connection that is not there
        options.reconnect_ivl = -1  # the attempts are ours
        options.connect_timeout, options.handshake_ivl = _CONNECT_TIMEOUT_MS, _HANDSHAKE_TIMEOUT_MS
        options.tcp_maxrt = _DEAD_PEER_MS
        prepare(options, section, Named("link.endpoint", "link.key", "link.central_key"))

    def _attempt(self) -> None:
        """Begin a connection in place of the one before."""
        if self._attempts:
            try:
                self.socket.disconnect(self.endpoint)
            except zmq.ZMQError as error:
                if error.errno not in (errno.ENOENT, zmq.ENOTCONN):  # it may have gone by itself
                    raise
        try:
            self.socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise UsageError(f"link.endpoint = '{self.endpoint}': {error.strerror}") from error
        self._attempts += 1
        self._retry_at = time.monotonic() + _ATTEMPT_S

    def _follow(self) -> None:
        """Catch up with what happened to the connection, and begin the next one when it is time."""
        while True:
            try:
                event = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                break
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected()
            else:
                self._lost(_LOST[event])
        if not self.connected and time.monotonic() >= self._retry_at:
            self._attempt()

    def _connected(self) -> None:
        self.connected, self.trouble = True, ""
        self._attempts = 1
        self.counters["connects"] += 1
        log.info("connected to central at %s", self.endpoint)
        self._send(self._hello())

    def _lost(self, why: str) -> None:
        if self.connected:
            self.counters["losses"] += 1
        if self.trouble != why and not (self.trouble and why == _LOST[zmq.EVENT_DISCONNECTED]):
            # Every attempt of an outage ends alike: one line for the first.
            log.warning("no link to central at %s: %s; the host goes on with its last policy", self.endpoint, why)
            self.trouble = why
        self.connected = False
        longest_s = min(_RETRY_CAP_S, _RETRY_BASE_S * 2 ** min(self._attempts - 1, 10))
        self._retry_at = time.monotonic() + random.uniform(_RETRY_LEAST_S, longest_s)

    def _send(self, message: Message) -> bool:
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.counters["dropped"] += 1
            return False
        self.counters["sent"] += 1
        return True
