"""The connecting side of the link: what every socket needs that speaks to central, be it an agent's or a command's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from fabricpilot.config import LinkSection
from fabricpilot.endpoints import check_insecure
from fabricpilot.keys import read_pair, read_public
from fabricpilot.wire import MAX_MESSAGE_BYTES


@dataclass(frozen=True)
class Named:
    """What the user calls the three settings, for messages: configuration keys or options."""

    endpoint: str
    key: str
    central_key: str


def prepare(socket: "zmq.Socket[Any]", section: LinkSection, named: Named) -> None:
    """Bound its messages, allow IPv6 where the endpoint is, and give it the keys of `section`.

    Raises:
        UsageError: a key file that is none, or no encryption beyond loopback.
    """
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.ipv6 = "[" in section.endpoint
    if section.insecure:
        check_insecure(section.endpoint, named.endpoint)
        return
    pair = read_pair(Path(section.key), named.key)
    socket.curve_serverkey = read_public(Path(section.central_key), named.central_key)
    socket.curve_publickey, socket.curve_secretkey = pair.public, pair.secret
