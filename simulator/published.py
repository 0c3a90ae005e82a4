"""Demotion thresholds as published, in bytes: facts to compare with.

Sources: the simulation and testbed configurations released with PIAS (Bai et al., NSDI 2015; ToN 2017). Its simulations
count packets of 1460 bytes, its kernel module bytes and KiB.
"""

from dataclasses import dataclass

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds

_PACKET = 1460
_KIB = 1024


@dataclass(frozen=True)
class Published:
    """One published vector: workload (websearch, datamining), load it is meant for (None: not stated), thresholds."""

    workload: str
    load: float | None
    thresholds: Thresholds
    source: str


def _of(workload: str, load: float | None, source: str, unit: int, *counts: int) -> Published:
    return Published(workload, load, Thresholds.of(count * unit for count in counts), source)


_NS2_WEB = "PIAS simulation, web search"
_NS2_MINING = "PIAS simulation, data mining"
_TESTBED = "PIAS testbed kernel module"
PUBLISHED: tuple[Published, ...] = (
    _of("websearch", 0.9, _NS2_WEB, _PACKET, 759, 1132, 1456, 1737, 2010, 2199, 2325),
    _of("websearch", 0.8, _NS2_WEB, _PACKET, 909, 1329, 1648, 1960, 2143, 2337, 2484),
    _of("websearch", 0.7, _NS2_WEB, _PACKET, 999, 1305, 1564, 1763, 1956, 2149, 2309),
    _of("websearch", 0.6, _NS2_WEB, _PACKET, 956, 1381, 1718, 2028, 2297, 2551, 2660),
    _of("websearch", 0.5, _NS2_WEB, _PACKET, 1059, 1412, 1643, 1869, 2008, 2115, 2184),
    _of("datamining", 0.9, _NS2_MINING, _PACKET, 750, 1083, 1416, 13705, 14952, 21125, 28253),
    _of("datamining", 0.8, _NS2_MINING, _PACKET, 745, 1083, 1391, 13689, 14936, 21149, 27245),
    _of("datamining", 0.7, _NS2_MINING, _PACKET, 907, 1301, 1619, 12166, 12915, 21313, 26374),
    _of("datamining", 0.6, _NS2_MINING, _PACKET, 840, 1232, 1617, 11950, 12238, 21494, 25720),
    _of("datamining", 0.5, _NS2_MINING, _PACKET, 805, 1106, 1401, 10693, 11970, 21162, 22272),
    _of("websearch", None, _TESTBED, 1, 965_816),
    _of("datamining", None, _TESTBED, _KIB, 6),
    _of("datamining", 0.8, _TESTBED, _KIB, 1, 9, 167),
    _of("datamining", None, _TESTBED, _KIB, 1, 8, 80, 122, 130, 132, 133),
    _of("websearch", None, f"{_TESTBED}, equal split", _KIB, 72),
    _of("websearch", None, f"{_TESTBED}, equal split", _KIB, 24, 72, 1448),
    _of("websearch", None, f"{_TESTBED}, optimised", _KIB, 70, 1785, 3180),
    _of("websearch", None, f"{_TESTBED}, optimised", _KIB, 65, 1491, 2257, 2814, 2880, 2896, 3000),
)


def published_thresholds(workload: str, load: float, levels: int) -> Published:
    """The published vector for a workload and K nearest in load; one with a stated load is preferred.

    Raises:
        UsageError: nothing was published for that workload and K.
    """
    fitting = [p for p in PUBLISHED if p.workload == workload and p.thresholds.levels == levels]
    if not fitting:
        known = sorted({(p.workload, p.thresholds.levels) for p in PUBLISHED})
        raise UsageError(
            f"no published thresholds for workload '{workload}' with {levels} levels; "
            f"there are: {', '.join(f'{w} {k}' for w, k in known)}"
        )
    return min(fitting, key=lambda p: 1.0 if p.load is None else abs(p.load - load))


def workload_of(name: str) -> str:
    """`websearch` or `datamining`: which published thresholds belong to a distribution or trace of that name.

    Names that say neither get `websearch`, the thresholds a mismatched PIAS would run with.
    """
    return "datamining" if "mining" in name.lower() or "vl2" in name.lower() else "websearch"
