"""What the fluid model leaves out, as a few physical constants: headers, round trips, slow start, standing queues.

The kernels move payload as a fluid. A flow's completion time is that fluid's time plus a latency found here, from its
size and from how many peers it met in its queue (`peers`):

    fct = fluid - newcomer gain + base + queue + slow start

- base: one request over an idle path and both hosts.
- queue: a queue that several senders share stands at the ECN marking threshold (DCTCP) or at the buffer (drop tail),
  but holds no more than they have left to send; with one peer half of that, since two flows only sometimes fill it.
- slow start: a window that starts at `initial_window` segments and grows by `window_growth` per round trip leaves the
  link idle for `rtt + queue - window` in every round until it covers that round trip.
- newcomer gain: among many peers a new flow's first windows are larger than a fair share. It gets at least one part in
  `newcomer_share` of the link, until it is `newcomer_bytes` ahead of fair sharing.

The constants were found once, on flows that met no other flow (base, rtt, window) and on small flows that met some
(queue, newcomer), of the real 1 GbE testbed of PIAS (Bai et al., NSDI 2015); `docs/simulator.md` has the errors.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from fabricpilot.errors import UsageError
from simulator.arrays import Floats, Ints


@dataclass(frozen=True)
class Physics:
    """Constants of hosts, links and transport; see the module's text. All are for every flow of a run."""

    segment_bytes: int = 1448  # payload of a full segment: MTU 1500 less IPv4, TCP and timestamps
    wire_bytes: int = 1538  # the same segment on the wire: with Ethernet header, FCS, preamble and gap
    base_latency_s: float = 155e-6
    rtt_s: float = 165e-6  # as the sender's window sees it, interrupt moderation included
    initial_window: float = 3.0  # segments
    window_growth: float = 1.5  # per round trip; delayed acknowledgements make it less than 2
    standing_queue: float = 1.0  # share of the scheme's standing queue that counts; 0 for none
    newcomer_share: float = 3.5
    newcomer_bytes: float = 350e3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{field.name} = {value}; it must be a number from 0")
        if not 0 < self.segment_bytes <= self.wire_bytes:
            raise UsageError(
                f"a segment of {self.segment_bytes} bytes does not fit {self.wire_bytes} bytes on the wire"
            )
        if self.initial_window <= 0 or self.window_growth < 1 or self.newcomer_share < 1:
            raise UsageError("initial_window must be above 0, window_growth and newcomer_share at least 1")

    def goodput(self, rate_bps: float) -> float:
        """Payload bytes per second of a link of `rate_bps`."""
        return rate_bps / 8 * self.segment_bytes / self.wire_bytes


_ROUNDING = 1e-9  # a window that ends a flow exactly is its last, whatever the logarithm's last digit says

# The fluid alone: no headers, no latency, no queues, no transport.
IDEAL = Physics(segment_bytes=1, wire_bytes=1, base_latency_s=0.0, rtt_s=0.0, standing_queue=0.0, newcomer_bytes=0.0)


def completion_s(
    physics: Physics,
    fluid_s: Floats,
    size_bytes: Floats,
    peers: Ints,
    queued_bytes: Floats,
    goodput: Floats | float,
) -> Floats:
    """Completion times from the fluid's, all arrays of shape (n,).

    Args:
        physics: the constants.
        fluid_s: time in the fluid model, seconds.
        size_bytes: payload of each flow.
        peers: most flows that were in its level when it entered one.
        queued_bytes: most that stood in the queue it entered (payload; `rank.standing`).
        goodput: payload bytes per second of the narrowest link on the path, also one number for all.
    """
    queue_s = physics.standing_queue * queued_bytes / goodput
    alone_s = size_bytes / goodput
    gain_s = (peers + 1 - physics.newcomer_share) * alone_s
    gain_s = np.minimum(np.minimum(gain_s, physics.newcomer_bytes / goodput), fluid_s - alone_s)
    result: Floats = (
        fluid_s
        - np.maximum(gain_s, 0.0)
        + (physics.base_latency_s + queue_s)
        + slow_start_s(physics, size_bytes, queue_s, goodput)
    )
    return result


def slow_start_s(physics: Physics, size_bytes: Floats, queue_s: Floats, goodput: Floats | float) -> Floats:
    """Seconds the link waits for a flow's window to open, shape (n,).

    After the window number k (from 0, w0 g^k bytes) the link waits max(round trip - w0 g^k / goodput, 0), if it was not
    the flow's last window: a geometric sum over as many windows as are too small and not the last.
    """
    round_trip_s = physics.rtt_s + queue_s
    first, growth = physics.initial_window * physics.segment_bytes, physics.window_growth
    first_s = first / goodput
    if growth == 1:
        windows = np.maximum(np.ceil(size_bytes / first) - 1, 0.0)
        every: Floats = windows * np.maximum(round_trip_s - first_s, 0.0)
        return every
    needed = np.log1p(size_bytes * ((growth - 1) / first)) / math.log(growth) - 1
    small = np.log(np.maximum(round_trip_s / first_s, 1.0)) / math.log(growth)
    waits = np.maximum(np.ceil(np.minimum(needed, small) - _ROUNDING), 0.0)
    idle_s: Floats = waits * round_trip_s - first_s * ((growth**waits - 1) / (growth - 1))
    return idle_s


def ideal_s(physics: Physics, size_bytes: Floats, goodput: Floats | float) -> Floats:
    """Completion time of a flow alone on its path, the denominator of its slowdown; shape (n,)."""
    ideal: Floats = size_bytes / goodput + physics.base_latency_s
    return ideal + slow_start_s(physics, size_bytes, np.zeros(len(size_bytes)), goodput)
