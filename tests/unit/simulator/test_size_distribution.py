from pathlib import Path

import numpy as np
import pytest

from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from simulator.workloads.distribution import SizeDistribution, names

# Means of the full published files (first point an atom, linear between points), in bytes.
PUBLISHED_MEANS = {
    "alistorage2019_bytes_hpcc": 40869.8,
    "datamining_vl2_bytes_trafficgenerator": 12658198.6,
    "datamining_vl2_pkts1460_pias_ns2": 5116.6 * 1460,
    "facebook_cache_raw_trafficgenerator": 342.2351,
    "facebook_hadoop_bytes_hpcc": 120420.75,
    "homa_w1_bytes_cdf": 186.42209,
    "homa_w2_bytes_cdf": 424.29051,
    "homa_w3_bytes_cdf": 2890.67622,
    "homa_w4_bytes_cdf": 121848.96162,
    "homa_w5_bytes_cdf": 2527951.96363,
    "qcluster_CDF_search": 2510777.81862,
    "qcluster_FacebookKeyValueMsgSizeDist": 184.71368,
    "qcluster_Facebook_HadoopDist_All": 121848.96162,
    "qcluster_Google_AllRPC": 2890.27157,
    "qcluster_Google_SearchRPC": 423.40249,
    "websearch_bytes_hpcc": 1711250.0,
    "websearch_dctcp_bytes_trafficgenerator": 1711250.0,
    "websearch_dctcp_pkts1460_pias_ns2": 1140.98 * 1460,
}


def test_all_published_files_are_bundled() -> None:
    assert set(names()) == set(PUBLISHED_MEANS)


@pytest.mark.parametrize("name", sorted(PUBLISHED_MEANS))
def test_bundled_mean_is_the_published_files_mean(name: str) -> None:
    distribution = SizeDistribution.load(name)
    assert distribution.mean_bytes == pytest.approx(PUBLISHED_MEANS[name], rel=0.005)
    assert distribution.source
    u = (np.arange(2_000_000) + 0.5) / 2_000_000  # mean by quadrature of the quantile function
    assert distribution.quantile(u).mean() == pytest.approx(distribution.mean_bytes, rel=0.002)


def test_bundled_name_may_carry_the_file_ending() -> None:
    assert SizeDistribution.load("homa_w1_bytes_cdf.txt").name == "homa_w1_bytes_cdf"


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="websearch_bytes_hpcc"):
        SizeDistribution.load("websurch")


def test_quantile_inverts_the_cdf_between_atoms() -> None:
    distribution = SizeDistribution.load("websearch_bytes_hpcc")
    u = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(distribution.cdf_at(distribution.quantile(u)), u)


def test_atoms_have_their_weight_in_cdf_quantile_mean_and_samples() -> None:
    # 1/2 at 100 bytes, 1/4 at 200, the rest uniform on 200..400
    distribution = SizeDistribution("atoms", np.array([100, 200, 200, 400.0]), np.array([0.5, 0.5, 0.75, 1]))
    np.testing.assert_allclose(
        distribution.cdf_at([99, 100, 199, 200, 300, 400, 500]), [0, 0.5, 0.5, 0.75, 0.875, 1, 1]
    )
    np.testing.assert_allclose(distribution.quantile([0.2, 0.6, 0.7, 1]), [100, 200, 200, 400])
    assert distribution.mean_bytes == 50 + 50 + 75
    sizes = distribution.sample(np.random.default_rng(1), 100_000)
    assert sizes.dtype == np.int64
    assert (sizes == 100).mean() == pytest.approx(0.5, abs=0.01)
    assert (sizes == 200).mean() == pytest.approx(0.25, abs=0.01)


def test_samples_are_at_least_one_byte_and_depend_on_the_seed_only() -> None:
    distribution = SizeDistribution.load("facebook_cache_raw_trafficgenerator")
    first, second = (distribution.sample(np.random.default_rng(7), 10_000) for _ in range(2))
    assert first.min() == 1
    np.testing.assert_array_equal(first, second)


def test_scaled_multiplies_sizes() -> None:
    distribution = SizeDistribution.load("homa_w3_bytes_cdf")
    assert distribution.scaled(2.5).mean_bytes == pytest.approx(2.5 * distribution.mean_bytes)
    with pytest.raises(UsageError):
        distribution.scaled(0)


def test_histogram_of_samples_gives_the_distribution_back() -> None:
    distribution = SizeDistribution.load("websearch_bytes_hpcc")
    sizes = distribution.sample(np.random.default_rng(3), 200_000)
    measured = SizeDistribution.from_histogram(LogHistogram.of(sizes), "measured")
    assert measured.mean_bytes == pytest.approx(float(sizes.mean()), rel=0.02)
    assert float(measured.cdf_at(80_000)) == pytest.approx(0.53, abs=0.02)
    with pytest.raises(UsageError, match="empty"):
        SizeDistribution.from_histogram(LogHistogram(), "nothing")


def test_file_units_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# two packets or ten\n1 0\n2, 0.5\n\n10 1 1\n")
    assert SizeDistribution.from_file(path, unit="pkts1460").mean_bytes == pytest.approx(1460 * (0.5 * 1.5 + 0.5 * 6))
    assert SizeDistribution.load(str(path)).max_bytes == 10
    with pytest.raises(UsageError, match="unit"):
        SizeDistribution.from_file(path, unit="furlong")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no points"),
        ("1 0.5\n2 0.4\n3 1\n", "must ascend"),
        ("5 0\n2 0.4\n3 1\n", "must ascend"),
        ("1 0\n2 0.9\n", "must reach 1"),
        ("1 0\n2 1.5\n", "must reach 1"),
        ("1 0\nnan 1\n", "finite"),
        ("1 nan\n2 1\n", "finite"),
        ("-1 0\n2 1\n", "negative"),
        ("0 1\n", "above 0"),
        ("1 0\ntwo 1\n", "mine.txt:2"),
        ("1\n", "mine.txt:1"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        SizeDistribution.from_file(path)


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        SizeDistribution.from_file(tmp_path / "absent.txt")
