"""Traces: one recipe, one trace; what is saved is what is read, by us and by the sender processes."""

from pathlib import Path

import numpy as np
import pytest

from fabricpilot.errors import UsageError
from testbed.flows.protocol import MIN_FLOW_BYTES
from testbed.flows.recorded import Recipe, RecordedTrace, make_trace
from testbed.flows.sender import read_share

RECIPE = Recipe(
    workload="websearch_dctcp_bytes_trafficgenerator",
    load=0.8,
    rate_bps=200_000_000,
    scale=0.1,
    duration_s=60.0,
    senders=4,
    seed=1,
)


def test_same_recipe_makes_the_same_trace_and_another_seed_another() -> None:
    first, again = make_trace(RECIPE), make_trace(RECIPE)
    other = make_trace(Recipe(**{**RECIPE.__dict__, "seed": 2}))
    for column in ("start_ns", "size_bytes", "sender"):
        np.testing.assert_array_equal(getattr(first, column), getattr(again, column))
    assert first.size_bytes[:50].tolist() != other.size_bytes[:50].tolist()


def test_arrivals_offer_the_load_that_was_asked_for() -> None:
    trace = make_trace(RECIPE)
    assert trace.offered_load == pytest.approx(0.8, rel=0.08)  # about 7,000 flows, sizes with CV 2: 2.4 % per sigma
    assert trace.start_ns[-1] < 60e9
    assert (np.diff(trace.start_ns) >= 0).all()
    assert set(trace.sender.tolist()) == {0, 1, 2, 3}
    assert trace.size_bytes.min() >= MIN_FLOW_BYTES
    assert trace.size_bytes.max() <= 3_000_000  # the largest of the distribution, 30 MB, at a tenth


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    trace = make_trace(RECIPE)
    trace.save(tmp_path / "trace.csv")
    read = RecordedTrace.read(tmp_path / "trace.csv")
    assert read.recipe == RECIPE
    for column in ("start_ns", "size_bytes", "sender"):
        np.testing.assert_array_equal(getattr(read, column), getattr(trace, column))


def test_senders_share_the_trace_between_them(tmp_path: Path) -> None:
    trace = make_trace(RECIPE)
    trace.save(tmp_path / "trace.csv")
    shares = [read_share(tmp_path / "trace.csv", n) for n in range(4)]
    flows = sorted((f.number, f.start_ns, f.size_bytes) for share in shares for f in share)
    assert flows == list(zip(range(len(trace)), trace.start_ns.tolist(), trace.size_bytes.tolist(), strict=True))


def test_a_file_that_is_no_trace_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "no.csv"
    path.write_text("hello\n")
    with pytest.raises(UsageError, match=r"cannot read the trace .*no\.csv"):
        RecordedTrace.read(path)
    with pytest.raises(UsageError, match=r"cannot read the trace"):
        RecordedTrace.read(tmp_path / "missing.csv")
