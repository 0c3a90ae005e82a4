"""The same flows at packet level in ns-3, to check the model against: DCTCP on a star, one receiver.

With thresholds every port has strict priority bands, each with its own ECN marking, and a packet's band is found from
the bytes its flow sent before it (its TCP sequence number): what PIAS's hosts and switches do together.

Needs the optional PyPI wheel `ns3` (GPL-2.0; it compiles its bindings while it runs, so the first call takes a minute).
Each flow is a new connection, so its handshake counts.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fabricpilot.errors import FabricpilotError, UsageError
from simulator.arrays import Floats
from simulator.physics import Physics
from simulator.schemes import Scheme
from simulator.workloads.trace import Trace

MARKING_PACKETS = 20  # DCTCP's K
INITIAL_WINDOW = 10
_BUFFER_PACKETS = 400
_FIRST_PORT = 10_000
_MOST_FLOWS = 50_000
_WIRE_BYTES = 1502  # 1448 payload, TCP with timestamps, IPv4, and PPP, which ns-3's point-to-point links speak


@dataclass(frozen=True, eq=False)
class PacketRun:
    """Completion times to the last byte, seconds, shape (n,), NaN where it was not seen; CPU time of the event loop."""

    fct_s: Floats
    cpu_s: float


def run_dctcp(
    trace: Trace, rate_bps: float, delay_s: float, thresholds: Sequence[int] = (), drain_s: float = 10.0
) -> PacketRun:
    """Run a trace whose flows all go to host 0, over links of `rate_bps` and `delay_s` each way.

    `thresholds` are bytes, ascending, between priority bands; none for one queue.

    Raises:
        FabricpilotError: ns3 is not installed.
        UsageError: flows to other hosts, or more than ports.
    """
    try:
        from ns import ns  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise FabricpilotError("ns-3 is not installed; pip install ns3 (optional)") from error
    if (trace.destination != 0).any() or len(trace) > _MOST_FLOWS:
        raise UsageError(f"give at most {_MOST_FLOWS} flows, all to host 0")
    _defaults(ns)
    if not hasattr(ns.cppyy.gbl, "fabricpilotWatch"):
        ns.cppyy.cppdef(_WATCHING)
    hosts = int(trace.source.max()) + 1
    nodes, receiver = _star(ns, hosts, rate_bps, delay_s, thresholds)
    applications = []  # ns-3 does not keep them alive for Python
    for flow, (start_s, size, source) in enumerate(zip(trace.start_s, trace.size_bytes, trace.source, strict=True)):
        port = _FIRST_PORT + flow
        anywhere = ns.InetSocketAddress(ns.Ipv4Address.GetAny(), port).ConvertTo()
        sink = ns.PacketSinkHelper("ns3::TcpSocketFactory", anywhere).Install(nodes.Get(0))
        sink.Start(ns.Seconds(0))
        ns.cppyy.gbl.fabricpilotWatch(sink.Get(0), flow)
        sender = ns.BulkSendHelper("ns3::TcpSocketFactory", ns.InetSocketAddress(receiver, port).ConvertTo())
        sender.SetAttribute("MaxBytes", ns.UintegerValue(int(size)))
        installed = sender.Install(nodes.Get(int(source)))
        installed.Start(ns.Seconds(float(start_s)))
        applications.append((sink, installed))
    began_s = time.process_time()
    ns.Simulator.Stop(ns.Seconds(float(trace.start_s[-1]) + drain_s))
    ns.Simulator.Run()
    cpu_s = time.process_time() - began_s
    received = np.array([list(flow) for flow in ns.cppyy.gbl.fabricpilotReceived])
    fct_s = np.where(received[:, 0] >= trace.size_bytes, received[:, 1] - trace.start_s, math.nan)
    ns.Simulator.Destroy()
    ns.Ipv4AddressGenerator.Reset()
    return PacketRun(fct_s, cpu_s)


def same_physics(rate_bps: float, delay_s: float, thresholds: Sequence[int] = ()) -> tuple[Physics, Scheme]:
    """Constants and scheme of our model for what `run_dctcp` simulates: known beforehand, not fitted."""
    packet_s = _WIRE_BYTES * 8 / rate_bps
    rtt_s = 4 * delay_s + 4 * packet_s  # two links each way, stored and forwarded
    physics = Physics(
        wire_bytes=_WIRE_BYTES,
        base_latency_s=1.5 * rtt_s,  # handshake, then the last byte one way
        rtt_s=rtt_s,
        initial_window=INITIAL_WINDOW,
        window_growth=2.0,
    )
    standing_bytes = float(MARKING_PACKETS * physics.segment_bytes)
    given = tuple(map(float, thresholds))
    return physics, Scheme("mlfq" if given else "fair", thresholds=given, queue_bytes=standing_bytes)


def _defaults(ns: Any) -> None:
    settings = {
        "ns3::TcpL4Protocol::SocketType": ns.StringValue("ns3::TcpDctcp"),
        "ns3::TcpSocket::SegmentSize": ns.UintegerValue(1448),
        "ns3::TcpSocket::InitialCwnd": ns.UintegerValue(INITIAL_WINDOW),
        "ns3::TcpSocket::SndBufSize": ns.UintegerValue(4 << 20),
        "ns3::TcpSocket::RcvBufSize": ns.UintegerValue(4 << 20),
        "ns3::TcpSocketBase::MinRto": ns.TimeValue(ns.MilliSeconds(10)),
        "ns3::RedQueueDisc::UseEcn": ns.BooleanValue(True),
        "ns3::RedQueueDisc::UseHardDrop": ns.BooleanValue(False),
        "ns3::RedQueueDisc::MeanPktSize": ns.UintegerValue(1500),
        "ns3::RedQueueDisc::MaxSize": ns.QueueSizeValue(ns.QueueSize(f"{_BUFFER_PACKETS}p")),
        "ns3::RedQueueDisc::QW": ns.DoubleValue(1),  # the queue as it is, not its average
        "ns3::RedQueueDisc::MinTh": ns.DoubleValue(MARKING_PACKETS),
        "ns3::RedQueueDisc::MaxTh": ns.DoubleValue(MARKING_PACKETS),
    }
    for name, value in settings.items():
        ns.Config.SetDefault(name, value)


def _star(ns: Any, hosts: int, rate_bps: float, delay_s: float, thresholds: Sequence[int]) -> tuple[Any, Any]:
    """Hosts around a switch: all nodes (the switch is the last), and the address of host 0."""
    nodes = ns.NodeContainer()
    nodes.Create(hosts + 1)
    ns.InternetStackHelper().Install(nodes)
    links = ns.PointToPointHelper()
    links.SetDeviceAttribute("DataRate", ns.StringValue(f"{round(rate_bps)}bps"))
    links.SetChannelAttribute("Delay", ns.StringValue(f"{round(delay_s * 1e9)}ns"))
    queues = ns.TrafficControlHelper()
    if thresholds:
        root = queues.SetRootQueueDisc("ns3::PrioQueueDisc")
        bands = queues.AddQueueDiscClasses(root, len(thresholds) + 1, "ns3::QueueDiscClass")
        queues.AddChildQueueDiscs(root, bands, "ns3::RedQueueDisc")
    else:
        queues.SetRootQueueDisc("ns3::RedQueueDisc")
    addresses, receiver = ns.Ipv4AddressHelper(), None
    for host in range(hosts):
        pair = ns.NodeContainer()
        pair.Add(nodes.Get(host))
        pair.Add(nodes.Get(hosts))
        devices = links.Install(pair)
        ports = queues.Install(devices)
        if thresholds:
            _rank_by_bytes_sent(ns, ports, thresholds)
        addresses.SetBase(ns.Ipv4Address(f"10.{host // 256 + 1}.{host % 256}.0"), ns.Ipv4Mask("255.255.255.0"))
        interfaces = addresses.Assign(devices)
        receiver = interfaces.GetAddress(0) if host == 0 else receiver
    ns.Ipv4GlobalRoutingHelper.PopulateRoutingTables()
    return nodes, receiver


def _rank_by_bytes_sent(ns: Any, ports: Any, thresholds: Sequence[int]) -> None:
    """Give these ports the filter that puts a packet into the band of the bytes its flow sent before it."""
    if not hasattr(ns.cppyy.gbl, "fabricpilotRank"):
        ns.cppyy.cppdef(_RANKING)
    ns.cppyy.gbl.fabricpilotRank(ports, ns.cppyy.gbl.std.vector["double"](list(map(float, thresholds))))


_WATCHING = """
    #include "ns3/application.h"
    #include "ns3/packet.h"
    std::vector<std::array<double, 2>> fabricpilotReceived;  // per flow: payload bytes so far, time of the last
    void fabricpilotSeen(uint32_t flow, ns3::Ptr<const ns3::Packet> packet, const ns3::Address&) {
      fabricpilotReceived[flow] = {fabricpilotReceived[flow][0] + packet->GetSize(),
                                   ns3::Simulator::Now().GetSeconds()};
    }
    void fabricpilotWatch(ns3::Ptr<ns3::Application> sink, uint32_t flow) {
      if (flow == 0) fabricpilotReceived.clear();
      fabricpilotReceived.resize(flow + 1);
      sink->TraceConnectWithoutContext("Rx", ns3::MakeBoundCallback(&fabricpilotSeen, flow));
    }"""

_RANKING = """
    #include "ns3/ipv4-packet-filter.h"
    #include "ns3/queue-disc-container.h"
    #include "ns3/tcp-header.h"
    class FabricpilotBand : public ns3::Ipv4PacketFilter {
     public:
      explicit FabricpilotBand(std::vector<double> thresholds) : m_thresholds(thresholds) {}
     private:
      int32_t DoClassify(ns3::Ptr<ns3::QueueDiscItem> item) const override {
        ns3::TcpHeader tcp;
        item->GetPacket()->PeekHeader(tcp);
        const double sent = double(tcp.GetSequenceNumber().GetValue()) - 1;  // the handshake takes number 0
        int32_t band = 0;
        for (double threshold : m_thresholds) band += sent >= threshold;
        return band;
      }
      std::vector<double> m_thresholds;
    };
    void fabricpilotRank(ns3::QueueDiscContainer ports, std::vector<double> thresholds) {
      for (uint32_t i = 0; i < ports.GetN(); ++i)
        ports.Get(i)->AddPacketFilter(ns3::CreateObject<FabricpilotBand>(thresholds));
    }"""
