"""`fabricpilot thresholds`: output, comparison, plot and bad input."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from central.thresholds.bench import thresholds as bench
from central.thresholds.cli import thresholds
from fabricpilot.errors import UsageError

WEB_SEARCH = "websearch_dctcp_bytes_trafficgenerator"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(thresholds, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_what_a_program_needs() -> None:
    record = json.loads(run("--cdf", WEB_SEARCH, "--load", "0.8", "--queues", "8", "--method", "exact", "--json"))
    assert len(record["thresholds"]) == record["queues"] - 1 == 7
    assert record["thresholds"] == sorted(record["thresholds"])
    assert record["gain"] == pytest.approx(1 - record["mean"] / record["fair_sharing"])
    assert record["gain"] > 0.1


def test_all_methods_side_by_side() -> None:
    records = json.loads(run("--cdf", WEB_SEARCH, "--queues", "4", "--method", "all", "--json"))
    assert [record["method"] for record in records] == ["exact", "mm1", "equal-split", "published"]
    assert min(records, key=lambda record: record["mean"])["method"] == "exact"
    assert next(record for record in records if record["method"] == "mm1")["note"].startswith("infeasible")


def test_rankings_that_see_more_gain_more() -> None:
    options = ["--cdf", WEB_SEARCH, "--json"]
    rankings = (["attained"], ["backlog", "--send-buffer", "2MB"], ["size"])
    records = [json.loads(run(*options, "--ranking", *ranking)) for ranking in rankings]
    assert [record["ranking"] for record in records] == ["attained", "backlog", "size"]
    assert records[0]["gain"] < records[1]["gain"] < records[2]["gain"]


def test_turns_gain_more() -> None:
    asked = ("--cdf", WEB_SEARCH, "--queues", "4", "--json")
    shared, turns = (json.loads(run(*asked, *more)) for more in ((), ("--turns",)))
    assert turns["gain"] > shared["gain"] + 0.05
    assert turns["thresholds"][2] == turns["thresholds"][1] + 1


def test_all_leaves_out_what_was_never_published() -> None:
    records = json.loads(run("--cdf", "homa_w1_bytes_cdf", "--queues", "4", "--method", "all", "--json"))
    assert [record["method"] for record in records] == ["exact", "mm1", "equal-split"]


def test_table_and_plot_of_a_file(tmp_path: Path) -> None:
    cdf = tmp_path / "sizes.txt"
    cdf.write_text("1000 0\n10000 0.9\n1000000 1\n")
    picture = tmp_path / "slowdown.png"
    output = run("--cdf", str(cdf), "--queues", "2", "--objective", "slowdown", "--plot", str(picture))
    assert "exact" in output
    assert "better by" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cdf", "nowhere"], "nowhere"),
        (["--cdf", WEB_SEARCH, "--load", "1"], "load"),
        (["--cdf", WEB_SEARCH, "--ranking", "backlog", "--send-buffer", "0"], "size .0. is not"),
        (["--cdf", WEB_SEARCH, "--queues", "9"], "2 to 8"),
        (["--cdf", WEB_SEARCH, "--queues", "3", "--method", "published"], "websearch with 4"),
        (["--cdf", WEB_SEARCH, "--plot", "picture.unknown"], "picture.unknown"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        run(*arguments)
    assert "\n" not in str(error.value)


def test_search_asks_the_simulator() -> None:
    options = ["--queues", "2", "--method", "search", "--flows", "5000", "--evaluations", "24", "--json"]
    record = json.loads(run("--cdf", WEB_SEARCH, *options))
    assert record["method"] == "search"
    assert record["gain"] > 0
    assert "5000 flows" in record["note"]


def test_benchmark_prints_every_method() -> None:
    result = CliRunner().invoke(bench, ["--flows", "20000", "--evaluations", "0", "--json"], catch_exceptions=False)
    summary = json.loads(result.stdout)  # progress goes to stderr
    assert {row["cdf"] for row in summary["rows"]} >= {WEB_SEARCH}
    assert summary["least_above_exact"]["fair"] > 0
    assert summary["least_above_exact"]["equal-split"] > 0
