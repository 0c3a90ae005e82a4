"""A trace on disk: made once from a seed, then the same arrivals are replayed under every scheme.

CSV with one line of JSON on top (how it was made): a person, a spreadsheet and the sender processes read it alike.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from fabricpilot.errors import UsageError
from testbed.flows.protocol import MIN_FLOW_BYTES


@dataclass(frozen=True)
class Recipe:
    """How a trace is made; the same recipe makes the same trace.

    Attributes:
        workload: name of the flow-size distribution.
        load: payload over link rate that is asked for.
        rate_bps: rate of the bottleneck.
        scale: factor on every flow size of the distribution, so that enough flows fit into a short run.
        duration_s: time in which flows arrive.
        senders: number of hosts; each flow comes from a random one.
        seed: of all of it.
    """

    workload: str
    load: float
    rate_bps: int
    scale: float
    duration_s: float
    senders: int
    seed: int


@dataclass(frozen=True, eq=False)
class RecordedTrace:
    """Flows in order of their start; arrays of shape (n,), flow i is row i.

    Attributes:
        start_ns: int64, from the beginning of the run.
        size_bytes: int64, payload bytes as sent (scaled).
        sender: int64, number of the sending host.
        recipe: how it was made; None for one that came from no distribution.
    """

    start_ns: npt.NDArray[np.int64]
    size_bytes: npt.NDArray[np.int64]
    sender: npt.NDArray[np.int64]
    recipe: Recipe | None = None

    def __len__(self) -> int:
        return len(self.start_ns)

    @property
    def offered_load(self) -> float:
        """Payload over what the bottleneck carries in the recipe's duration: what the seed really gave."""
        assert self.recipe is not None
        return float(self.size_bytes.sum() * 8 / (self.recipe.rate_bps * self.recipe.duration_s))

    def save(self, path: Path) -> None:
        """Write the trace as CSV."""
        with path.open("w") as file:
            file.write(f"# {json.dumps(asdict(self.recipe) if self.recipe else None)}\n")
            file.write("flow,start_ns,size_bytes,sender\n")
            file.writelines(self._rows())

    @classmethod
    def read(cls, path: Path) -> "RecordedTrace":
        """Read what `save` wrote.

        Raises:
            UsageError: not such a file.
        """
        try:
            lines = path.read_text().splitlines()
            recipe = msgspec.json.decode(lines[0].removeprefix("# "), type=Recipe | None)
            table = np.array([line.split(",") for line in lines[2:]], np.int64).reshape(-1, 4)
        except (OSError, IndexError, ValueError, msgspec.MsgspecError) as error:
            raise UsageError(f"cannot read the trace {path}: {error}") from error
        return cls(table[:, 1].copy(), table[:, 2].copy(), table[:, 3].copy(), recipe)

    def _rows(self) -> Iterator[str]:
        columns = (self.start_ns.tolist(), self.size_bytes.tolist(), self.sender.tolist())
        for flow, (start_ns, size_bytes, sender) in enumerate(zip(*columns, strict=True)):
            yield f"{flow},{start_ns},{size_bytes},{sender}\n"


def make_trace(recipe: Recipe) -> RecordedTrace:
    """Open-loop Poisson arrivals with sizes from the recipe's distribution, each from a random sender.

    Raises:
        UsageError: unknown distribution, or a load, scale or duration that makes no sense.
    """
    from simulator.workloads.arrivals import poisson
    from simulator.workloads.distribution import SizeDistribution

    sizes = SizeDistribution.load(recipe.workload).scaled(recipe.scale)
    rng = np.random.default_rng(recipe.seed)
    arrivals = poisson(sizes, recipe.load, recipe.rate_bps, rng, duration_s=recipe.duration_s)
    return RecordedTrace(
        start_ns=np.rint(arrivals.start_s * 1e9).astype(np.int64),
        size_bytes=np.maximum(arrivals.size_bytes, MIN_FLOW_BYTES),
        sender=rng.integers(0, recipe.senders, len(arrivals.start_s)),
        recipe=recipe,
    )
