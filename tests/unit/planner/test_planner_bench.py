"""The benchmark command: rows, gaps, figures."""

import json

import pytest
from click.testing import CliRunner

from central.planner import bench
from central.planner.generator import SHAPES, generate
from central.planner.planning import make_plan
from central.planner.plots import animate


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "CASES", (("tiny", "fr"), ("tiny", "mixed")))


def test_rows_and_figures(tiny, tmp_path):
    arguments = [
        "--solver",
        "greedy",
        "--solver",
        "exact",
        "--mnl",
        "3",
        "--mnl",
        "6",
        "--plot",
        str(tmp_path),
        "--json",
    ]
    result = CliRunner().invoke(bench.planner, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert len(report["results"]) == 2 * 2 * 2
    for row in report["results"]:
        assert row["violations"] == 0
        assert row["gap"] is None or row["gap"] >= 0
        assert len(row["prefixes"]) == row["moves"] <= row["mnl"]
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_table(tiny):
    result = CliRunner().invoke(bench.planner, ["--solver", "greedy", "--mnl", "2", "--shape", "tiny"])
    assert result.exit_code == 0, result.output
    assert "fragment rate after the plan" in result.output


def test_film_has_a_frame_per_move(pose, tmp_path):
    from PIL import Image

    mapping = generate(SHAPES["tiny"], 1)
    plan = make_plan(pose(mapping, 3), "greedy", 5.0)
    with Image.open(animate(mapping, plan, tmp_path / "moves.gif")) as film:
        assert film.n_frames == len(plan.moves) + 1
