"""What came of every flow of a trace, and its table on disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from testbed.flows.recorded import RecordedTrace

LOST = -1  # in `fct_ns`: not completed by the deadline


@dataclass(frozen=True, eq=False)
class Results:
    """One row per flow of the trace; arrays of shape (n,).

    Attributes:
        trace: the flows.
        fct_ns: int64, from scheduled start to the receiver's answer; `LOST` if that never came.
        late_ns: int64, how long after its scheduled start the generator really began the flow; `LOST` if it never did.
        losses: why flows were lost, {flow: reason}, for those that said so.
    """

    trace: RecordedTrace
    fct_ns: npt.NDArray[np.int64]
    late_ns: npt.NDArray[np.int64]
    losses: dict[int, str]

    @property
    def completed(self) -> npt.NDArray[np.bool_]:
        """Which flows completed."""
        done: npt.NDArray[np.bool_] = self.fct_ns != LOST
        return done

    @property
    def lost(self) -> int:
        """How many flows did not complete."""
        return int((~self.completed).sum())

    @property
    def late_p99_us(self) -> float:
        """99th percentile of the generator's lateness; it is part of every FCT."""
        began = self.late_ns[self.late_ns != LOST]
        return float(np.percentile(began, 99)) / 1e3 if len(began) else float("nan")

    def save(self, path: Path) -> None:
        """Write the table as CSV; a lost flow has no completion time."""
        with path.open("w") as file:
            file.write("flow,start_ns,size_bytes,sender,late_ns,fct_ns,lost\n")
            trace = self.trace
            columns = (trace.start_ns, trace.size_bytes, trace.sender, self.late_ns, self.fct_ns)
            for flow, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                start_ns, size_bytes, sender, late_ns, fct_ns = row
                reason = "" if fct_ns != LOST else self.losses.get(flow, "deadline").replace(",", ";")
                fct = "" if fct_ns == LOST else fct_ns
                file.write(f"{flow},{start_ns},{size_bytes},{sender},{late_ns},{fct},{reason}\n")
