"""Every parse path on frames that scapy builds: what is tracked, what is left alone and why, and what is rewritten."""

import random
import struct

import pytest
from datapath_kit import TC_ACT_UNSPEC, Left, flow_key, network_offset, ones_complement_sum
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Jumbo,
    PadN,
)
from scapy.layers.ipsec import AH, ESP
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from fabricpilot.levels import Thresholds
from hostagent.datapath.base import Settings
from hostagent.datapath.layout import UNTRACKED_REASONS

SETTINGS = Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (11, 12, 13, 14))
ETHER = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
IP4, IP6 = IP(src="10.0.0.1", dst="10.0.0.2"), IPv6(src="2001:db8::1", dst="2001:db8::2")
TCP_ACK, UDP_53 = TCP(sport=40000, dport=80, flags="A"), UDP(sport=40000, dport=53)
DATA = Raw(b"x" * 100)


@pytest.fixture
def sender(kernel_sender):
    kernel_sender.datapath.apply(SETTINGS)
    return kernel_sender


def untracked(sender) -> dict[str, int]:
    """Reasons that were counted."""
    counters = sender.datapath.counters()
    return {reason: count for reason in UNTRACKED_REASONS[1:] if (count := counters[f"untracked_{reason}"])}


def fragments(packet: Packet, cut: int) -> tuple[bytes, bytes]:
    """An IPv4 packet in two fragments, the first one with `cut` bytes of IP payload (a multiple of 8)."""
    head = IP(bytes(packet[IP]))  # as built: with the protocol filled in
    payload = bytes(head.payload)
    head.remove_payload()
    head.id, head.len, head.chksum = 4711, None, None
    first, later = head.copy(), head.copy()
    first.flags, later.frag = "MF", cut // 8
    return bytes(ETHER / first / Raw(payload[:cut])), bytes(ETHER / later / Raw(payload[cut:]))


def assert_only_mark_changed(before: bytes, left: Left) -> None:
    """The frame differs in DSCP and IPv4 header checksum at most, and that checksum is right if it was before."""
    after = left.frame
    assert left.verdict == TC_ACT_UNSPEC
    assert len(after) == len(before)
    ip = network_offset(before)
    may_differ = {ip + 1: 0xFC, ip + 10: 0xFF, ip + 11: 0xFF} if before[ip] >> 4 == 4 else {ip: 0x0F, ip + 1: 0xC0}
    for offset, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old ^ new) & ~may_differ.get(offset, 0) & 0xFF == 0, f"byte {offset}: {old:#x} -> {new:#x}"
    if before[ip] >> 4 == 4:
        header = slice(ip, ip + (before[ip] & 0xF) * 4)
        if ones_complement_sum(before[header]) == 0xFFFF:
            assert ones_complement_sum(after[header]) == 0xFFFF


def big(head: Packet) -> bytes:
    """A frame of BIG TCP: 2,000 bytes of payload behind IP headers that cannot say how many, so say 0."""
    frame = bytearray(bytes(ETHER / head / TCP_ACK / Raw(bytes(2000))))
    struct.pack_into("!H", frame, 16 if frame[14] >> 4 == 4 else 18, 0)
    return bytes(frame)


BIG_TCP = {
    "IPv4": big(IP4),
    "IPv6": big(IP6),
    # The NIC's driver takes this option out.
    "IPv6 with the jumbo option": big(IP6 / IPv6ExtHdrHopByHop(options=[Jumbo(jumboplen=2028)])),
}


def shortest(frame: bytes | bytearray) -> int:
    """The shortest frame of this type that BPF_PROG_TEST_RUN takes; shorter ones: test_datapath_traffic.py."""
    return {b"\x08\x00": 34, b"\x86\xdd": 54}.get(bytes(frame[12:14]), 14)


def many_options(count: int) -> Packet:
    """So many destination options headers in a row."""
    packet = IPv6ExtHdrDestOpt()
    for _ in range(count - 1):
        packet /= IPv6ExtHdrDestOpt()
    return packet


def long_options(size_bytes: int) -> Packet:
    """One destination options header of that size: 256 or more, a multiple of 8."""
    return IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(250)), PadN(optdata=bytes(size_bytes - 256))])


LEFT_ALONE = {
    "ARP": (ETHER / ARP(), "not_ip"),
    "unknown ethertype": (Ether(type=0x88CC) / Raw(bytes(60)), "not_ip"),
    "three VLAN tags": (ETHER / Dot1AD(vlan=5) / Dot1Q(vlan=6) / Dot1Q(vlan=7) / IP4 / TCP_ACK / DATA, "vlan"),
    "ARP in a VLAN": (ETHER / Dot1Q(vlan=5) / ARP(), "not_ip"),
    "ICMP": (ETHER / IP4 / ICMP() / DATA, "other_protocol"),
    "ICMPv6": (ETHER / IP6 / ICMPv6EchoRequest() / DATA, "other_protocol"),
    "later fragment alone": (ETHER / IP(src="10.0.0.1", dst="10.0.0.2", frag=185, proto=17) / DATA, "fragment"),
    "later IPv6 fragment alone": (ETHER / IP6 / IPv6ExtHdrFragment(offset=9, nh=17) / DATA, "fragment"),
    "first fragment without a whole header": (ETHER / IP(dst="10.0.0.2", flags="MF", proto=6) / Raw(b"x"), "malformed"),
    "ICMPv6 behind hop-by-hop": (ETHER / IP6 / IPv6ExtHdrHopByHop() / ICMPv6EchoRequest(), "other_protocol"),
    "no next header": (ETHER / IP6 / IPv6ExtHdrDestOpt(nh=59) / DATA, "other_protocol"),
    "ESP": (ETHER / IP6 / ESP() / DATA, "extension_header"),
    "ESP behind options": (ETHER / IP6 / IPv6ExtHdrDestOpt() / ESP() / DATA, "extension_header"),
    "seven extension headers": (ETHER / IP6 / many_options(7) / TCP_ACK / DATA, "extension_header"),
    "extension headers of 264 bytes": (ETHER / IP6 / long_options(264) / TCP_ACK / DATA, "extension_header"),
    "extension header beyond the frame": (ETHER / IP6 / IPv6ExtHdrDestOpt(len=31) / TCP_ACK / DATA, "malformed"),
    "IP version 5": (ETHER / IP(version=5, src="10.0.0.1", dst="10.0.0.2") / TCP_ACK / DATA, "malformed"),
    "IPv6 ethertype, version 4": (Ether(type=0x86DD) / IP4 / TCP_ACK / DATA, "malformed"),
    "IPv4 header of 16 bytes": (ETHER / IP(ihl=4, src="10.0.0.1", dst="10.0.0.2") / TCP_ACK / DATA, "malformed"),
    "TCP header of 16 bytes": (ETHER / IP4 / TCP(dataofs=4) / DATA, "malformed"),
    "IPv4 length below its header": (ETHER / IP(len=10, dst="10.0.0.2") / TCP_ACK / DATA, "malformed"),
    "IPv4 length below TCP's header": (ETHER / IP(len=30, dst="10.0.0.2") / TCP_ACK / DATA, "malformed"),
    "IPv4 length beyond the frame": (ETHER / IP(len=1000, dst="10.0.0.2") / TCP_ACK / DATA, "malformed"),
    "IPv6 length beyond the frame": (ETHER / IPv6(plen=1000) / TCP_ACK / DATA, "malformed"),
    "IPv6 length 0": (ETHER / IPv6(plen=0) / UDP_53 / DATA, "malformed"),
}


@pytest.mark.parametrize(("packet", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone_and_counted(sender, packet: Packet, reason):
    frame = bytes(packet)
    left = sender.run(frame)
    assert (left.frame, left.priority, left.verdict) == (frame, None, TC_ACT_UNSPEC)
    assert untracked(sender) == {reason: 1}
    assert len(sender.datapath.flows()) == 0


@pytest.mark.parametrize(
    "packet",
    [
        ETHER / IP4 / TCP_ACK / DATA,
        ETHER / IP6 / TCP_ACK / DATA,
        ETHER / IP4 / UDP_53 / DATA,
        ETHER / IP6 / UDP_53 / DATA,
    ],
    ids=["tcp4", "tcp6", "udp4", "udp6"],
)
def test_truncated_at_every_byte(sender, packet):
    frame = bytes(packet)
    lengths = range(shortest(frame), len(frame))
    for length in lengths:
        left = sender.run(frame[:length])
        assert (left.frame, left.priority) == (frame[:length], None), length
    assert untracked(sender) == {"malformed": len(lengths)}
    sender.run(frame)
    assert len(sender.datapath.flows()) == 1


@pytest.mark.parametrize(
    "packet",
    {
        "IPv4 options": ETHER / IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_NOP()] * 4) / TCP_ACK / DATA,
        "longest IPv4 header": ETHER
        / IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_Timestamp(length=40), *[IPOption_NOP()] * 0])
        / TCP_ACK
        / DATA,
        "TCP options": ETHER
        / IP4
        / TCP(sport=40000, dport=80, flags="PA", options=[("NOP", None), ("NOP", None), ("Timestamp", (1, 2))])
        / DATA,
        "longest TCP header": ETHER / IP4 / TCP(sport=40000, dport=80, options=[("NOP", None)] * 40) / DATA,
        "don't fragment": ETHER / IP(src="10.0.0.1", dst="10.0.0.2", flags="DF") / TCP_ACK / DATA,
        "padded frame": ETHER / IP4 / TCP_ACK / DATA / Raw(b""),
        "VLAN": ETHER / Dot1Q(vlan=5) / IP4 / TCP_ACK / DATA,
        "QinQ": ETHER / Dot1AD(vlan=5) / Dot1Q(vlan=6) / IP4 / TCP_ACK / DATA,
        "IPv6 in two VLANs": ETHER / Dot1AD(vlan=5) / Dot1Q(vlan=6) / IP6 / UDP_53 / DATA,
        "IPv4 options in a VLAN": ETHER
        / Dot1Q(vlan=5)
        / IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_NOP()] * 4)
        / UDP_53
        / DATA,
        "hop-by-hop": ETHER / IP6 / IPv6ExtHdrHopByHop() / TCP_ACK / DATA,
        "routing": ETHER / IP6 / IPv6ExtHdrRouting(addresses=["2001:db8::3"] * 2) / TCP_ACK / DATA,
        "destination options": ETHER / IP6 / long_options(256) / TCP_ACK / DATA,
        "authentication header": ETHER / IP6 / AH(nh=6, payloadlen=4, icv=bytes(12)) / TCP_ACK / DATA,
        "six extension headers": ETHER / Dot1Q(vlan=5) / IP6 / many_options(6) / UDP_53 / DATA,
        "atomic fragment": ETHER / IP6 / IPv6ExtHdrFragment(id=7) / UDP_53 / DATA,
        "IPv6 flow label": ETHER / IPv6(src="2001:db8::1", dst="2001:db8::2", fl=0xABCDE) / TCP_ACK / DATA,
    }.items(),
    ids=lambda item: item[0],
)
def test_payload_is_what_is_behind_the_headers(sender, packet):
    frame = bytes(packet[1])
    if packet[0] == "padded frame":
        frame += bytes(30)  # behind what the IP header says: no payload
    assert_only_mark_changed(frame, sender.run(frame))
    assert sender.datapath.flows().states["attained_bytes"].tolist() == [100]
    assert untracked(sender) == {}


def test_key_is_the_five_tuple(sender):
    sender.run(bytes(ETHER / IP4 / TCP_ACK / DATA))
    sender.run(bytes(ETHER / IP6 / UDP_53 / DATA))
    read = {key.tobytes() for key in sender.datapath.flows().keys}
    assert read == {
        flow_key("10.0.0.1", "10.0.0.2", 40000, 80, 6).tobytes(),
        flow_key("2001:db8::1", "2001:db8::2", 40000, 53, 17).tobytes(),
    }


@pytest.mark.parametrize("ecn", range(4))
@pytest.mark.parametrize("version", [4, 6])
def test_ecn_bits_stay(sender, ecn, version):
    for dscp in (0, 8, 16, 24, 32):
        head = (
            IP(src="10.0.0.1", dst="10.0.0.2", tos=dscp << 2 | ecn)
            if version == 4
            else IPv6(src="2001:db8::1", dst="2001:db8::2", tc=dscp << 2 | ecn)
        )
        frame = bytes(ETHER / head / TCP(flags="S"))
        left = sender.run(frame)
        assert left.traffic_class == 32 << 2 | ecn
        assert_only_mark_changed(frame, left)


def test_checksum_is_right_for_every_mark_and_content(sender):
    rng = random.Random(1)
    for _ in range(300):
        ip = IP(
            src=f"10.{rng.randrange(256)}.{rng.randrange(256)}.1",
            dst="10.0.0.2",
            id=rng.randrange(65536),
            ttl=rng.randrange(1, 256),
            tos=rng.choice([0, 8, 16, 24, 32]) << 2 | rng.randrange(4),
        )
        frame = bytes(ETHER / ip / UDP(sport=rng.randrange(1, 65536)) / Raw(bytes(rng.randrange(1, 1400))))
        left = sender.run(frame)
        assert left.dscp == 32
        assert_only_mark_changed(frame, left)


def test_checksum_that_was_wrong_stays_wrong(sender):
    frame = bytearray(bytes(ETHER / IP4 / UDP_53 / DATA))
    frame[24] ^= 0x5A
    left = sender.run(bytes(frame))
    before, after = (ones_complement_sum(f[14:34]) for f in (bytes(frame), left.frame))
    assert left.dscp == 32
    assert before == after != 0xFFFF


@pytest.mark.parametrize("frame", BIG_TCP.values(), ids=BIG_TCP)
def test_gso_beyond_64_kb_has_no_ip_length(sender, frame):
    assert_only_mark_changed(frame, sender.run(frame, gso_size=1000, gso_segs=2))
    assert sender.datapath.flows().states["attained_bytes"].tolist() == [2000]


@pytest.mark.parametrize("transport", [UDP_53, TCP_ACK], ids=["udp", "tcp"])
def test_the_first_fragment_decides_for_the_rest(sender, transport):
    first, later = fragments(IP4 / transport / Raw(bytes(2400)), 1600)
    left = [sender.run(frame) for frame in (first, later)]
    assert left[0].dscp == left[1].dscp == SETTINGS.dscp[0 if transport is UDP_53 else 3]
    for frame, out in zip((first, later), left, strict=True):
        assert_only_mark_changed(frame, out)
    state = sender.datapath.flows().states
    assert (state["attained_bytes"].tolist(), state["packets"].tolist()) == ([2400], [2])
    assert untracked(sender) == {}


def test_ipv6_fragments(sender):
    whole = bytes(UDP_53 / Raw(bytes(2400)))
    first = ETHER / IP6 / IPv6ExtHdrFragment(id=9, m=1, nh=17) / Raw(whole[:1600])
    later = ETHER / IP6 / IPv6ExtHdrFragment(id=9, offset=200, nh=17) / Raw(whole[1600:])
    assert [sender.run(bytes(frame)).dscp for frame in (first, later)] == [SETTINGS.dscp[0]] * 2
    assert sender.datapath.flows().states["attained_bytes"].tolist() == [2400]
    stranger = ETHER / IP6 / IPv6ExtHdrFragment(id=10, offset=200, nh=17) / Raw(whole[1600:])
    sender.run(bytes(stranger))
    assert untracked(sender) == {"fragment": 1}


def test_before_settings_packets_are_counted_and_left_alone(kernel_sender):
    frame = bytes(ETHER / IP4 / TCP(flags="S"))
    left = kernel_sender.run(frame)
    assert (left.frame, left.priority) == (frame, None)
    assert kernel_sender.datapath.counters()["untagged"] == 1
    assert len(kernel_sender.datapath.flows()) == 1


MUTATED = st.tuples(
    st.sampled_from(
        [bytes(packet) for packet, _ in LEFT_ALONE.values()]
        + [bytes(ETHER / ip / l4 / DATA) for ip in (IP4, IP6) for l4 in (TCP_ACK, UDP_53)]
        + [bytes(ETHER / Dot1Q(vlan=5) / ip / l4 / DATA) for ip in (IP4, IP6) for l4 in (TCP_ACK, UDP_53)]
        + [bytes(ETHER / IP6 / many_options(n) / l4 / DATA) for n in (1, 3) for l4 in (TCP_ACK, UDP_53)]
        + [bytes(ETHER / Dot1AD(vlan=5) / Dot1Q(vlan=6) / ip / TCP_ACK / DATA) for ip in (IP4, IP6)]
        + [bytes(ETHER / IP(dst="10.0.0.2", options=[IPOption_NOP()] * 4) / l4 / DATA) for l4 in (TCP_ACK, UDP_53)]
        + [*fragments(IP4 / UDP_53 / DATA, 64), bytes(ETHER / IP6 / IPv6ExtHdrFragment(m=1, id=1) / UDP_53 / DATA)]
        + list(BIG_TCP.values())
    ),
    st.lists(st.tuples(st.integers(12, 90), st.integers(0, 255)), max_size=6),  # bytes to overwrite
    st.one_of(st.integers(14, 200), st.just(4000)),  # length to cut at
    st.sampled_from([(0, 0), (0, 0), (1000, 2)]),  # GSO size and segments
)


def check_any_frame(sender, case) -> None:
    """Whatever the frame: it leaves, marked or untouched, and is counted exactly once."""
    frame, changes, length, (gso_size, gso_segs) = case
    mutated = bytearray(frame)
    for offset, value in changes:
        if offset < len(mutated):
            mutated[offset] = value
    given_frame = bytes(mutated[: max(length, shortest(mutated))].ljust(shortest(mutated), b"\0"))
    before = sender.datapath.counters()
    left = sender.run(given_frame, gso_size, gso_segs)
    after = sender.datapath.counters()
    moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    alone = [name for name in moved if name.startswith(("untracked_", "foreign_dscp"))]
    tagged = [name for name in moved if name.startswith("packets_level_")]
    assert len(alone) + len(tagged) == 1, moved
    assert moved[(alone + tagged)[0]] == (gso_segs or 1)
    if alone:
        assert (left.frame, left.priority, left.verdict) == (given_frame, None, TC_ACT_UNSPEC)
    else:
        assert left.dscp == SETTINGS.dscp[int(tagged[0][-1])]
        assert_only_mark_changed(given_frame, left)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=MUTATED)
def test_any_frame(sender, case):
    check_any_frame(sender, case)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_frame_many(sender):
    frames = 0

    @settings(max_examples=100_000, deadline=None, database=None)
    @given(case=MUTATED)
    def every(case):
        nonlocal frames
        check_any_frame(sender, case)
        frames += 1

    every()
    assert frames >= 100_000
