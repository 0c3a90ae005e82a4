"""`hostagent.support.probe`: what is there is found, what is missing is one clear line, nothing is left behind."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datapath_kit import bpf_file_system, in_netns, run, start_agent
from nft_kit import REFUSE_BPF

from fabricpilot.config import DatapathSection
from hostagent.support import probe

PROBE = """
import json, sys
from fabricpilot.config import DatapathSection
from hostagent.support import probe
section = DatapathSection(backend=sys.argv[2], pin_dir=sys.argv[1])
print(json.dumps({f.id: [f.ok, f.required, f.why] for f in probe(section)}), flush=True)
"""


def present(netns: str) -> Counter[str]:
    """What a probe in that namespace could leave, there and in this process; what others do elsewhere is not seen."""
    lines = run("ip", "-br", "link", netns=netns) + run("tc", "qdisc", "show", netns=netns)
    children = [
        child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]
    handles = [str(handle.readlink()) for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
    return Counter([*lines.splitlines(), *children, *handles])


def test_finds_what_this_kernel_has_and_leaves_nothing(tmp_path, make_netns):
    name = make_netns("probe")
    with bpf_file_system(tmp_path / "bpf") as root, in_netns(name):
        before = present(name)
        found = {finding.id: finding for finding in probe(DatapathSection(pin_dir=str(root / "fabricpilot")))}
        left = present(name) - before
    assert [f.id for f in found.values() if f.required and not f.ok] == []
    assert {"privileges", "headers", "bcc", "bpf", "map_batches", "program", "bpffs", "tcx", "clsact"} <= set(found)
    assert not (found["tcx"].ok and found["clsact"].required)
    assert found["queues_htb"].ok != bool(found["queues_htb"].why)
    assert not left


def test_pin_dir_elsewhere_says_what_to_do(tmp_path):
    found = {finding.id: finding for finding in probe(DatapathSection(pin_dir=str(tmp_path / "pins")))}
    assert not found["bpffs"].ok
    assert f"mount -t bpf bpf {tmp_path}" in found["bpffs"].why


def test_no_bcc(tmp_path, monkeypatch):
    (tmp_path / "bcc.py").write_text("raise ImportError('not here')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.id: finding for finding in probe(DatapathSection(pin_dir=str(tmp_path / "pins")))}
    assert "python3-bpfcc" in found["bcc"].why
    assert "program" not in found  # not tried: the compiler is what is missing


def test_no_root():
    agent = start_agent("import os; os.setgid(65534); os.setuid(65534)" + PROBE, "/sys/fs/bpf/fabricpilot", "auto")
    found = json.loads(agent.communicate(timeout=60)[0])
    lacking = {name: why for name, (ok, required, why) in found.items() if required and not ok}
    assert lacking == {"privileges": "this process lacks BPF, PERFMON, NET_ADMIN; run it as root or as the service"}


def test_bpf_refused_by_a_seccomp_filter():
    # A container's default seccomp profile answers bpf(2) with EPERM; so does a locked-down kernel.
    code = REFUSE_BPF + PROBE
    agent = start_agent(code, "/sys/fs/bpf/fabricpilot", "ebpf")
    found = json.loads(agent.communicate(timeout=60)[0])
    assert found["bpf"] == [
        False,
        True,
        "refused: the kernel is locked down, or a seccomp filter (a container?) forbids it",
    ]
    assert "program" not in found


def test_where_bpf_is_refused_auto_is_nftables_and_says_what_it_cannot():
    agent = start_agent(REFUSE_BPF + PROBE, "/sys/fs/bpf/fabricpilot", "auto")
    found = json.loads(agent.communicate(timeout=60)[0])
    assert [name for name, (ok, required, _) in found.items() if required and not ok] == []
    assert found["bpf"][0] is False
    assert found["nftables"] == [True, True, ""]
    assert found["can_adopt"][0]
    assert found["can_exact_payload"] == [False, False, "not with the nftables data path"]


def test_the_services_capabilities_are_enough(tmp_path):
    with bpf_file_system(tmp_path / "bpf") as root:
        capabilities = "+bpf,+net_admin,+perfmon"
        done = subprocess.run(
            [
                "setpriv",
                f"--bounding-set=-all,{capabilities}",
                f"--inh-caps=-all,{capabilities}",
                f"--ambient-caps=-all,{capabilities}",
                *(sys.executable, "-P", "-c", PROBE, str(root / "fabricpilot"), "auto"),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["program"][0], found["program"]
    assert found["map_batches"][0]


def test_fake_needs_nothing():
    assert [finding.ok for finding in probe(DatapathSection(backend="fake"))] == [True]


@pytest.mark.skipif(not Path("/usr/bin/ip").exists(), reason="needs iproute2")
def test_under_ip_netns_exec_the_standard_mount_is_not_made(make_netns):
    name = make_netns("exec")
    done = subprocess.run(
        ["ip", "netns", "exec", name, sys.executable, "-P", "-c", PROBE, "/sys/fs/bpf/fabricpilot", "auto"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        timeout=60,
    )
    assert f"not visible under `ip netns exec {name}`" in json.loads(done.stdout)["bpffs"][2]
