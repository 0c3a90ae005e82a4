"""`fabricpilot central keys`."""

import json

import pytest
from click.testing import CliRunner

from central.cli import central
from fabricpilot.errors import UsageError
from fabricpilot.keys import read_pair


@pytest.fixture
def out(tmp_path):
    return tmp_path / "keys"


def keys(out, *arguments):
    result = CliRunner().invoke(central, ["keys", "--out", str(out), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_site_and_a_host_added_later(out):
    assert "wrote" in keys(out, "--host", "h1")
    first = files(out)
    assert sorted(first) == ["central.key", "central.key_secret", "hosts/h1.key", "hosts/h1.key_secret"]
    keys(out, "--host", "h2")
    assert first.items() <= files(out).items()
    assert len(files(out)) == 6


def test_json_names_the_files(out):
    told = json.loads(keys(out, "--host", "h1", "--json"))
    assert told["written"] is True
    assert [key["name"] for key in told["keys"]] == ["central", "h1"]
    for key in told["keys"]:
        read_pair(__import__("pathlib").Path(key["secret"]), "link.key")


def test_dry_run_writes_nothing(out):
    assert "would write" in keys(out, "--host", "h1", "--dry-run")
    assert json.loads(keys(out, "--dry-run", "--json"))["written"] is False
    assert not out.exists()


def test_nothing_is_replaced_unless_forced(out):
    keys(out, "--host", "h1")
    before = files(out)
    with pytest.raises(UsageError, match="h1 exist"):
        keys(out, "--host", "h1", "--host", "h2")
    assert "nothing to do" in keys(out)
    assert files(out) == before
    keys(out, "--host", "h1", "--force")
    after = files(out)
    assert after["hosts/h1.key"] != before["hosts/h1.key"]
    assert after["central.key"] == before["central.key"]
    keys(out, "--force")
    assert files(out)["central.key"] != before["central.key"]
    assert files(out)["hosts/h1.key"] == after["hosts/h1.key"]
