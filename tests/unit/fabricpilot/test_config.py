"""File, environment, flags: precedence, and one clear line for everything wrong."""

import pytest

from fabricpilot.config import AgentConfig, CentralConfig, load, parse_rate
from fabricpilot.errors import UsageError


def write(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path):
    path = write(tmp_path, '[datapath]\nlevels = 3\npin_dir = "/a"\n[host]\ninterfaces = ["eth0"]\n')
    environ = {"FABRICPILOT_DATAPATH_LEVELS": "5", "FABRICPILOT_HOST_INTERFACES": "eth1, eth2"}
    config = load(AgentConfig, path, {"datapath.levels": 6, "host.group": None}, environ)
    assert (config.datapath.levels, config.datapath.pin_dir) == (6, "/a")
    assert config.host.interfaces == ["eth1", "eth2"]
    assert config.thresholds.levels == 6


@pytest.mark.parametrize("text", ["100,2000,30000", "[100, 2000, 30_000]"])
def test_thresholds_from_a_flag(text):
    config = load(AgentConfig, None, {"datapath.thresholds": text}, {})
    assert config.thresholds.bytes == (100, 2000, 30000)


@pytest.mark.parametrize(
    ("key", "text", "match"),
    [
        ("datapath.thresholds", "[100, 2000", "write a,b or"),
        ("datapath.thresholds", "100,few,2000", "Expected 'int', got 'str' in place 2"),
        ("datapath.mode", "backlogs", "one of auto, backlog, attained"),
        ("datapath.flow_entries", "99999999999", "99999999999; it must be 1024 to 16777216"),
        ("host.report_interval_s", "0.05", "0.05; it must be 0.1 to 60"),
    ],
)
def test_wrong_flags_say_what_would_be_right(key, text, match):
    with pytest.raises(UsageError, match=match) as caught:
        load(AgentConfig, None, {key: text}, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[datapath]\nlevel = 4", "unknown key 'level'.*did you mean 'levels'"),
        ("[datpath]\nlevels = 4", r"unknown section \[datpath\].*did you mean 'datapath'"),
        ("levels = 4", "unknown section"),
        ("host = 4", "must be a table"),
        ("[datapath\n", "not valid TOML"),
        ("[datapath]\nlevels = 9", "2 to 8"),
        ("[datapath]\nlevels = 'four'", "levels"),
        ("[datapath]\nthresholds = [300, 20, 4000]", "ascend"),
        ("[datapath]\nthresholds = [300, 4000]", "needs 3"),
        ("[datapath]\nbackend = 'magic'", "backend'; it must be one of auto, ebpf, nftables, fake"),
        ("[host]\nreport_interval_s = 0", "0.1 to 60"),
        ("[datapath]\nflow_entries = 5", "1024"),
    ],
)
def test_wrong_files_say_where(tmp_path, text, match):
    with pytest.raises(UsageError, match=match) as caught:
        load(AgentConfig, write(tmp_path, text), environ={})
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(UsageError, match="cannot read configuration"):
        load(CentralConfig, __import__("pathlib").Path("/does/not/exist.toml"), environ={})


def test_wrong_environment_names_the_variable():
    with pytest.raises(UsageError, match="FABRICPILOT_DATAPATH_LEVELS"):
        load(AgentConfig, None, None, {"FABRICPILOT_DATAPATH_LEVELS": "many"})


def test_central_keeps_its_own_key_default():
    config = load(CentralConfig, None, {"policy.interval_s": "2"}, {})
    assert config.link.key.endswith("central.key_secret")
    assert config.policy.interval_s == 2


@pytest.mark.parametrize(
    ("text", "bps"), [("200Mbit", 200_000_000), ("10gbit", 10**10), ("1.5G", 1_500_000_000), ("42", 42)]
)
def test_rates(text, bps):
    assert parse_rate(text) == bps


@pytest.mark.parametrize("text", ["", "fast", "-1Mbit", "0", "10Mbyte"])
def test_bad_rates(text):
    with pytest.raises(UsageError, match="rate"):
        parse_rate(text)
