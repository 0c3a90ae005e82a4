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
# What the service needs other than the default.
SET = {"agent.toml": {}, "central.toml": {"central": {"run_dir": "/run/fabricpilot-central"}}}


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_sets_only_what_the_service_needs(name):
    assert tomllib.loads((PACKAGING / name).read_text()).items() >= SET[name].items()
    defaults = msgspec.to_builtins(FILES[name]())
    for section, keys in SET[name].items():
        defaults[section].update(keys)
    assert msgspec.to_builtins(load(FILES[name], PACKAGING / name, environ={})) == defaults


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_there_with_its_default_and_a_word_about_it(name, tmp_path):
    text = (PACKAGING / name).read_text()
    uncommented = re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE)
    everything = tomllib.loads(uncommented)
    for section, keys in SET[name].items():
        for key in keys:
            everything[section].pop(key)
    defaults = msgspec.to_builtins(FILES[name]())
    for section, keys in SET[name].items():
        for key in keys:
            defaults[section].pop(key)
    assert everything == defaults

    lines = text.splitlines()
    for before, line in pairwise(lines):
        if re.match(r"#?\w+ = ", line):
            assert before.startswith("# "), f"no word about: {line}"
