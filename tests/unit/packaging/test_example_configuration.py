"""The example files are what the structs say: every key, its default, nothing else."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from fabricpilot.config import AgentConfig, CentralConfig, load

PACKAGING = Path(__file__).parents[3] / "packaging"
FILES = {"agent.toml": AgentConfig, "central.toml": CentralConfig}


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_sets_nothing(name):
    assert load(FILES[name], PACKAGING / name, environ={}) == FILES[name]()


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_there_with_its_default_and_a_word_about_it(name, tmp_path):
    text = (PACKAGING / name).read_text()
    uncommented = re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE)
    assert tomllib.loads(uncommented) == msgspec.to_builtins(FILES[name]())

    lines = text.splitlines()
    for before, line in pairwise(lines):
        if re.match(r"#?\w+ = ", line):
            assert before.startswith("# "), f"no word about: {line}"
