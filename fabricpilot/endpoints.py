"""ZeroMQ endpoints as people write them: which are on this machine only, and what is wrong with the others.

Both ends of the link ask here, so that "insecure is for loopback" has one meaning.
"""

import ipaddress

from fabricpilot.errors import UsageError

_LOCAL_TRANSPORTS = ("ipc", "inproc")


def split_endpoint(endpoint: str, key: str) -> tuple[str, str]:
    """Transport and address of an endpoint such as `tcp://10.0.0.1:5555`.

    Args:
        endpoint: as configured.
        key: the configuration key it comes from, for the message.

    Raises:
        UsageError: not TRANSPORT://ADDRESS, an unknown transport, or tcp without a port.
    """
    transport, separator, address = endpoint.partition("://")
    if not separator or not address or transport not in ("tcp", *_LOCAL_TRANSPORTS):
        raise UsageError(f"{key} = '{endpoint}' is no endpoint; write it like tcp://10.0.0.1:5555")
    if transport == "tcp":
        host, _, port = address.rpartition(":")
        if not host or not (port == "*" or (port.isascii() and port.isdigit() and 0 <= int(port) <= 65_535)):
            raise UsageError(f"{key} = '{endpoint}' lacks a port; write it like tcp://10.0.0.1:5555")
    return transport, address


def is_loopback(endpoint: str) -> bool:
    """Whether an endpoint can only be reached from this machine: 127/8, ::1, localhost, ipc, inproc."""
    transport, _, address = endpoint.partition("://")
    if transport in _LOCAL_TRANSPORTS:
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_insecure(endpoint: str, key: str) -> None:
    """Refuse to talk in clear text over a network.

    Raises:
        UsageError: the endpoint is not on loopback.
    """
    if not is_loopback(endpoint):
        raise UsageError(
            f"link.insecure is accepted on loopback only, and {key} = '{endpoint}' is not; "
            "make keys with `fabricpilot central keys`"
        )
