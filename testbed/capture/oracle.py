"""Says which DSCP every captured packet should have carried, from the packets alone.

An oracle of its own: it shares neither code nor data with the egress program. It knows the rules, the code point of
each level, and which thresholds were in force at which time:

- `attained`: the level of the payload bytes sent before this packet, each once; of a packet that is sent again, that of
  the last byte sent. `written`: that of the bytes written by then, of which the packets say only that they are no fewer
  than were sent and no more than the flow has in all; so every level in between is right.
- Packets without payload are at the top.
- A flow that was silent for long may have a turn at the top.

One connection is taken for one message.

    capture order -> per flow, from its SYN -> order of sending (IP identification) -> bytes before -> level

Only flows whose SYN was captured can be checked: of the others nobody knows what they had sent before. Linux numbers
a socket's IPv4 packets one by one, which gives the order of sending even where two CPUs hand packets over, and shows
every packet that was sent but not captured: from such a gap on, a flow is left out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fabricpilot.levels import Thresholds
from testbed.capture.packets import FlowKey, SeenPacket


@dataclass(frozen=True)
class InForce:
    """Thresholds of one host, in force from some moment in [earliest_ns, latest_ns] (CLOCK_REALTIME) on."""

    earliest_ns: int
    latest_ns: int
    thresholds: Thresholds


@dataclass(frozen=True)
class WrongPacket:
    """A packet with another DSCP than its flow demanded, by the bytes it had sent."""

    packet: SeenPacket
    attained_bytes: int
    expected: tuple[int, ...]


@dataclass
class Verdict:
    """Of how many packets the DSCP was checked and right, and what could not be checked.

    Attributes:
        checked: packets whose demanded DSCP is known.
        correct: of these, carrying it.
        at_change: of these, sent while thresholds changed and right by the old or the new ones only.
        flows: flows checked.
        skipped_flows: flows whose beginning was not captured.
        skipped_packets: packets of those.
        incomplete_flows: flows checked only up to a packet that the capture lacks.
        by_dscp: checked packets by the DSCP they carried.
        wrong: the first few that were wrong.
    """

    checked: int = 0
    correct: int = 0
    at_change: int = 0
    flows: int = 0
    skipped_flows: int = 0
    skipped_packets: int = 0
    incomplete_flows: int = 0
    by_dscp: dict[int, int] = field(default_factory=dict)
    wrong: list[WrongPacket] = field(default_factory=list)


# Silence after which an agent gives a flow a turn by default, and what the turn is for.
_STARVED_NS = 500_000_000
_TURN_BYTES = 65_536

_SHOWN_WRONG = 10
_ID_HALF, _ID_ALL = 1 << 15, 1 << 16  # IP identification has 16 bits
_SEQUENCE_HALF = 1 << 31  # TCP's sequence numbers have 32


def check(
    packets: Iterable[SeenPacket],
    history: Mapping[str, Sequence[InForce]],
    dscp: Sequence[int],
    *,
    written: bool = False,
) -> Verdict:
    """Check all packets.

    Args:
        packets: in capture order; only those that senders sent.
        history: thresholds by the host's address, each list ascending in time.
        dscp: the code point of each level.
        written: flows are ranked by the bytes written so far, not by those sent.
    """
    verdict = Verdict()
    by_key: dict[FlowKey, list[SeenPacket]] = {}
    for packet in packets:
        by_key.setdefault(packet.flow, []).append(packet)
    for key, of_key in by_key.items():
        for flow in _flows_of(of_key):
            if flow[0].syn:
                verdict.flows += 1
                _check_flow(flow, history.get(key.source, ()), dscp, written, verdict)
            else:
                verdict.skipped_flows += 1
                verdict.skipped_packets += len(flow)
    return verdict


def _flows_of(packets: list[SeenPacket]) -> Iterator[list[SeenPacket]]:
    """The packets of one 5-tuple, split where a SYN begins another flow on the same ports."""
    flow: list[SeenPacket] = []
    sent_payload = False
    for packet in packets:
        if packet.syn and flow and (sent_payload or not flow[0].syn):
            yield flow
            flow, sent_payload = [], False
        flow.append(packet)
        sent_payload = sent_payload or packet.payload_bytes > 0
    yield flow


def _check_flow(
    flow: list[SeenPacket], known: Sequence[InForce], dscp: Sequence[int], written: bool, verdict: Verdict
) -> None:
    in_all_bytes = _size_bytes(flow) if written else None
    attained_bytes = turn_until_bytes = last_payload_ns = 0
    first, whole = flow[0].sequence, True
    for packet, follows in _as_sent(flow):
        whole = whole and follows
        if packet.payload_bytes and not whole:
            continue  # something before it is missing: how much its flow had sent is not known
        if packet.payload_bytes:
            if last_payload_ns and packet.time_ns - last_payload_ns >= _STARVED_NS:
                turn_until_bytes = attained_bytes + _TURN_BYTES
            last_payload_ns = packet.time_ns
        end_bytes = attained_bytes + _distance(first + attained_bytes, packet.sequence) + packet.payload_bytes
        repeated = packet.payload_bytes > 0 and end_bytes <= attained_bytes
        rank_bytes = attained_bytes - repeated
        most_bytes = rank_bytes if in_all_bytes is None else max(rank_bytes, in_all_bytes - 1)
        demanded = _demanded(packet, (rank_bytes, most_bytes), known, dscp)
        if demanded and attained_bytes < turn_until_bytes:
            demanded.add(dscp[0])
        if repeated:
            turn_until_bytes -= packet.payload_bytes
        elif packet.payload_bytes:
            attained_bytes = end_bytes
        if not demanded:
            continue  # no thresholds are known for this moment
        verdict.checked += 1
        verdict.by_dscp[packet.dscp] = verdict.by_dscp.get(packet.dscp, 0) + 1
        if packet.dscp in demanded:
            verdict.correct += 1
            verdict.at_change += len(demanded) > 1 and not written
        elif len(verdict.wrong) < _SHOWN_WRONG:
            verdict.wrong.append(WrongPacket(packet, rank_bytes, tuple(sorted(demanded))))
    verdict.incomplete_flows += not whole


def _size_bytes(flow: list[SeenPacket]) -> int:
    """What the flow has sent in all; without bound where its end was not captured."""
    if not any(packet.fin for packet in flow):
        return 1 << 62
    first = flow[0].sequence
    return max(_distance(first, packet.sequence) + packet.payload_bytes for packet in flow if packet.payload_bytes)


def _distance(sequence: int, other: int) -> int:
    """How far the second of two TCP sequence numbers is behind the first."""
    return (other - sequence + _SEQUENCE_HALF) % (2 * _SEQUENCE_HALF) - _SEQUENCE_HALF


def _demanded(
    packet: SeenPacket,
    rank_bytes: tuple[int, int],
    known: Sequence[InForce],
    dscp: Sequence[int],
) -> set[int]:
    """DSCP values that are right for this packet, whose flow ranks by a number in the closed range `rank_bytes`."""
    if packet.payload_bytes == 0:
        return {dscp[0]}
    right = set()
    for number, vector in enumerate(known):
        until_ns = known[number + 1].latest_ns if number + 1 < len(known) else packet.time_ns
        if vector.earliest_ns <= packet.time_ns <= until_ns:
            lowest, highest = (vector.thresholds.level_of(rank) for rank in rank_bytes)
            right |= {dscp[level] for level in range(lowest, highest + 1)}
    return right


def _as_sent(flow: list[SeenPacket]) -> list[tuple[SeenPacket, bool]]:
    """A flow's packets in the order of sending, each with whether it directly follows the one before.

    Identification 0 without payload comes from no socket of the flow (a RST, or an ACK for a closed connection) and
    stands outside the count.
    """
    if flow[0].ip_id is None:
        return [(packet, True) for packet in flow]
    counted: list[tuple[int, SeenPacket]] = []
    outside: list[tuple[SeenPacket, bool]] = []
    place = flow[0].ip_id
    for packet in flow:
        if packet.ip_id == 0 and packet.payload_bytes == 0:
            outside.append((packet, True))
            continue
        assert packet.ip_id is not None
        place += (packet.ip_id - place + _ID_HALF) % _ID_ALL - _ID_HALF
        counted.append((place, packet))
    counted.sort(key=lambda entry: entry[0])
    ordered = []
    before = counted[0][0] - 1 if counted else 0
    for place, packet in counted:
        gap = place - before
        # Exactly the place whose identification is 0 may be one of those that stand outside.
        ordered.append((packet, gap == 1 or (gap == 2 and (place - 1) % _ID_ALL == 0)))
        before = place
    return ordered + outside
