"""The command: files in, files out, exit codes."""

import json

import pytest
from click.testing import CliRunner

from central.planner.cli import plan
from fabricpilot.errors import FabricpilotError


def run(*args):
    result = CliRunner().invoke(plan, [str(arg) for arg in args])
    if isinstance(result.exception, FabricpilotError):
        return result.exception.exit_code, str(result.exception)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def mapping(tmp_path):
    path = tmp_path / "m.json"
    assert run("generate", "--shape", "small", "--seed", 1, "--out", path)[0] == 0
    return path


def test_plan_then_check(mapping, tmp_path):
    out = tmp_path / "plan.json"
    code, text = run("--mapping", mapping, "--mnl", 8, "--out", out)
    assert code == 0
    assert "no plan can be below" in text
    document = json.loads(out.read_text())
    assert set(document) >= {"moves", "initial", "final", "bound", "gap", "solver", "seconds", "mnl", "seed"}
    assert set(document["moves"][0]) == {"vm", "from", "to", "batch"}
    assert document["prefixes"][-1]["fragment_rate"] == document["final"]["fragment_rate"]
    code, text = run("check", "--mapping", mapping, "--plan", out)
    assert (code, text[:5]) == (0, "good:")
    document["moves"].reverse()
    document["moves"][0]["from"] = document["moves"][0]["to"]
    out.write_text(json.dumps(document))
    code, text = run("check", "--mapping", mapping, "--plan", out)
    assert code == 1
    assert "move 0" in text


def test_json_output(mapping):
    code, text = run("--mapping", mapping, "--mnl", 3, "--solver", "greedy", "--json")
    assert code == 0
    assert json.loads(text)["solver"] == "greedy"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--mnl", -1], "--mnl -1"),
        (["--solver", "magic"], "magic"),
        (["--objective", "happiness"], "happiness"),
        (["--objective", "fr-goal:0.0"], "out of reach"),
        (["--deadline", 0], "deadline"),
        (["--make-room", "many"], "many"),
    ],
)
def test_wrong_use(mapping, extra, words):
    code, text = (
        run("--mapping", mapping, "--mnl", 3, *extra) if "--mnl" not in extra else run("--mapping", mapping, *extra)
    )
    assert code == 2
    assert words in text


def test_bad_files(tmp_path, mapping):
    broken = tmp_path / "broken.json"
    broken.write_bytes(mapping.read_bytes()[:1000])
    assert run("--mapping", broken)[0] == 2
    assert run("--mapping", tmp_path / "absent.json")[0] == 2
    assert run()[0] == 2
    broken.write_text('{"moves": [{"vm": "ghost", "from": {"pm": "a", "numa": [0]}, "to": {"pm": "b", "numa": [0]}}]}')
    code, text = run("check", "--mapping", mapping, "--plan", broken)
    assert code == 2
    assert "ghost" in text


def test_make_room_and_cooldown(mapping, tmp_path):
    code, text = run("--mapping", mapping, "--make-room", "32c/64G", "--json")
    assert code == 0
    assert "fits" in " ".join(json.loads(text)["notes"])
    code, text = run("--mapping", mapping, "--mnl", 4, "--json")
    moved = {move["vm"]: 4e9 for move in json.loads(text)["moves"]}
    history = tmp_path / "history.json"
    history.write_text(json.dumps(moved))
    code, text = run("--mapping", mapping, "--mnl", 4, "--history", history, "--json")
    assert code == 0
    assert not set(moved) & {move["vm"] for move in json.loads(text)["moves"]}


def test_replan(mapping, tmp_path):
    out = tmp_path / "plan.json"
    run("--mapping", mapping, "--mnl", 6, "--out", out)
    code, text = run("--mapping", mapping, "--mnl", 6, "--replan-from", out, "--json")
    assert code == 0
    assert json.loads(text)["final"]["slots"] == json.loads(out.read_text())["final"]["slots"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--solver", "learned", "--samples", "0"], "--samples 0"),
        (["--solver", "learned", "--vm-quantile", "1"], "--vm-quantile 1"),
        (["--deadline", "nan"], "--deadline nan"),
        (["--cost-per-gb", "nan"], "--cost-per-gb nan"),
        (["--central", "tcp://127.0.0.1", "--insecure"], "lacks a port"),
    ],
)
def test_numbers_nobody_can_mean(mapping, given, told):
    code, text = run("--mapping", mapping, *given)
    assert code == 2
    assert told in text


def test_an_empty_earlier_plan_is_no_plan(mapping, tmp_path):
    (tmp_path / "empty.json").write_text("")
    code, text = run("--mapping", mapping, "--replan-from", tmp_path / "empty.json")
    assert code == 2
    assert "not a plan" in text


def test_a_plan_that_cannot_be_written(mapping):
    code, text = run("--mapping", mapping, "--solver", "greedy", "--out", "/proc/none/plan.json")
    assert code == 1
    assert "cannot write /proc/none/plan.json" in text
