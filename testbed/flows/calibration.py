"""What a flow's completion time is when it is alone on the path: the yardstick of slowdown, measured, not computed.

Flows of a few log-spaced sizes are sent one at a time through the idle star, each size several times; the smallest
time of a size is its ideal FCT (nothing on a machine makes a flow faster than the path allows; much makes it slower).
Between the sizes, ideal FCT is interpolated linearly in size, which is how time grows on a link; beyond what the link
carries in a quarter of a second, where only its rate counts, it is continued so.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import FabricpilotError
from testbed.flows.protocol import MIN_FLOW_BYTES
from testbed.flows.recorded import RecordedTrace
from testbed.flows.replay import Progress, replay
from testbed.flows.results import Results
from testbed.netns.programs import Programs
from testbed.netns.star import StarPlan

SIZES = 10
REPEATS = 7
_PAUSE_S = 0.015  # between flows, beyond twice the time the link needs
_DRAIN_S = 3.0
_LONGEST_S = 0.25  # what a flow may take on the link to be measured


@dataclass(frozen=True)
class Calibration:
    """Ideal FCT at a few sizes, both ascending; shape (n,) each."""

    size_bytes: tuple[int, ...]
    fct_ns: tuple[int, ...]

    def ideal_ns(self, size_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Ideal FCT of each size in nanoseconds (shape kept); beyond the largest it goes on as between the last two."""
        (size_a, size_b), (fct_a, fct_b) = self.size_bytes[-2:], self.fct_ns[-2:]
        beyond_ns = np.maximum(0, size_bytes - size_b) * (fct_b - fct_a) / (size_b - size_a)
        ideal: npt.NDArray[np.float64] = np.interp(size_bytes, self.size_bytes, self.fct_ns) + beyond_ns
        return ideal

    @property
    def base_fct_us(self) -> float:
        """FCT of the smallest flow alone: connection set-up, one packet, the answer, and what the processes cost."""
        return self.fct_ns[0] / 1e3


def calibration_trace(max_size_bytes: int, rate_bps: int, senders: int) -> RecordedTrace:
    """Flows one at a time: `SIZES` log-spaced sizes up to the largest worth measuring, each `REPEATS` times."""
    largest = max(10 * MIN_FLOW_BYTES, min(max_size_bytes, _LONGEST_S * rate_bps / 8))
    ladder = np.unique(np.rint(np.geomspace(MIN_FLOW_BYTES, largest, SIZES)))
    sizes = np.repeat(ladder.astype(np.int64), REPEATS)
    gaps_s = 2 * sizes * 8 / rate_bps + _PAUSE_S
    start_ns = np.concatenate(([0], np.rint(np.cumsum(gaps_s)[:-1] * 1e9))).astype(np.int64)
    return RecordedTrace(start_ns, sizes, np.arange(len(sizes)) % senders)


def calibrate(
    star: StarPlan,
    programs: Programs,
    max_size_bytes: int,
    rate_bps: int,
    out_dir: Path,
    progress: Progress | None = None,
) -> Calibration:
    """Measure on the idle star, with the bottleneck already shaped.

    Raises:
        FabricpilotError: a flow got lost on the idle path.
    """
    trace = calibration_trace(max_size_bytes, rate_bps, star.senders)
    return from_results(replay(star, programs, trace, out_dir, drain_s=_DRAIN_S, progress=progress))


def from_results(results: Results) -> Calibration:
    """The calibration that the results of a calibration trace give.

    Raises:
        FabricpilotError: a flow got lost.
    """
    if results.lost:
        why = next(iter(results.losses.values()), "deadline")
        raise FabricpilotError(f"calibration lost {results.lost} flows on the idle path ({why}); look at the logs")
    sizes = np.unique(results.trace.size_bytes)
    best = [int(results.fct_ns[results.trace.size_bytes == size].min()) for size in sizes]
    return Calibration(tuple(sizes.tolist()), tuple(np.maximum.accumulate(best).tolist()))
