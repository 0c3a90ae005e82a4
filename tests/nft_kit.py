"""Packets through the netfilter data path: real ones, from one namespace to another, as `FakeDatapath.send` takes them.

Raw sockets write whole IP packets, so any 5-tuple can be sent; they pass conntrack and all hooks like those of a
socket. The peer answers a SYN on the wire, for conntrack to see a handshake; TCP headers are those of a Linux host.
"""

import ipaddress
import json
import socket
import struct
import time
from dataclasses import dataclass, field

from datapath_kit import Left, in_netns, run
from nftables import Nftables

from hostagent.datapath.nftables import NftablesDatapath

NIC = "nic"
_PROBE = """
table inet probe {
    set seen { typeof meta priority; flags dynamic; size 64; }
    chain late { type filter hook postrouting priority 300; meta l4proto { tcp, udp } add @seen { meta priority }; }
}
"""
_ISN, _PEER_ISN = 1000, 5000


@dataclass
class _Connection:
    sent: int = 0  # payload bytes
    answered: bool = False
    acknowledged: bool = False
    fresh: list[int] = field(default_factory=list)


def wire_up(here: str, peer: str) -> None:
    """A veth pair between two namespaces, jumbo frames, every address behind it."""
    run("ip", "link", "add", NIC, "mtu", "9000", "type", "veth", "peer", "name", NIC, "netns", peer, netns=here)
    run("ip", "link", "set", NIC, "mtu", "9000", netns=peer)
    run("ip", "link", "set", NIC, "arp", "off", netns=here)
    for namespace, address in ((here, "192.0.2.1/24"), (peer, "192.0.2.2/24")):
        run("ip", "addr", "add", address, "dev", NIC, netns=namespace)
        run("ip", "link", "set", NIC, "up", netns=namespace)
        run("ip", "link", "set", "lo", "up", netns=namespace)
    run("ip", "route", "add", "default", "dev", NIC, netns=here)
    run("ip", "-6", "route", "add", "default", "dev", NIC, netns=here)


class NftSender:
    """Sends packets that the data path on NIC schedules; use it in the namespace `here` only.

    Args:
        here: name of the namespace, wired up and entered.
        peer: name of the other one.
    """

    tolerance_bytes = 1600  # one full-size packet with its headers

    def __init__(self, here: str, peer: str) -> None:
        self.datapath = NftablesDatapath(4096, 30.0)
        self.datapath.attach(NIC)
        run("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_be_liberal=1")
        self._probe = Nftables()
        assert self._probe.cmd(_PROBE)[0] == 0
        self._probe.set_json_output(True)
        self._raw = {
            4: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
            6: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
        }
        self._our_mac = bytes.fromhex(json.loads(run("ip", "-j", "link", "show", NIC))[0]["address"].replace(":", ""))
        with in_netns(peer):
            self._tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._tap.bind((NIC, 0))
            self._tap.settimeout(2)
        self._connections: dict[bytes, _Connection] = {}

    def close(self) -> None:
        """Close sockets; the data path goes."""
        for one in (*self._raw.values(), self._tap):
            one.close()
        self.datapath.detach()
        self.datapath.close()

    def send(self, key, payload_bytes=0, *, syn=False, fin=False, rst=False, segments=1, dscp=0) -> Left:
        """See `FakeDatapath.send`; `segments` are sent as one large packet."""
        connection = self._connections.setdefault(key.tobytes(), _Connection())
        if int(key["protocol"]) == 6:
            if syn:
                self._connections[key.tobytes()] = connection = _Connection()
            elif connection.answered and not connection.acknowledged and not rst:
                connection.acknowledged = True
                self._send(key, connection, 0, "", 0)
        flags = "".join(letter for letter, given in (("S", syn), ("F", fin), ("R", rst)) if given)
        left = self._send(key, connection, payload_bytes, flags, dscp)
        if flags == "S":
            self._answer(key)
            connection.answered = True
        return left

    def _send(self, key, connection: _Connection, payload_bytes: int, flags: str, dscp: int) -> Left:
        self._probe.cmd("flush set inet probe seen")
        packet = _packet(key, connection, payload_bytes, flags, dscp)
        version = packet[0] >> 4
        destination = ipaddress.IPv6Address(key["destination"].tobytes())
        self._raw[version].sendto(packet, (str(destination.ipv4_mapped or destination), 0))
        connection.sent += payload_bytes
        frame = self._captured(key, version)
        listed = json.loads(self._probe.cmd("list set inet probe seen")[1])["nftables"]
        [seen] = next(entry["set"].get("elem", []) for entry in listed if "set" in entry)
        return Left(frame, _number(seen) or None, 0)

    def _captured(self, key, version: int) -> bytes:
        ports = struct.pack("!HH", int(key["source_port"]), int(key["destination_port"]))
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            frame = self._tap.recv(65536)
            header = 20 if version == 4 else 40
            if frame[14] >> 4 == version and frame[14 + header : 18 + header] == ports:
                return frame
        raise AssertionError("the packet did not arrive")

    def _answer(self, key) -> None:
        """The peer's SYN-ACK, as if from the wire."""
        from scapy.layers.inet import TCP

        reply = TCP(sport=int(key["destination_port"]), dport=int(key["source_port"]), flags="SA")
        reply.seq, reply.ack, reply.options = _PEER_ISN, _ISN + 1, _SYN_OPTIONS
        packet = bytes(_ip(key["destination"], key["source"], 0) / reply)
        kind = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
        self._tap.send(self._our_mac + b"\x02\0\0\0\0\x02" + kind + packet)


_SYN_OPTIONS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]


def _packet(key, connection: _Connection, payload_bytes: int, flags: str, dscp: int) -> bytes:
    from scapy.layers.inet import TCP, UDP

    ports = {"sport": int(key["source_port"]), "dport": int(key["destination_port"])}
    if int(key["protocol"]) == 17:
        transport = UDP(**ports)
    elif "S" in flags:
        transport = TCP(**ports, flags=flags, seq=_ISN, options=_SYN_OPTIONS)
    else:
        options = [("NOP", None), ("NOP", None), ("Timestamp", (1, 1))]
        sequence = _ISN + 1 + connection.sent
        transport = TCP(**ports, flags="A" + flags, seq=sequence, ack=_PEER_ISN + 1, options=options)
    return bytes(_ip(key["source"], key["destination"], dscp) / transport / (b"x" * payload_bytes))


def _ip(source, destination, dscp: int):
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6

    one, other = (ipaddress.IPv6Address(raw.tobytes()) for raw in (source, destination))
    if one.ipv4_mapped and other.ipv4_mapped:
        return IP(src=str(one.ipv4_mapped), dst=str(other.ipv4_mapped), tos=dscp << 2)
    return IPv6(src=str(one), dst=str(other), tc=dscp << 2)


def _number(shown) -> int:
    """skb->priority as nft shows it."""
    if isinstance(shown, int):
        return shown
    if shown == "none":
        return 0
    major, _, minor = shown.partition(":")
    return int(major or "0", 16) << 16 | int(minor or "0", 16)


# Prologue of a process to whom the kernel refuses bpf(2), as lockdown and a container's seccomp profile do.
REFUSE_BPF = """
import ctypes, struct
def instruction(code, jt, jf, k):
    return struct.pack("=HBBI", code, jt, jf, k)
program = b"".join([
    instruction(0x20, 0, 0, 0),            # load the number of the system call
    instruction(0x15, 0, 1, 321),          # bpf on x86_64?
    instruction(0x06, 0, 0, 0x00050001),   # SECCOMP_RET_ERRNO | EPERM
    instruction(0x06, 0, 0, 0x7fff0000),   # SECCOMP_RET_ALLOW
])
code = ctypes.create_string_buffer(program, len(program))
given = struct.pack("=HxxxxxxQ", 4, ctypes.addressof(code))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0                                        # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.create_string_buffer(given, len(given)), 0, 0) == 0  # PR_SET_SECCOMP, filter
"""
