import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fabricpilot.errors import UsageError
from simulator.cli import parse_size, simulate
from simulator.schemes import NAMES
from simulator.workloads.trace import Trace
from simulator.workloads.tracefile import read_trace, write_trace

WEB = ["--cdf", "websearch_bytes_hpcc", "--flows", "2000"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(simulate, arguments, catch_exceptions=True)


def good(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_every_scheme_runs_and_json_has_its_numbers() -> None:
    found = json.loads(good(*WEB, "--scheme", ",".join(NAMES), "--json"))
    assert set(found["schemes"]) == set(NAMES)
    for numbers in found["schemes"].values():
        assert numbers["flows"] == 2000
        assert numbers["mean_slowdown"] >= 1
        assert sum(bucket["flows"] for bucket in numbers["buckets"]) == 2000
    means = {name: numbers["mean_us"] for name, numbers in found["schemes"].items()}
    assert min(means, key=lambda name: means[name]) == "srpt"


def test_table_and_plot(tmp_path: Path) -> None:
    picture = tmp_path / "fct.png"
    output = good(*WEB, "--scheme", "fair", "--scheme", "backlog", "--send-buffer", "4MB,2MB", "--plot", str(picture))
    assert "backlog 4MB" in output
    assert "backlog 2MB" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_streamed_statistics_agree_with_exact_ones() -> None:
    exact, streamed = (json.loads(good(*WEB, "--json", *more))["schemes"]["fair"] for more in (["--exact"], []))
    assert streamed["mean_us"] == pytest.approx(exact["mean_us"], rel=1e-9)
    for key in ("p50_us", "p99_us", "p99_slowdown"):
        assert streamed[key] == pytest.approx(exact[key], rel=0.05)
    assert [b["flows"] for b in streamed["buckets"]] == [b["flows"] for b in exact["buckets"]]


def test_flows_of_a_pias_trace_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("5.0 10 2\n0.0 1000 3\n2.5 1 14\n")
    out = tmp_path / "fct.csv"
    arguments = [
        "--trace",
        str(tmp_path / "t.txt"),
        "--trace-format",
        "pias",
        "--link-rate",
        "1Gbit",
        "--out",
        str(out),
    ]
    good(*arguments, "--scheme", "mlfq", "--thresholds", "20480,1048576", "--send-buffer", "4MB")
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["flow_id", "size_bytes", "start_us", "fct_us"]
    assert [(int(r["flow_id"]), int(r["size_bytes"])) for r in rows] == [(0, 10_240), (1, 1_024_000), (2, 1024)]
    assert float(rows[0]["start_us"]) == pytest.approx(5300)
    assert 8000 < float(rows[1]["fct_us"]) < 12_000  # 1,024,000 bytes take 8.7 ms on the wire
    good(*arguments, "--scheme", "fair,srpt")
    assert (tmp_path / "fct.fair.csv").exists()
    assert (tmp_path / "fct.srpt.csv").exists()


def test_a_single_flow_is_a_trace(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("start_s,size_bytes\n0,1000\n")
    found = json.loads(good("--trace", str(tmp_path / "t.csv"), "--json"), parse_constant=pytest.fail)
    assert found["load"] is None
    assert found["schemes"]["fair"]["mean_slowdown"] == pytest.approx(1)


def test_one_seed_one_result() -> None:
    first, second, other = (good(*WEB, "--json", "--seed", seed) for seed in ("1", "1", "2"))
    mean = [json.loads(text)["schemes"]["fair"]["mean_us"] for text in (first, second, other)]
    assert mean[0] == mean[1] != mean[2]


def test_fabrics() -> None:
    more = ["--all-to-all", "--hosts", "8", "--scheme", "fair,mlfq", "--json"]
    one_switch = json.loads(good(*WEB, *more))["schemes"]
    spine = json.loads(good(*WEB, *more, "--leaves", "2", "--spines", "2", "--oversubscription", "2"))["schemes"]
    assert spine["fair"]["mean_us"] > one_switch["fair"]["mean_us"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--trace FILE or --cdf NAME"),
        ([*WEB, "--load", "1"], "overload"),
        ([*WEB, "--load", "nan"], "load"),
        ([*WEB, "--flows", "0"], "at least 1"),
        ([*WEB, "--scheme", "fastest"], "unknown; choose from: fair"),
        ([*WEB, "--scheme", "mlfq", "--thresholds", "5,4"], "ascend"),
        ([*WEB, "--scheme", "mlfq", "--thresholds", "5k"], "whole number"),
        ([*WEB, "--send-buffer", "much"], "4MB"),
        ([*WEB, "--link-rate", "fast"], "10Gbit"),
        ([*WEB, "--leaves", "2"], "spine"),
        ([*WEB, "--leaves", "3", "--spines", "1"], "multiple"),
        (["--cdf", "nobody"], "unknown"),
        (["--trace", "/nonexistent"], "cannot read"),
        (["--trace", "/dev/null"], "empty"),
        (["--trace", "/dev/null", "--trace-format", "mp3"], "unknown"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_overload_when_asked_for() -> None:
    assert "1.5" in good(*WEB, "--load", "1.5", "--overload")


@pytest.mark.parametrize(
    "text", ["1 2\n", "1 x 3\n", "nan 5 1\n", "1 0 3\n", "-1 5 3\n", "1 5 -3\n"], ids=lambda text: repr(text)
)
def test_bad_pias_lines_name_the_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.txt").write_text("1.0 5 3\n" + text)
    with pytest.raises(UsageError, match=r"t\.txt:2"):
        read_trace(tmp_path / "t.txt", "pias")


def test_traces_survive_a_file(tmp_path: Path) -> None:
    trace = Trace.of([0.5, 0.25], [10, 20], [1, 2], [0, 3])
    write_trace(trace, tmp_path / "t.csv")
    back = read_trace(tmp_path / "t.csv")
    for name in ("start_s", "size_bytes", "source", "destination"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
    (tmp_path / "bad.csv").write_text("start_s,size_bytes\n1,2\n1,nan\n")
    with pytest.raises(UsageError, match=r"bad\.csv:3"):
        read_trace(tmp_path / "bad.csv")
    (tmp_path / "none.csv").write_text("start_s,size_bytes\n")
    with pytest.raises(UsageError, match="no flows"):
        read_trace(tmp_path / "none.csv")


def test_sizes() -> None:
    assert [parse_size(t) for t in ("4MB", "512KiB", "65536", "1.5k")] == [4_000_000, 524_288, 65_536, 1500]
    for text in ("", "0", "4X", "-1", "i"):
        with pytest.raises(UsageError):
            parse_size(text)
