"""The benchmark command: rows, gaps, figures."""

import json

import pytest
from click.testing import CliRunner

from central.planner import bench, bench_portfolio
from central.planner.generator import SHAPES, generate
from central.planner.model.problem import Limits
from central.planner.planning import make_plan
from central.planner.plots import animate


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "CASES", (("tiny", "fr"), ("tiny", "mixed")))


def test_rows_and_figures(tiny, tmp_path):
    arguments = ["--solver", "greedy", "--solver", "exact", "--mnl", "2", "--mnl", "4", "--json", "--plot"]
    result = CliRunner().invoke(bench.planner, [*arguments, str(tmp_path)])
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


def test_auto_against_every_single_solver(monkeypatch):
    monkeypatch.setattr(bench_portfolio, "PROBLEMS", (("tiny", "tiny", "fr", Limits(3)),))
    monkeypatch.setattr(bench_portfolio, "SINGLE", ("greedy",))
    result = CliRunner().invoke(bench.planner, ["--portfolio", "--time", "20", "--cpu", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["summary"]["cells"] == report["summary"]["proven"] == 1
    assert report["summary"]["behind"] == 0


def test_where_auto_is_behind_is_counted():
    def row(difference, proven=False):
        return {"difference": difference, "proven": proven, "latest_s": -difference}

    rows = [row(0.01), row(-0.02), row(0.0, True), row(0.0)]
    assert bench_portfolio.summary(rows) == {
        "cells": 4,
        "proven": 1,
        "ahead": 1,
        "behind": 1,
        "most_behind": 0.01,
        "latest_s": 0.02,
    }
