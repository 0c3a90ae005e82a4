"""The model against PIAS's real 1 GbE testbed. One set of constants for all files."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fabricpilot.levels import Thresholds
from simulator.engine import simulate
from simulator.physics import IDEAL
from simulator.results import FlowResults
from simulator.schemes import Scheme, scheme
from simulator.topology import star
from simulator.workloads.tracefile import read_trace

sys.path.insert(0, str(Path(__file__).parent))
from reference import least_attained_first

PIAS = {"websearch": Thresholds.of([965_816]), "datamining": Thresholds.of([6 * 1024])}
FILES = ["websearch_5", "websearch_7", "datamining_5", "datamining_7"]


def run(folder: Path, file: str, ranks: Scheme) -> FlowResults:
    trace = read_trace(folder / f"{file}_trace.txt", "pias")
    return simulate(trace, ranks, star(16, 1e9))


@pytest.mark.parametrize("kind", ["dctcp", "pias"])
@pytest.mark.parametrize("file", FILES)
def test_completion_times_of_the_real_testbed(testbed_traces: Path, file: str, kind: str) -> None:
    lines = (testbed_traces / f"{file}_{kind}_result.txt").read_text().splitlines()
    real_us = np.array([float(line.split()[2]) for line in lines if line.strip()])
    ranks = scheme("fair") if kind == "dctcp" else scheme("mlfq", thresholds=PIAS[file.split("_")[0]])
    found = run(testbed_traces, file, ranks)
    assert len(found) == len(real_us) == 3000
    assert found.fct_s.mean() * 1e6 == pytest.approx(real_us.mean(), rel=0.06)
    small = found.size_bytes <= 100 * 1024
    assert found.fct_s[small].mean() * 1e6 == pytest.approx(real_us[small].mean(), rel=0.25)


def test_what_is_to_be_gained(testbed_traces: Path) -> None:
    """Web search at load 0.7 against fair sharing; the testbed's PIAS measured 3.9 %."""
    fair = run(testbed_traces, "websearch_7", scheme("fair")).fct_s.mean()

    def gain(ranks: Scheme) -> float:
        return float(1 - run(testbed_traces, "websearch_7", ranks).fct_s.mean() / fair)

    trace = read_trace(testbed_traces / "websearch_7_trace.txt", "pias")
    fluid = simulate(trace, scheme("fair"), star(16, 1e9), IDEAL).fct_s.mean()
    las = least_attained_first(trace.start_s, trace.size_bytes, 1e9 / 8).mean()
    assert 0.065 < 1 - las / fluid < 0.08  # an exact replay that knows nothing of levels
    assert 0.055 < gain(scheme("las")) < 0.08
    assert 0.07 < gain(scheme("mlfq")) < 0.12
    best_k8 = Thresholds.of([401, 19_421, 82_949, 249_634, 1_079_256, 1_430_023, 9_480_841])
    assert 0.035 < gain(scheme("mlfq", thresholds=PIAS["websearch"])) < 0.06
    assert 0.08 < gain(scheme("mlfq", thresholds=best_k8)) < 0.12
    assert gain(scheme("backlog")) > 0.25
    assert 0.18 < gain(scheme("backlog", send_buffer_bytes=2e6)) < gain(scheme("backlog"))
    assert 0.40 < gain(scheme("srpt")) < 0.50
