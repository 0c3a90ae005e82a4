"""Flow-size distributions: the published ones by name, anybody's from a file, and the measured ones from histograms.

Workload generators draw flow sizes from here, and the threshold optimisers take their moments from here. A
distribution is a piecewise-linear CDF through the points (size, probability of at most that size). Two points of one
size make an atom (a vertical step); probability at the first point is an atom too. Mean, quantiles and samples all
follow that one reading. The bundled tables lie in `tables/`, one TOML file each, and say what paper they come from.
"""

import math
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram, bin_edges

UNIT_BYTES = {"bytes": 1, "kb": 1000, "kib": 1024, "pkts1460": 1460}  # what one unit of a CDF file's first column is

_LAST_PROBABILITY = 1e-6  # published tables end at 0.999999x or 1.000001 by rounding; more is a mistake

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SizeDistribution:
    """Flow sizes as a piecewise-linear CDF.

    Attributes:
        name: what results call it; for the bundled tables the published file's name without `.txt`.
        sizes_bytes: float64, shape (n,), non-decreasing, not negative; equal neighbours are an atom.
        cdf: float64, shape (n,), non-decreasing, from at least 0 to exactly 1.
        source: the paper and the file the numbers come from.

    Raises:
        UsageError: fewer than one point, not finite, not ascending, not reaching 1, or nothing above 0 bytes.
    """

    name: str
    sizes_bytes: Floats
    cdf: Floats
    source: str = ""

    def __post_init__(self) -> None:
        sizes = np.array(self.sizes_bytes, np.float64)
        cdf = np.array(self.cdf, np.float64)
        _check_points(self.name, sizes, cdf)
        cdf[-1] = 1.0
        sizes.flags.writeable = cdf.flags.writeable = False
        object.__setattr__(self, "sizes_bytes", sizes)
        object.__setattr__(self, "cdf", cdf)

    @classmethod
    def load(cls, name: str) -> "SizeDistribution":
        """A bundled distribution by name (`names()`), or a CDF file by its path.

        Raises:
            UsageError: neither a bundled name nor a file, or the file is not a CDF.
        """
        bundled = name.removesuffix(".txt")
        if bundled in names():
            return _bundled(bundled)
        path = Path(name)
        if path.is_file():
            return cls.from_file(path, unit="pkts1460" if "pkts1460" in path.name else "bytes")
        raise UsageError(f"flow-size distribution '{name}' is unknown; give a CDF file or one of: {', '.join(names())}")

    @classmethod
    def from_file(cls, path: Path | str, unit: str = "bytes") -> "SizeDistribution":
        """A distribution from a text file of lines `size cumulative_probability`; `#` starts a comment.

        Args:
            path: the file; spaces, tabs or a comma separate the two columns. A third column (the ns-2 format
                `size count probability`) is accepted, its last one counts.
            unit: of the first column: bytes, kb (1000), kib (1024) or pkts1460 (packets of 1460 bytes).

        Raises:
            UsageError: unreadable, empty, not numbers, NaN, not ascending or not reaching 1; names the line.
        """
        path = Path(path)
        if unit not in UNIT_BYTES:
            raise UsageError(f"unit '{unit}' of {path} is unknown; choose one of {', '.join(UNIT_BYTES)}")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the CDF file {path}: {error}") from error
        points = [point for number, line in enumerate(lines, 1) if (point := _point(line, f"{path}:{number}"))]
        sizes = np.array([size for size, _ in points], np.float64) * UNIT_BYTES[unit]
        return cls(path.stem, sizes, np.array([probability for _, probability in points], np.float64), str(path))

    @classmethod
    def from_histogram(cls, histogram: LogHistogram, name: str) -> "SizeDistribution":
        """What a log-histogram of sizes in bytes says: uniform inside each of its bins.

        Raises:
            UsageError: the histogram is empty.
        """
        if histogram.total == 0:
            raise UsageError(f"the size histogram '{name}' is empty; a distribution needs at least one finished flow")
        occupied = np.flatnonzero(histogram.counts)
        first, last = int(occupied[0]), int(occupied[-1])
        cumulative = np.concatenate(([0.0], np.cumsum(histogram.counts[first : last + 1]) / histogram.total))
        return cls(name, bin_edges()[first : last + 2], cumulative, "histogram of reported flows")

    @cached_property
    def mean_bytes(self) -> float:
        """Mean flow size: atoms at their size, the middle of each linear piece otherwise."""
        middles = (self.sizes_bytes[1:] + self.sizes_bytes[:-1]) / 2
        return float(self.cdf[0] * self.sizes_bytes[0] + np.diff(self.cdf) @ middles)

    @property
    def max_bytes(self) -> float:
        """The largest size."""
        return float(self.sizes_bytes[-1])

    def cdf_at(self, size_bytes: npt.ArrayLike) -> Floats:
        """P(X <= size), atoms included (right-continuous); shape kept."""
        x = np.asarray(size_bytes, np.float64)
        right = np.searchsorted(self.sizes_bytes, x, side="right")  # first point beyond x
        low = np.clip(right - 1, 0, None)
        high = np.minimum(right, len(self.cdf) - 1)
        width = self.sizes_bytes[high] - self.sizes_bytes[low]
        share = np.divide(x - self.sizes_bytes[low], width, out=np.zeros_like(x), where=width > 0)
        inside = self.cdf[low] + np.clip(share, 0, 1) * (self.cdf[high] - self.cdf[low])
        result: Floats = np.where(right == 0, 0.0, inside)
        return result

    def quantile(self, u: npt.ArrayLike) -> Floats:
        """Size in bytes at the cumulative probability `u` in [0, 1]; shape kept."""
        result: Floats = np.interp(np.asarray(u, np.float64), self.cdf, self.sizes_bytes)
        return result

    def sample(self, rng: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
        """`n` sizes in whole bytes, at least 1, by inversion; int64, shape (n,)."""
        sizes: npt.NDArray[np.int64] = np.maximum(np.rint(self.quantile(rng.random(n))), 1).astype(np.int64)
        return sizes

    def scaled(self, factor: float) -> "SizeDistribution":
        """The same shape with every size multiplied by `factor`.

        Raises:
            UsageError: the factor is not a positive number.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise UsageError(f"factor {factor} for distribution '{self.name}' must be a positive number")
        return SizeDistribution(f"{self.name} x {factor:g}", self.sizes_bytes * factor, self.cdf, self.source)


def names() -> tuple[str, ...]:
    """Names of the bundled distributions, sorted."""
    return tuple(
        sorted(entry.name.removesuffix(".toml") for entry in _tables().iterdir() if entry.name[-5:] == ".toml")
    )


def _tables() -> "Path":
    return Path(str(files("simulator.workloads"))) / "tables"


@cache
def _bundled(name: str) -> SizeDistribution:
    table = tomllib.loads((_tables() / f"{name}.toml").read_text(encoding="utf-8"))
    points = np.array(table["points"], np.float64)
    return SizeDistribution(name, points[:, 0] * UNIT_BYTES[table["unit"]], points[:, 1], table["source"])


def _point(line: str, where: str) -> tuple[float, float] | None:
    """(size, probability) of one line of a CDF file; None for an empty line."""
    columns = line.split("#")[0].replace(",", " ").split()
    if not columns:
        return None
    try:
        if len(columns) in (2, 3):
            return float(columns[0]), float(columns[-1])
    except ValueError:
        pass
    raise UsageError(f"{where}: '{line.strip()}' is not a point of a CDF; write 'size cumulative_probability'")


def _check_points(name: str, sizes: Floats, cdf: Floats) -> None:
    if sizes.ndim != 1 or sizes.shape != cdf.shape or len(sizes) == 0:
        raise UsageError(f"distribution '{name}' has no points; give lines of 'size cumulative_probability'")
    if not (np.isfinite(sizes).all() and np.isfinite(cdf).all()):
        raise UsageError(f"distribution '{name}' has a value that is not a finite number")
    for what, values in (("sizes", sizes), ("probabilities", cdf)):
        falls = np.flatnonzero(np.diff(values) < 0)
        if len(falls):
            at = int(falls[0])
            raise UsageError(
                f"distribution '{name}': {what} must ascend, but {values[at]:g} is followed by {values[at + 1]:g}"
            )
    if sizes[0] < 0 or cdf[0] < 0:
        raise UsageError(f"distribution '{name}' has a negative value; sizes and probabilities are 0 or more")
    if abs(cdf[-1] - 1) > _LAST_PROBABILITY:
        raise UsageError(f"distribution '{name}' ends at probability {cdf[-1]:g}; the last point must reach 1")
    if sizes[-1] <= 0:
        raise UsageError(f"distribution '{name}' has no size above 0 bytes")
