"""What a testbed run is to be: all its parameters, checked, and what follows from them."""

from dataclasses import dataclass

from fabricpilot.errors import UsageError
from testbed.flows.recorded import Recipe
from testbed.netns.star import MAX_SENDERS, MIN_SEND_BUFFER_BYTES
from testbed.schemes import DSCP

# Short names for the distributions people ask for most; any name of `simulator.workloads` works too.
WORKLOADS = {
    "websearch": "websearch_dctcp_bytes_trafficgenerator",
    "datamining": "datamining_vl2_bytes_trafficgenerator",
    "hadoop": "facebook_hadoop_bytes_hpcc",
    "cache": "facebook_cache_raw_trafficgenerator",
}

_MAX_CAPTURED = 1_000_000  # packets; 256 MB of ring
_CAPTURE_BEGINS = 0.4  # of the duration: late enough for learned thresholds, early enough to see them change
_CAPTURE_S = 5.0


@dataclass(frozen=True)
class RunPlan:
    """Parameters of a run.

    Attributes:
        workload: flow-size distribution, a name of `WORKLOADS` or of `simulator.workloads`.
        load: payload over the bottleneck's rate.
        duration_s: time in which flows arrive.
        seed: of the trace.
        senders: sending hosts.
        rate_bps: of the bottleneck.
        buffer_bytes: what the bottleneck's port queues in all.
        scale: factor on the distribution's sizes.
        decision_s: how often central decides.
        send_buffer_bytes: what a connection's send buffer holds from its beginning; 0: as Linux has it.

    Raises:
        UsageError: a value out of bounds, naming the option.
    """

    workload: str = "websearch"
    load: float = 0.8
    duration_s: float = 75.0
    seed: int = 1
    senders: int = 4
    rate_bps: int = 200_000_000
    buffer_bytes: int = 256_000
    scale: float = 0.1
    decision_s: float = 5.0
    send_buffer_bytes: int = 0

    def __post_init__(self) -> None:
        _check("--load", self.load, 0.01, 0.99)
        _check("--duration", self.duration_s, 1, 3600)
        _check("--seed", self.seed, 0, 2**63 - 1)
        _check("--senders", self.senders, 1, MAX_SENDERS)
        _check("--rate", self.rate_bps, 10_000_000, 2_000_000_000)
        _check("--buffer", self.buffer_bytes, 1500 * len(DSCP), 100_000_000)
        _check("--scale", self.scale, 1e-4, 10)
        _check("--decision-interval", self.decision_s, 0.1, 3600)
        if self.send_buffer_bytes:
            _check("--send-buffer", self.send_buffer_bytes, MIN_SEND_BUFFER_BYTES, 1 << 30)

    @property
    def recipe(self) -> Recipe:
        """How to make the trace."""
        return Recipe(
            workload=WORKLOADS.get(self.workload, self.workload),
            load=self.load,
            rate_bps=self.rate_bps,
            scale=self.scale,
            duration_s=self.duration_s,
            senders=self.senders,
            seed=self.seed,
        )

    @property
    def capture_begins_s(self) -> float:
        """When the capture begins, from the start of the traffic."""
        return self.duration_s * _CAPTURE_BEGINS

    @property
    def capture_packets(self) -> int:
        """How many packets the capture has room for: twice what the link can carry in its time, at 1000 bytes each."""
        return min(_MAX_CAPTURED, max(20_000, int(2 * self.rate_bps / 8 / 1000 * self.capture_s)))

    @property
    def capture_s(self) -> float:
        """How long the capture lasts; less on a fast link, where the ring is full sooner."""
        return min(_CAPTURE_S, self.duration_s * 0.3, _MAX_CAPTURED * 1000 * 8 / (2 * self.rate_bps))

    def drain_s(self, largest_bytes: int) -> float:
        """How long after the last arrival flows may still complete; those that do not are lost."""
        return 20.0 + 10 * largest_bytes * 8 / self.rate_bps


def _check(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{option} {value:g} must be {low:g} to {high:g}")
