"""The yardstick: smallest FCT per size, interpolated; a lost flow is no yardstick."""

import numpy as np
import pytest

from fabricpilot.errors import FabricpilotError
from testbed.flows.calibration import REPEATS, SIZES, Calibration, calibration_trace, from_results
from testbed.flows.recorded import RecordedTrace
from testbed.flows.results import LOST, Results


def test_flows_are_sent_one_at_a_time() -> None:
    trace = calibration_trace(3_000_000, 200_000_000, 3)
    assert len(trace) == SIZES * REPEATS
    assert trace.size_bytes.max() == 3_000_000
    link_ns = trace.size_bytes[:-1] * 8 / 200e6 * 1e9
    assert (np.diff(trace.start_ns) > 2 * link_ns).all()
    assert set(trace.sender.tolist()) == {0, 1, 2}


def test_ideal_is_the_best_of_each_size_and_linear_between() -> None:
    trace = RecordedTrace(np.arange(4), np.array([100, 100, 300, 300]), np.zeros(4, np.int64))
    measured = Results(trace, np.array([5_000, 4_000, 8_000, 90_000]), np.zeros(4, np.int64), {})
    calibration = from_results(measured)
    assert calibration == Calibration((100, 300), (4_000, 8_000))
    np.testing.assert_allclose(calibration.ideal_ns(np.array([100, 200, 300])), [4_000, 6_000, 8_000])


def test_ideal_goes_on_beyond_the_largest_size() -> None:
    calibration = Calibration((100, 200, 300), (4_000, 5_000, 8_000))
    np.testing.assert_allclose(calibration.ideal_ns(np.array([300, 400, 1_300])), [8_000, 11_000, 38_000])


def test_huge_flows_are_not_sent_to_calibrate() -> None:
    trace = calibration_trace(100_000_000, 200_000_000, 2)
    assert trace.size_bytes.max() == 6_250_000  # a quarter of a second
    assert trace.start_ns[-1] < 15e9


def test_ideal_never_falls_with_size() -> None:
    trace = RecordedTrace(np.arange(2), np.array([100, 300]), np.zeros(2, np.int64))
    measured = Results(trace, np.array([5_000, 4_000]), np.zeros(2, np.int64), {})
    assert from_results(measured).fct_ns == (5_000, 5_000)


def test_a_lost_flow_is_an_error() -> None:
    trace = RecordedTrace(np.arange(2), np.array([100, 300]), np.zeros(2, np.int64))
    measured = Results(trace, np.array([5_000, LOST]), np.zeros(2, np.int64), {1: "Connection refused"})
    with pytest.raises(FabricpilotError, match=r"lost 1 flows on the idle path \(Connection refused\)"):
        from_results(measured)
