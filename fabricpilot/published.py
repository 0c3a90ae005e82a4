"""Thresholds others have published: facts to compare with, by workload, load and number of levels.

Schemes that run "as published" look them up here; nothing in the project tunes itself by them. PIAS is Bai et al.,
"Information-Agnostic Flow Scheduling for Commodity Data Centers", NSDI 2015; AuTO is Chen et al., SIGCOMM 2018 (its
figure 13, read off the plot).
"""

from dataclasses import dataclass
from typing import Literal

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds

_PACKET = 1460
_KIB = 1024


@dataclass(frozen=True)
class Published:
    """One published threshold vector.

    Attributes:
        kind: "optimised" (PIAS's optimiser, as PIAS released it), "equal-split", "default" (PIAS's software),
            "auto-learned" (AuTO's sRLA) or "auto-optimised" (PIAS's optimiser as AuTO's figure shows it).
        workload: "websearch" or "datamining", as the source calls it; empty where it is for any.
        load: the load it is for; None where the source does not say.
        thresholds: in bytes.
        source: where the numbers stand.
    """

    kind: str
    workload: str
    load: float | None
    thresholds: Thresholds
    source: str


def _row(kind: str, workload: str, load: float | None, unit: int, values: tuple[int, ...], source: str) -> Published:
    return Published(kind, workload, load, Thresholds.of(value * unit for value in values), source)


_NS2 = "PIAS, ns-2 scripts"
_TESTBED = "PIAS, testbed kernel module"
_AUTO = "AuTO, figure 13"

# The order is the order of preference among rows that fit a question equally well.
PUBLISHED: tuple[Published, ...] = (
    _row("optimised", "websearch", 0.5, _PACKET, (1059, 1412, 1643, 1869, 2008, 2115, 2184), _NS2),
    _row("optimised", "websearch", 0.6, _PACKET, (956, 1381, 1718, 2028, 2297, 2551, 2660), _NS2),
    _row("optimised", "websearch", 0.7, _PACKET, (999, 1305, 1564, 1763, 1956, 2149, 2309), _NS2),
    _row("optimised", "websearch", 0.8, _PACKET, (909, 1329, 1648, 1960, 2143, 2337, 2484), _NS2),
    _row("optimised", "websearch", 0.9, _PACKET, (759, 1132, 1456, 1737, 2010, 2199, 2325), _NS2),
    _row("optimised", "datamining", 0.5, _PACKET, (805, 1106, 1401, 10693, 11970, 21162, 22272), _NS2),
    _row("optimised", "datamining", 0.6, _PACKET, (840, 1232, 1617, 11950, 12238, 21494, 25720), _NS2),
    _row("optimised", "datamining", 0.7, _PACKET, (907, 1301, 1619, 12166, 12915, 21313, 26374), _NS2),
    _row("optimised", "datamining", 0.8, _PACKET, (745, 1083, 1391, 13689, 14936, 21149, 27245), _NS2),
    _row("optimised", "datamining", 0.9, _PACKET, (750, 1083, 1416, 13705, 14952, 21125, 28253), _NS2),
    _row("optimised", "websearch", None, 1, (965_816,), _TESTBED),
    _row("optimised", "websearch", None, _KIB, (70, 1785, 3180), _TESTBED),
    _row("optimised", "websearch", None, _KIB, (65, 1491, 2257, 2814, 2880, 2896, 3000), _TESTBED),
    _row("optimised", "datamining", None, _KIB, (6,), _TESTBED),
    _row("optimised", "datamining", 0.8, _KIB, (1, 9, 167), _TESTBED),
    _row("optimised", "datamining", None, _KIB, (1, 8, 80, 122, 130, 132, 133), _TESTBED),
    _row("auto-optimised", "websearch", 0.6, _PACKET, (5, 17, 87), _AUTO),
    _row("auto-optimised", "datamining", 0.6, _PACKET, (3, 60, 510), _AUTO),
    _row("auto-learned", "websearch", 0.6, _PACKET, (4, 12, 64), _AUTO),
    _row("auto-learned", "datamining", 0.6, _PACKET, (3, 60, 310), _AUTO),
    _row("equal-split", "websearch", None, _KIB, (72,), _TESTBED),
    _row("equal-split", "websearch", None, _KIB, (24, 72, 1448), _TESTBED),
    _row("default", "", None, _KIB, (100,), "PIAS, user-space software"),
)


def published(workload: str, levels: int, load: float, kind: str = "optimised") -> Published:
    """The published thresholds nearest in load, for K levels.

    Args:
        workload: "websearch" or "datamining", or the name of a flow-size distribution that starts with one of them.
        levels: K.
        load: where a source gives several loads, the nearest counts; one that names its load goes before one that
            does not.
        kind: see `Published`.

    Raises:
        UsageError: nothing was published for these.
    """
    rows = [row for row in PUBLISHED if workload.startswith(row.workload) and row.kind == kind]
    fitting = [row for row in rows if row.thresholds.levels == levels]
    if not fitting:
        of_kind = [row for row in PUBLISHED if row.kind == kind]
        known = sorted({f"{row.workload or 'any'} with {row.thresholds.levels}" for row in of_kind})
        if not known:
            kinds = ", ".join(sorted({row.kind for row in PUBLISHED}))
            raise UsageError(f"kind '{kind}' of published thresholds is unknown; choose one of {kinds}")
        raise UsageError(
            f"no {kind} thresholds are published for '{workload}' with {levels} levels; there are: {', '.join(known)}"
        )
    return min(fitting, key=lambda row: abs(row.load - load) if row.load is not None else 1.0)


def workload_of(name: str) -> Literal["websearch", "datamining"]:
    """`websearch` or `datamining`: which published thresholds belong to a distribution or trace of that name.

    Names that say neither get `websearch`, the thresholds a mismatched PIAS would run with.
    """
    return "datamining" if "mining" in name.lower() or "vl2" in name.lower() else "websearch"
