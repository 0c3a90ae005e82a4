"""Who may connect: the folder of the hosts' public keys, and the ZAP handler (ZeroMQ RFC 27) that asks it.

Every new CURVE connection to central is a question on the ZAP socket, which the daemon's own poller serves: no thread.
The answer carries the peer's key as its User-Id, which ZeroMQ then attaches to every message of that connection; so
each message is judged by the key it came with, and a key that is removed counts for nothing from the next look on.
"""

import logging
import time
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from fabricpilot.errors import UsageError
from fabricpilot.keys import PUBLIC_SUFFIX, check_host_name, read_public

log = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"fabricpilot"

_LOOK_INTERVAL_S = 1.0  # how often the folder is looked at, at most
_MAX_TOLD = 1024  # distinct unknown keys that get a log line of their own
_MAX_PER_CALL = 256


class AuthorizedKeys:
    """The hosts' public keys: files NAME.key in one folder, read again when the folder changes.

    Raises:
        UsageError: the folder is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hosts: dict[str, str] = {}  # public key (Z85) -> host name
        self._changed_ns = -1
        self._looked_at = float("-inf")
        self._told: set[str] = set()
        try:
            self._read()
        except OSError as error:
            raise UsageError(
                f"cannot read {folder} (link.authorized_keys): {error.strerror}; "
                "it holds the public key files of the hosts, from `fabricpilot central keys`"
            ) from error

    def __len__(self) -> int:
        return len(self._hosts)

    def host_of(self, public: str) -> str | None:
        """The host whose public key (Z85) this is; None if no host has it."""
        host = self._hosts.get(public)
        self._look(force=host is None)
        return self._hosts.get(public)

    def _look(self, force: bool) -> None:
        """Read the folder again if it changed, or (a file edited in place) if somebody came with an unknown key."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_INTERVAL_S:
            return
        self._looked_at = now
        try:
            if force or self.folder.stat().st_mtime_ns != self._changed_ns:
                self._read()
        except OSError as error:
            self._tell(f"cannot read {self.folder}: {error.strerror}; the keys read before stay in force")

    def _read(self) -> None:
        self._changed_ns = self.folder.stat().st_mtime_ns
        hosts: dict[str, str] = {}
        for path in sorted(self.folder.iterdir()):
            if path.suffix != PUBLIC_SUFFIX or path.name.startswith("."):
                continue
            try:
                check_host_name(path.stem)
                public = read_public(path, "link.authorized_keys").decode()
            except UsageError as error:
                self._tell(str(error))
                continue
            if public in hosts:
                self._tell(f"{path}: the key of host '{hosts[public]}' again; every host needs its own")
                continue
            hosts[public] = path.stem
        if hosts != self._hosts:
            log.info("%d hosts may connect (%s)", len(hosts), self.folder)
        self._hosts = hosts

    def _tell(self, what: str) -> None:
        if what not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(what)
            log.warning("%s", what)


class ZapHandler:
    """Answers the handshakes of one ZeroMQ context.

    Attributes:
        socket: for the daemon's poller; call `serve` when it is readable.
        accepted: handshakes granted so far.
        denied: handshakes refused so far.
    """

    def __init__(self, context: zmq.Context[Any], keys: AuthorizedKeys) -> None:
        self.accepted = 0
        self.denied = 0
        self._keys = keys
        self._told: set[str] = set()
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ENDPOINT)

    def serve(self) -> None:
        """Answer the handshakes that wait."""
        for _ in range(_MAX_PER_CALL):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._answer(frames))

    def close(self) -> None:
        """Answer no more."""
        self.socket.close()

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        """ZAP reply: version, request id, status, text, user id, metadata."""
        request_id = frames[1] if len(frames) > 1 else b""
        # version, request id, domain, address, identity, mechanism, CURVE key; from libzmq itself, not from the peer
        if len(frames) != 7 or frames[0] != b"1.0" or frames[5] != b"CURVE" or len(frames[6]) != 32:
            self.denied += 1
            return [b"1.0", request_id, b"400", b"CURVE only", b"", b""]
        public = z85.encode(frames[6])
        if self._keys.host_of(public.decode()) is None:
            self.denied += 1
            self._tell_denied(public.decode(), frames[3].decode("ascii", "replace"))
            return [b"1.0", request_id, b"400", b"unknown key", b"", b""]
        self.accepted += 1
        return [b"1.0", request_id, b"200", b"OK", public, b""]

    def _tell_denied(self, public: str, address: str) -> None:
        if public not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(public)
            log.warning("refused %s: no host in %s has the public key %s", address, self._keys.folder, public)
