"""Our model against ns-3, packet by packet. Slow, and only where the optional wheel `ns3` is installed."""

import numpy as np
import pytest

from fabricpilot.errors import UsageError
from simulator.bench import against_ns3
from simulator.packetlevel import same_physics
from simulator.physics import Physics


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mean_agrees_with_ns3_and_is_hundreds_of_times_faster() -> None:
    pytest.importorskip("ns", reason="the optional wheel ns3")
    for found in against_ns3().values():
        assert abs(found["mean_error"]) < 0.1
        assert found["ratio"] > 100


def test_the_constants_are_those_of_the_packets() -> None:
    physics, fair = same_physics(1e9, 20e-6)
    assert physics.rtt_s == pytest.approx(4 * (20e-6 + 1502 * 8e-9))
    assert fair.queue_bytes == 20 * 1448
    _, bands = same_physics(1e9, 20e-6, (1000, 2000))
    assert (bands.levels, bands.thresholds, bands.queue_bytes) == (3, (1000.0, 2000.0), fair.queue_bytes)
    assert physics.goodput(1e9) > Physics().goodput(1e9)  # no Ethernet preamble and gap
    with pytest.raises(UsageError):
        Physics(rtt_s=float(np.nan))
