"""Both daemons run within what their systemd units leave them: capabilities, system calls, memory; and they say so."""

import platform
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pyroute2 import IPRoute
from service_sandbox import UNISTD, settings

from hostagent.qdisc import supported_kinds

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "packaging" / "systemd"
SANDBOX = ROOT / "tests" / "service_sandbox.py"
FABRICPILOT = Path(sys.executable).with_name("fabricpilot")

for need in ("systemd-analyze", "setpriv", "nsenter"):
    if shutil.which(need) is None:
        pytest.skip(f"needs {need}", allow_module_level=True)
if platform.machine() != "x86_64" or not Path(UNISTD).exists():
    pytest.skip(f"needs x86_64 and {UNISTD} (libc6-dev)", allow_module_level=True)


@pytest.fixture
def bpffs(tmp_path):
    folder = tmp_path / "bpf"
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def manager(tmp_path):
    """The service manager's end of the notify socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(30)
        yield sock


def start(unit, namespace, manager, *command):
    """The daemon as the unit starts it, but for the user and the folders."""
    capabilities = [name.lower().removeprefix("cap_") for name in settings(unit)["CapabilityBoundingSet"][0].split()]
    given = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    wrapped = [
        *("nsenter", f"--net=/run/netns/{namespace}", "setpriv"),
        *(f"--bounding-set={given}", f"--inh-caps={given}", f"--ambient-caps={given}"),
        *(sys.executable, SANDBOX, unit, FABRICPILOT, *command),
    ]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "NOTIFY_SOCKET": manager.getsockname()}
    return subprocess.Popen(wrapped, stderr=subprocess.PIPE, text=True, env=environment)


def heard_in_order(manager, daemon, *wanted):
    try:
        for word in wanted:
            while word not in manager.recv(4096).decode():
                pass
    except TimeoutError:
        daemon.kill()
        pytest.fail(f"no {word}; the daemon said: {daemon.communicate()[1]}")


def stop(manager, daemon):
    daemon.send_signal(signal.SIGTERM)
    heard_in_order(manager, daemon, "STOPPING=1")
    said = daemon.communicate(timeout=20)[1]
    assert daemon.returncode == 0, said
    return said


def test_the_agent_needs_no_more_than_its_unit_gives(make_netns, tmp_path, bpffs, manager):
    pytest.importorskip("bcc", reason="needs python3-bpfcc")
    namespace = make_netns("agent")
    with IPRoute(netns=namespace) as ipr:
        ipr.link("add", ifname="nic", kind="veth", peer="peer")
        for name in ("nic", "peer"):
            ipr.link("set", index=ipr.link_lookup(ifname=name)[0], state="up")
        assert "pfifo_fast" in supported_kinds(ipr)
    options = ["-i", "nic", "--pin-dir", bpffs / "fp", "--link-rate", "100Mbit", "--detach-on-exit"]
    options += ["--set", f"host.run_dir={tmp_path / 'run'}", "--set", "host.report_interval_s=0.2"]
    unit = UNITS / "fabricpilot-agent.service"
    daemon = start(unit, namespace, manager, "agent", "run", *options)
    heard_in_order(manager, daemon, "READY=1", "WATCHDOG=1", "WATCHDOG=1")
    shown = subprocess.run(
        ["tc", "-n", namespace, "qdisc", "show", "dev", "nic"], check=True, capture_output=True, text=True
    )
    assert " fab: " in shown.stdout
    stop(manager, daemon)
    shown = subprocess.run(
        ["tc", "-n", namespace, "qdisc", "show", "dev", "nic"], check=True, capture_output=True, text=True
    )
    assert " fab: " not in shown.stdout


def test_central_needs_no_capability_at_all(make_netns, tmp_path, manager):
    namespace = make_netns("central")
    with IPRoute(netns=namespace) as ipr:
        ipr.link("set", index=ipr.link_lookup(ifname="lo")[0], state="up")
    sets = [
        "link.insecure=true",
        "link.listen=tcp://127.0.0.1:5555",
        f"central.run_dir={tmp_path / 'run'}",
        "policy.interval_s=0.2",
        "policy.window_s=1",
    ]
    options = [word for value in sets for word in ("--set", value)]
    daemon = start(UNITS / "fabricpilot-central.service", namespace, manager, "central", "run", *options)
    heard_in_order(manager, daemon, "READY=1", "WATCHDOG=1")
    stop(manager, daemon)
