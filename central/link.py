"""Central's end of the link: one ZeroMQ ROUTER that all hosts connect to.

Where it sits: the daemon polls `sockets`; `receive` hands it the valid messages, each with the name of the host it
came from and the peer to answer. Nothing a host sends can raise or block here; everything dropped has a counter.

A host is who its key says. Hosts set no routing id, so ZeroMQ gives every connection one of its own, and the daemon
answers the connection that a host spoke on last. Routing ids chosen by hosts would need ROUTER_HANDOVER, and with it
any authorised host could cut another one off by taking its id: docs/link.md shows it. A host that restarts simply
comes with a new connection.
"""

import logging
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import zmq

from central.authentication import ZAP_DOMAIN, AuthorizedKeys, ZapHandler
from fabricpilot.config import LinkSection
from fabricpilot.endpoints import check_insecure, split_endpoint
from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.keys import read_pair
from fabricpilot.wire import MAX_MESSAGE_BYTES, FromHost, Message, Refused, decode_from_host, encode

log = logging.getLogger(__name__)

_SEND_QUEUE = 16  # messages per host: a policy is superseded by the next
_RECEIVE_QUEUE = 64  # messages per host
_BACKLOG = 4096  # connections that may wait to be accepted, when all hosts return at once
_DEAD_PEER_MS = 30_000
_KEEPALIVE_S = 30  # so that connections of machines that vanished are closed
_MAX_PER_CALL = 1000  # messages in one `receive`, so that the daemon's loop turns over
_OTHER_FILES = 64  # descriptors the daemon needs besides one per host


@dataclass(frozen=True)
class Arrival:
    """One valid message: from which host, over which connection."""

    host: str
    peer: bytes
    message: FromHost


class CentralLink:
    """The socket all hosts connect to.

    Attributes:
        sockets: for the daemon's poller; call `receive` when one is readable.
        endpoint: where it listens, with the port that was chosen if it was `*`.
        counters: received, sent, malformed, refused, unreachable, dropped; they only grow.

    Raises:
        UsageError: no such endpoint, key file or folder, or an insecure link beyond loopback.
        FabricpilotError: the endpoint cannot be bound.
    """

    def __init__(self, section: LinkSection) -> None:
        split_endpoint(section.listen, "link.listen")
        self.counters = dict.fromkeys(("received", "sent", "malformed", "refused", "unreachable", "dropped"), 0)
        self._keys: AuthorizedKeys | None = None
        self._zap: ZapHandler | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # its own: a context has one ZAP handler
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        try:
            self._configure(section)
            try:
                self._socket.bind(section.listen)
            except zmq.ZMQError as error:
                raise FabricpilotError(
                    f"cannot listen on {section.listen} (link.listen): {error.strerror}; is another central running?"
                ) from error
            self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        except BaseException:
            self.close()
            raise
        _check_file_limit(len(self._keys) if self._keys is not None else 0)

    @property
    def sockets(self) -> list["zmq.Socket[bytes]"]:
        """The link's sockets: messages, and handshakes unless insecure."""
        return [self._socket, *([self._zap.socket] if self._zap else [])]

    @property
    def handshakes(self) -> dict[str, int]:
        """Handshakes accepted and denied so far."""
        return {"accepted": self._zap.accepted, "denied": self._zap.denied} if self._zap else {}

    def receive(self) -> list[Arrival]:
        """Answer waiting handshakes, then hand over waiting messages, oldest first. Never blocks."""
        if self._zap is not None:
            self._zap.serve()
        arrivals = []
        for _ in range(_MAX_PER_CALL):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            arrival = self._judge(frames)
            if arrival is not None:
                self.counters["received"] += 1
                arrivals.append(arrival)
        return arrivals

    def send(self, peers: Iterable[bytes], message: Message) -> int:
        """Send one message to each of the peers; returns to how many it is on its way. Never blocks."""
        return self.send_frame(peers, encode(message))

    def send_frame(self, peers: Iterable[bytes], frame: bytes) -> int:
        """As `send`, for a message that another process has encoded."""
        reached = 0
        for peer in peers:
            try:
                self._socket.send_multipart([peer, frame], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                # EAGAIN: the host does not read; it gets the policy again later. EHOSTUNREACH: it has gone.
                self.counters["dropped" if error.errno == zmq.EAGAIN else "unreachable"] += 1
            else:
                reached += 1
        self.counters["sent"] += reached
        return reached

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._socket.close(linger=0)
        if self._zap is not None:
            self._zap.close()
        self._context.term()

    def _configure(self, section: LinkSection) -> None:
        options = self._socket
        options.linger = 0
        options.router_mandatory = True
        options.sndhwm, options.rcvhwm = _SEND_QUEUE, _RECEIVE_QUEUE
        options.maxmsgsize = MAX_MESSAGE_BYTES
        options.backlog = _BACKLOG
        options.tcp_maxrt = _DEAD_PEER_MS
        options.tcp_keepalive, options.tcp_keepalive_idle, options.tcp_keepalive_intvl = 1, _KEEPALIVE_S, _KEEPALIVE_S
        options.ipv6 = "[" in section.listen
        if section.insecure:
            check_insecure(section.listen, "link.listen")
            return
        pair = read_pair(Path(section.key), "link.key")
        self._keys = AuthorizedKeys(Path(section.authorized_keys))
        if not len(self._keys):
            log.warning("no host may connect yet: %s holds no key files", section.authorized_keys)
        # Before the ROUTER listens: without a handler ZeroMQ would let every key in.
        self._zap = ZapHandler(self._context, self._keys)
        options.curve_server = True
        options.curve_publickey, options.curve_secretkey = pair.public, pair.secret
        options.zap_domain = ZAP_DOMAIN
        options.zap_enforce_domain = True

    def _judge(self, frames: list[zmq.Frame]) -> Arrival | None:
        """The message in these frames if it is valid and from the host it says, else None; the peer is told why."""
        message = decode_from_host(frames[1].bytes) if len(frames) == 2 else None
        if message is None:
            self.counters["malformed"] += 1
            return None
        peer = frames[0].bytes
        if self._keys is not None:
            host = self._keys.host_of(str(frames[1].get("User-Id")))
            if host != message.host:
                self.counters["refused"] += 1
                whose = f"the key of host '{host}'" if host else "a key that is no longer authorised"
                self.send([peer], Refused(reason=f"'{message.host[:64]}' came with {whose[:128]}"))
                return None
        return Arrival(message.host, peer, message)


def _check_file_limit(hosts: int) -> None:
    """Raise the limit of open files to what is allowed, and say so if that is too few.

    Beyond the limit ZeroMQ's I/O thread spins without any error.

    Raises:
        UsageError: fewer than one descriptor per authorised host.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return
    if hard < hosts + _OTHER_FILES:
        raise UsageError(
            f"the limit of open files is {hard}, and {hosts} hosts may connect; "
            f"raise it to at least {hosts + _OTHER_FILES} (LimitNOFILE= in the unit, or ulimit -n)"
        )
    log.info("room for %d hosts (limit of open files %d)", hard - _OTHER_FILES, hard)
