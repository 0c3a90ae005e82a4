"""The messages between host and central, and their encoding.

One tagged union per direction, MessagePack by msgspec, in an envelope with a protocol version. Decoding returns
None for whatever is malformed, of another version or out of bounds: the caller counts it and goes on; nothing a
peer sends can raise. Every list has a bound, so a report's size is bounded whatever the traffic.

Times on the wire are durations or Unix nanoseconds; addresses are text; sizes are bytes.
"""

import ipaddress
from typing import Annotated, TypeVar

import msgspec

from fabricpilot.errors import UsageError
from fabricpilot.histogram import BINS
from fabricpilot.levels import MAX_LEVELS, Thresholds

PROTOCOL_VERSION = 1

# AuTO reports 100 finished flows of 7 fields a step; enough to see a sample, small enough for 12 kbit/s.
MAX_FINISHED_SAMPLE = 100
MAX_LONG_FLOWS = 256  # the longest ones; how many there were in all is told beside
MAX_VERDICTS = 512  # in one message
MAX_ROUTE = 31
MAX_MESSAGE_BYTES = 64 * 1024
MAX_PLAN_PART_BYTES = 48 * 1024  # planning requests and answers are larger than a message, so they come in parts
MAX_PLAN_PARTS = 128  # 6 MiB; a compressed mapping of 1,200 PMs takes 3
MAX_MIGRATIONS = 256  # announced in one message
MIGRATION_PORTS = (49152, 49215)  # what libvirt lets QEMU migrate over, unless told otherwise

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Bin = Annotated[int, msgspec.Meta(ge=0, lt=BINS)]
Histogram = Annotated[dict[Bin, Count], msgspec.Meta(max_length=BINS)]
RouteNumbers = Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=MAX_ROUTE)]], msgspec.Meta(max_length=MAX_ROUTE)]
ThresholdBytes = Annotated[list[Count], msgspec.Meta(max_length=7)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all messages; the tag is the class name in lower case."""


class FlowSummary(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One flow in a report. For a finished flow the 7 numbers AuTO uses; for a long one its state so far."""

    source: Text  # IP address
    destination: Text
    source_port: Count
    destination_port: Count
    protocol: Count  # 6 TCP, 17 UDP
    size_bytes: Count  # payload bytes sent so far (long) or in all (finished)
    duration_us: Count  # first to last packet: the sender's view of FCT for a finished flow
    level: Count
    route: Count = 0  # the one it takes; 0: the kernel's choice
    backlog_bytes: Count = 0  # of one that has just become long: written then and not yet sent; 0: not known


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Host to central, first message after every connect: who is there and what it can do."""

    host: Name
    group: Name
    levels: Count
    backend: Text  # datapath in use, for example "ebpf"
    queues: Text  # what enforces on the NIC, for example "htb"
    link_rate_bps: Count  # 0: unknown
    epoch: Count  # last policy epoch this host applied, 0: none
    thresholds: ThresholdBytes
    version: Text
    routes: RouteNumbers = []  # what verdicts may choose from
    visible_bytes: Count = 0  # what ranking sees of a flow beyond the bytes it has sent: its send buffer; 0: nothing


class Report(Message, frozen=True, kw_only=True, tag="report"):
    """Host to central, every interval: summaries of what happened since the last report. It is the heartbeat."""

    host: Name
    sequence: Count  # 1, 2, ... since the agent started
    interval_ns: Count
    epoch: Count  # policy in force
    sent_bytes: Count  # payload bytes sent by all flows in the interval
    sizes: Histogram  # sizes of finished flows, bytes
    durations: Histogram  # durations of finished flows, microseconds
    finished: Count  # how many flows finished
    finished_sample: Annotated[list[FlowSummary], msgspec.Meta(max_length=MAX_FINISHED_SAMPLE)]
    long: Count  # how many flows are long now
    long_flows: Annotated[list[FlowSummary], msgspec.Meta(max_length=MAX_LONG_FLOWS)]
    active: Count  # flows in the table
    counters: Annotated[dict[Text, Count], msgspec.Meta(max_length=64)]  # cumulative, from the data path
    usable_routes: RouteNumbers = []  # routes that lead somewhere now


class LongFlows(Message, frozen=True, kw_only=True, tag="long_flows"):
    """Host to central, as soon as flows have become long, whose level and route it may choose.

    Only a host that was told `follows_long_flows` sends it. At a report, those follow for which the report had no room.
    """

    host: Name
    flows: Annotated[list[FlowSummary], msgspec.Meta(max_length=MAX_LONG_FLOWS)]
    ended: Annotated[list[FlowSummary], msgspec.Meta(max_length=MAX_LONG_FLOWS)] = []  # were long, and are over


class Policy(Message, frozen=True, kw_only=True, tag="policy"):
    """Central to host: thresholds to use from now on. Idempotent; an epoch not above the last is ignored."""

    epoch: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    thresholds: ThresholdBytes  # ascending; anything else is malformed
    expiry_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)]  # counted from the last word of central
    reason: Text = ""
    follows_long_flows: bool = False  # tell central at once when a flow becomes long

    def __post_init__(self) -> None:
        try:
            Thresholds.of(self.thresholds)
        except UsageError as error:
            raise ValueError(str(error)) from error  # msgspec turns it into a ValidationError: malformed


class FlowVerdict(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What central wants of one flow. It comes before the thresholds, and behind an operator's rule."""

    source: Text  # IP address
    destination: Text
    source_port: Port
    destination_port: Port
    protocol: Annotated[int, msgspec.Meta(ge=0, le=255)]
    level: Annotated[int, msgspec.Meta(ge=-1, lt=MAX_LEVELS)]  # -1: by the thresholds
    route: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROUTE)]  # one of the host's; 0: the kernel's choice
    ttl_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)]  # how long it holds; 0: it ends now

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.source)  # a ValueError makes the message malformed
        ipaddress.ip_address(self.destination)


class Verdicts(Message, frozen=True, kw_only=True, tag="verdicts"):
    """Central to host: levels and routes of single flows. Idempotent; each replaces the one before for its flow."""

    verdicts: Annotated[list[FlowVerdict], msgspec.Meta(max_length=MAX_VERDICTS)]


class PlanPart(Message, frozen=True, kw_only=True, tag="plan_part"):
    """Client to central: a part of a planning request. The parts, in order, are one compressed request."""

    host: Name  # the client: the name of its key, as for a host
    ticket: Name  # chosen by the client; the answer carries it
    part: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PLAN_PARTS)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=MAX_PLAN_PARTS)]
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_PLAN_PART_BYTES)]


class PlanAnswer(Message, frozen=True, kw_only=True, tag="plan_answer"):
    """Central to client: a part of the answer, compressed likewise: plan.json, or why there is none."""

    ticket: Name
    part: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PLAN_PARTS)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=MAX_PLAN_PARTS)]
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_PLAN_PART_BYTES)]


class MigrationFlow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One VM migration of a running plan, told before its flow begins: a long flow that may wait for all others."""

    vm: Name
    source_host: Name  # host that sends the memory
    target_host: Name
    size_bytes: Count  # memory to copy; a live migration copies pages that change again on top
    batch: Count  # moves of one batch run at the same time
    destination: Text = ""  # address it goes to; empty: any
    first_port: Port = MIGRATION_PORTS[0]  # it goes to a port from here
    last_port: Port = MIGRATION_PORTS[1]  # to here


class Migrations(Message, frozen=True, kw_only=True, tag="migrations"):
    """Client to central: migrations that run or will run. They replace what was announced of that plan before."""

    host: Name
    plan: Name
    flows: Annotated[list[MigrationFlow], msgspec.Meta(max_length=MAX_MIGRATIONS)]  # empty: the plan has ended
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)]  # then the announcement is forgotten


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Central to host: why its messages are not accepted (for example an identity that is not its key's)."""

    reason: Text


class Identify(Message, frozen=True, kw_only=True, tag="identify"):
    """Central to host: a report came from a host it does not know (central has restarted); say Hello."""


class Ack(Message, frozen=True, kw_only=True, tag="ack"):
    """Central to host, every few seconds: central is alive, and this is the newest epoch for this host."""

    epoch: Count  # 0: central has not decided anything for its group yet
    follows_long_flows: bool = False  # as in `Policy`


FromHost = Hello | Report | LongFlows | PlanPart | Migrations
FromCentral = Policy | Verdicts | Refused | Identify | Ack | PlanAnswer

_MessageT = TypeVar("_MessageT")
_encoder = msgspec.msgpack.Encoder()
_from_host: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost)
_from_central: msgspec.msgpack.Decoder[FromCentral] = msgspec.msgpack.Decoder(FromCentral)


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    version: int
    body: msgspec.Raw


_envelope = msgspec.msgpack.Decoder(_Envelope)


def encode(message: Message) -> bytes:
    """A message with its envelope, as bytes for one ZeroMQ frame."""
    return _encoder.encode(_Envelope(PROTOCOL_VERSION, msgspec.Raw(_encoder.encode(message))))


def decode_from_host(frame: bytes) -> FromHost | None:
    """What a host sent, or None if it is not a valid message of this protocol version."""
    return _decode(frame, _from_host)


def decode_from_central(frame: bytes) -> FromCentral | None:
    """What central sent, or None if it is not a valid message of this protocol version."""
    return _decode(frame, _from_central)


def _decode(frame: bytes, decoder: msgspec.msgpack.Decoder[_MessageT]) -> _MessageT | None:
    if len(frame) > MAX_MESSAGE_BYTES:
        return None
    try:
        envelope = _envelope.decode(frame)
        return decoder.decode(envelope.body) if envelope.version == PROTOCOL_VERSION else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
