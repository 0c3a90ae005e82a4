"""Imports point one way: read from the source, so that a new module is held to it at once."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"fabricpilot", "hostagent", "central", "simulator", "testbed"}

# What each room may import of ours, beside itself.
ALLOWED = {
    "fabricpilot": set(),
    "hostagent": {"fabricpilot"},
    "simulator": {"fabricpilot"},
    "central": {"fabricpilot", "simulator"},
    "testbed": ROOMS,
}
# Too heavy, or not there, where the room runs.
FORBIDDEN = {
    "fabricpilot": {"torch", "bcc", "scipy", "numba", "scapy"},
    "hostagent": {"torch", "numba", "scipy", "scapy", "matplotlib"},
    "simulator": {"torch", "bcc"},
    "central": {"bcc"},
    "testbed": {"bcc"},
}
MODULES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path):
    """Top-level packages a file imports anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the room"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    room = path.parts[0]
    names = imported(path)
    assert not (names & ROOMS) - ALLOWED[room] - {room}
    assert not names & FORBIDDEN[room]


def test_every_room_is_seen():
    assert {path.parts[0] for path in MODULES} == ROOMS


def test_a_wrong_import_would_be_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from central.x import y\n    import torch.nn\n")
    assert {"central", "torch"} <= imported(wrong)
