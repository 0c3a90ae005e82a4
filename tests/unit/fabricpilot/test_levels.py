"""Levels, thresholds and DSCP."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds, check_dscp, default_dscp, default_thresholds, preset_dscp


@pytest.mark.parametrize(
    "values", [(), (0,), (5, 5), (9, 3), (1.5, 2), (True,), tuple(range(1, 9)), (1, 2**63)], ids=str
)
def test_invalid_thresholds_are_refused(values):
    with pytest.raises(UsageError, match="threshold"):
        Thresholds.of(values)


def test_level_counts_the_thresholds_reached():
    thresholds = Thresholds((100, 1000))
    assert [thresholds.level_of(b) for b in (0, 99, 100, 999, 1000, 10**12)] == [0, 0, 1, 1, 2, 2]


@given(st.sets(st.integers(1, 2**40), min_size=1, max_size=7), st.integers(0, 2**41), st.integers(0, 2**41))
def test_level_never_falls_as_bytes_grow(values, a, b):
    thresholds = Thresholds.of(sorted(values))
    low, high = sorted((a, b))
    assert thresholds.level_of(low) <= thresholds.level_of(high) <= thresholds.levels - 1


@pytest.mark.parametrize("levels", range(2, 9))
def test_defaults_are_valid_for_every_k(levels):
    assert default_thresholds(levels).levels == levels
    dscp = default_dscp(levels)
    check_dscp(dscp, levels)
    assert list(dscp) == sorted(dscp, reverse=True)


# IEEE 802.1Q, recommended priority to traffic class mappings: class of priority 0..7, by number of classes.
TRAFFIC_CLASS = {
    2: (0, 0, 0, 0, 1, 1, 1, 1),
    3: (0, 0, 0, 0, 1, 1, 2, 2),
    4: (0, 0, 1, 1, 2, 2, 3, 3),
    5: (0, 0, 1, 1, 2, 2, 3, 4),
    6: (1, 0, 2, 2, 3, 3, 4, 5),
    7: (1, 0, 2, 3, 4, 4, 5, 6),
    8: (1, 0, 2, 3, 4, 5, 6, 7),
}


@pytest.mark.parametrize("levels", range(2, 9))
def test_the_8021p_preset_gives_each_level_a_queue_of_its_own_in_order(levels):
    dscp = preset_dscp("802.1p", levels)
    check_dscp(dscp, levels)
    assert [TRAFFIC_CLASS[levels][d >> 3] for d in dscp] == list(reversed(range(levels)))
    assert preset_dscp("class-selectors", levels) == default_dscp(levels)


@pytest.mark.parametrize("levels", [-1, 1, 9])
def test_k_out_of_bounds(levels):
    with pytest.raises(UsageError, match="2 to 8"):
        default_thresholds(levels)


@pytest.mark.parametrize("dscp", [(8,), (8, 8, 1, 2), (64, 1, 2, 3)])
def test_bad_dscp_is_refused(dscp):
    with pytest.raises(UsageError, match="code points"):
        check_dscp(dscp, 4)
