"""The units are valid, closed off, and agree with the package they start."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fabricpilot.config import HOST_RUN_DIR, AgentConfig, CentralConfig, HostSection, load
from fabricpilot.errors import UsageError

PACKAGING = Path(__file__).parents[3] / "packaging"
UNITS = ["fabricpilot-agent.service", "fabricpilot-central.service"]
MAX_EXPOSURE = 2.5


@pytest.fixture(params=UNITS)
def unit(request, tmp_path):
    """A unit whose program exists on this machine, so that nothing but the unit is judged."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (Debian package systemd)")
    text = (PACKAGING / "systemd" / request.param).read_text()
    assert text.count("/usr/bin/fabricpilot ") == 1
    path = tmp_path / request.param
    path.write_text(text.replace("/usr/bin/fabricpilot ", "/bin/true "))
    return path


def analyze(*words):
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60)


def test_systemd_finds_nothing_wrong(unit):
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_wrong_key_would_be_found(unit):
    unit.write_text(unit.read_text().replace("NoNewPrivileges=", "NoNewPrivilege="))
    assert "NoNewPrivilege" in analyze("verify", "--man=no", unit).stderr


def test_exposure_is_low(unit):
    done = analyze("security", "--offline=true", "--no-pager", unit)
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= MAX_EXPOSURE


def service(name):
    found = {}
    for line in (PACKAGING / "systemd" / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(("name", "kind"), list(zip(UNITS, ["agent", "central"], strict=True)))
def test_it_is_a_watched_service_that_restarts(name, kind):
    unit = service(name)
    assert unit["ExecStart"] == [f"/usr/bin/fabricpilot {kind} run --config /etc/fabricpilot/{kind}.toml"]
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["on-failure"]
    assert unit["StartLimitBurst"]
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]  # snapshots of what was on a NIC must outlive a restart


def test_capabilities_are_the_fewest():
    wanted = {"CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"}
    agent, central = map(service, UNITS)
    for key in ("CapabilityBoundingSet", "AmbientCapabilities"):
        assert set(agent[key][0].split()) == wanted
        assert central[key] == [""]
    assert central["User"] != ["root"]


def test_the_watchdog_outlasts_the_longest_report_interval():
    with pytest.raises(UsageError, match=r"0\.1 to 60"):
        AgentConfig(host=HostSection(report_interval_s=61))
    assert int(service(UNITS[0])["WatchdogSec"][0].removesuffix("s")) >= 2 * 60


def test_run_directories_are_those_of_the_configuration():
    agent = load(AgentConfig, PACKAGING / "agent.toml", environ={})
    central = load(CentralConfig, PACKAGING / "central.toml", environ={})
    assert agent.host.run_dir == HOST_RUN_DIR
    for config, name in ((agent.host.run_dir, UNITS[0]), (central.central.run_dir, UNITS[1])):
        assert config == f"/run/{service(name)['RuntimeDirectory'][0]}"
    # Pins must be writable although /sys is not.
    assert agent.datapath.pin_dir.startswith(service(UNITS[0])["ReadWritePaths"][0] + "/")
