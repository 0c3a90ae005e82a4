"""Published thresholds: the table and its lookup."""

import pytest

from fabricpilot.errors import UsageError
from fabricpilot.published import PUBLISHED, published, workload_of


def test_lookup_takes_the_nearest_load() -> None:
    assert published("websearch_dctcp_bytes_trafficgenerator", 8, 0.78).load == 0.8
    assert published("websearch", 8, 0.1).load == 0.5
    assert published("datamining", 8, 0.95).thresholds.bytes[0] == 750 * 1460


def test_lookup_finds_every_number_of_levels_there_is() -> None:
    assert published("websearch", 2, 0.7).thresholds.bytes == (965_816,)
    assert published("websearch", 4, 0.7).thresholds.bytes[0] == 70 * 1024
    assert published("websearch", 4, 0.7, "equal-split").thresholds.bytes == (24_576, 73_728, 1_482_752)
    assert published("homa_w1", 2, 0.7, "default").thresholds.bytes == (102_400,)
    assert published("datamining", 4, 0.6, "auto-learned").thresholds.bytes == (4_380, 87_600, 452_600)


def test_every_row_can_be_found() -> None:
    for row in PUBLISHED:
        found = published(row.workload, row.thresholds.levels, row.load or 0.7, row.kind)
        assert found.thresholds.levels == row.thresholds.levels
        assert found.load == row.load or row.load is None


@pytest.mark.parametrize(
    ("workload", "levels", "kind", "says"),
    [
        ("homa_w1", 8, "optimised", "websearch with 8"),
        ("websearch", 3, "optimised", "websearch with 4"),
        ("websearch", 8, "best", "choose one of auto-learned"),
    ],
)
def test_says_what_there_is(workload: str, levels: int, kind: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        published(workload, levels, 0.8, kind)


@pytest.mark.parametrize(
    ("name", "workload"), [("datamining_vl2_bytes", "datamining"), ("VL2_CDF", "datamining"), ("homa_w4", "websearch")]
)
def test_workload_of_a_name(name: str, workload: str) -> None:
    assert workload_of(name) == workload
