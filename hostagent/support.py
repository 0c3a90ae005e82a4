"""What the running kernel supports: each thing the data path and the queues need is tried, and named where it lacks.

    findings = probe(section)        what `fabricpilot agent check` prints
    missing = [f for f in findings if f.required and not f.ok]

Everything is tried for real (a program is loaded, a qdisc is made), because configuration files of a kernel say less
than it does. What needs an interface is tried by a child in a network namespace of its own, so the host's interfaces
are never touched and nothing is left behind.
"""

import contextlib
import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fabricpilot.config import DatapathSection
from fabricpilot.errors import FabricpilotError, KernelError
from hostagent.datapath.base import CAPABILITIES


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        id: fixed name for programs.
        what: the same for a person.
        ok: it is there.
        required: the agent cannot run without it.
        why: where it is not there, why, and what to do; else what was found, or nothing.
    """

    id: str
    what: str
    ok: bool
    required: bool
    why: str = ""


_CAP_NET_ADMIN: Final = 12
_CAP_SYS_ADMIN: Final = 21
_CAP_PERFMON: Final = 38
_CAP_BPF: Final = 39
_CLONE_NEWNET: Final = 0x40000000
_CHILD_TIMEOUT_S: Final = 30.0

# Kernel options, to name what is missing.
_QUEUES: Final = {
    "prio": "CONFIG_NET_SCH_PRIO",
    "htb": "CONFIG_NET_SCH_HTB",
    "pfifo_fast": "any kernel's default qdisc; yours has another",
}


def probe(section: DatapathSection) -> list[Finding]:
    """Try everything; never raises for something missing, and changes nothing (a bpffs is not mounted)."""
    from hostagent.datapath import bpf_refused
    from hostagent.datapath.ebpf import EbpfDatapath, kernel_capabilities
    from hostagent.datapath.nftables import NftablesDatapath

    def nftables() -> list[Finding]:
        return [*_for_nftables(), *_capabilities(NftablesDatapath.name, NftablesDatapath.capabilities, section)]

    if section.backend == "fake":
        return [Finding("fake", "fake data path", True, True, "needs no kernel support")]
    if section.backend == "nftables":
        return nftables()
    findings, can = _for_ebpf(section, kernel_capabilities())
    if section.backend == "auto" and bpf_refused() and _privileges("NET_ADMIN").ok:
        # `auto` is the other data path here: what eBPF lacks is told, and stops nobody.
        told = [replace(finding, required=False) for finding in findings if finding.id != "privileges"]
        return [*told, *nftables()]
    if not findings[0].ok:
        return findings  # nothing else can be tried, and saying so ten times helps nobody
    return [*findings, *_in_own_namespace(section.hook), *_capabilities(EbpfDatapath.name, can, section)]


def _for_nftables() -> list[Finding]:
    privileges = _privileges("NET_ADMIN")
    if not privileges.ok:
        return [privileges]
    found = (finding for finding in _in_own_namespace("auto") if finding.id not in ("tcx", "clsact"))
    return [privileges, *(replace(finding, required=finding.id == "nftables") for finding in found)]


def _for_ebpf(section: DatapathSection, can: frozenset[str]) -> tuple[list[Finding], frozenset[str]]:
    """What was tried, and what is left of the capabilities once it was."""
    privileges = _privileges("BPF", "PERFMON", "NET_ADMIN")
    findings = [privileges, _headers(), _bcc(), _btf()]
    if not privileges.ok:
        return findings, can
    syscall = _bpf_syscall()
    findings.append(syscall)
    if syscall.ok:
        findings.append(_map_batches())
        if all(finding.ok for finding in findings if finding.required):
            program, blind = _program()
            findings.append(program)
            can -= {"backlog"} if blind else set()
    findings.append(_pin_dir(Path(section.pin_dir)))
    return findings, can


def _capabilities(backend: str, has: frozenset[str], section: DatapathSection) -> Iterator[Finding]:
    """What the data path can do here. What is configured, and it cannot, stops the agent unless `auto` chose it.

    `mode = "backlog"` always does: `mode = "auto"` is the one that goes without.
    """
    from hostagent.datapath import configured_beyond

    configured = configured_beyond(has, section)
    for name, what in CAPABILITIES.items():
        why = "" if name in has else f"not with the {backend} data path"
        if name in configured:
            why += f", and {configured[name]} asks for it"
        required = name in configured and (section.backend != "auto" or name == "backlog")
        yield Finding(f"can_{name}", what, name in has, required, why)


def _privileges(*needed: str) -> Finding:
    what = f"capabilities {', '.join(needed)}"
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)

    def have(*any_of: int) -> bool:
        return any(effective >> capability & 1 for capability in any_of)

    held = {
        "BPF": have(_CAP_BPF, _CAP_SYS_ADMIN),
        "PERFMON": have(_CAP_PERFMON, _CAP_SYS_ADMIN),
        "NET_ADMIN": have(_CAP_NET_ADMIN),
    }
    lacking = [name for name in needed if not held[name]]
    why = f"this process lacks {', '.join(lacking)}; run it as root or as the service" if lacking else ""
    return Finding("privileges", what, not lacking, True, why)


def _headers() -> Finding:
    there = Path("/usr/include/linux/bpf.h").exists()
    why = "" if there else "/usr/include/linux is missing; install the Debian package linux-libc-dev"
    return Finding("headers", "kernel headers for user space", there, True, why)


def _bcc() -> Finding:
    from hostagent.datapath.ebpf_loader import check_bcc

    try:
        return Finding("bcc", "bcc, the compiler of the data path", True, True, f"version {check_bcc()}")
    except KernelError as error:
        return Finding("bcc", "bcc, the compiler of the data path", False, True, str(error))


def _btf() -> Finding:
    there = Path("/sys/kernel/btf/vmlinux").exists()
    why = "" if there else "kernel built without CONFIG_DEBUG_INFO_BTF: levels follow bytes sent, not bytes written"
    return Finding("btf", "BTF of the running kernel", there, False, why)


def _bpf_syscall() -> Finding:
    from hostagent.datapath import bpf_syscall as bpf

    what = "bpf(2): loading a tc program"
    try:
        os.close(bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC))
    except OSError as error:
        reasons = {
            errno.EPERM: "refused: the kernel is locked down, or a seccomp filter (a container?) forbids it",
            errno.ENOSYS: "this kernel has no bpf(2): it needs CONFIG_BPF_SYSCALL",
            errno.EINVAL: "this kernel knows no tc programs: it needs CONFIG_NET_CLS_BPF",
        }
        return Finding("bpf", what, False, True, reasons.get(error.errno or 0, error.strerror or str(error)))
    return Finding("bpf", what, True, True)


def _map_batches() -> Finding:
    import numpy as np

    from hostagent.datapath import bpf_syscall as bpf

    what = "LRU hash map, read in batches"
    try:
        fd = bpf.map_create(bpf.MAP_TYPE_LRU_HASH, 8, 8, 64, "fp_probe")
    except OSError as error:
        return Finding("map_batches", what, False, True, f"making one failed: {error.strerror}")
    try:
        dtype = np.dtype([("word", "<u8")])
        bpf.update(fd, np.zeros(1, np.uint64), np.ones(1, np.uint64))
        keys, _ = bpf.lookup_all(fd, dtype, dtype, 64)
        why = "" if len(keys) == 1 else f"read {len(keys)} entries of 1"
    except OSError as error:
        why = f"{error.strerror}; kernel 5.6 or later is needed"
    finally:
        os.close(fd)
    return Finding("map_batches", what, not why, True, why)


def _program() -> tuple[Finding, bool]:
    """The finding, and whether it is the program that cannot see the backlog of sockets."""
    from hostagent.datapath.ebpf_loader import check_program

    what = "egress program: compiles and passes the verifier"
    try:
        said = check_program()
    except KernelError as error:
        return Finding("program", what, False, True, f"{error}; kernel 5.15 or later is needed"), True
    without = f", levels follow bytes sent: {said['blind']}" if said["blind"] else ""
    found = f"{said['instructions']} instructions in {said['seconds']} s{without}"
    return Finding("program", what, True, True, found), bool(said["blind"])


def _pin_dir(pin_dir: Path) -> Finding:
    from hostagent.datapath.bpffs import check_bpffs

    what = f"BPF file system for {pin_dir}"
    try:
        return Finding("bpffs", what, True, True, check_bpffs(pin_dir))
    except FabricpilotError as error:
        return Finding("bpffs", what, False, True, str(error))


def _in_own_namespace(hook: str) -> Iterator[Finding]:
    """What needs an interface, as tried by the child.

    Args:
        hook: `datapath.hook`.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-m", "hostagent.support"]
    why, said = "", {}
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=False
        )
        with contextlib.suppress(ValueError, IndexError):
            said = json.loads(child.stdout.splitlines()[-1])
        if not said:
            why = f"could not be tried: {(child.stderr.strip().splitlines() or ['the probe said nothing'])[-1]}"
    except subprocess.TimeoutExpired:
        why = f"could not be tried within {_CHILD_TIMEOUT_S:.0f} s"
    tcx, clsact = said.get("tcx", why), said.get("clsact", why)
    yield Finding("tcx", "tcx, where the program is attached to a NIC", not tcx, hook == "tcx", tcx)
    needed = hook == "clsact" or (hook == "auto" and bool(tcx))
    yield Finding("clsact", "clsact qdisc, where it is attached otherwise", not clsact, needed, clsact)
    kinds, kinds_why = said.get("kinds", []), said.get("kinds_why", why)
    for kind, option in _QUEUES.items():
        lacking = "" if kind in kinds else kinds_why or f"not in this kernel: {option}"
        yield Finding(f"queues_{kind}", f"strict bands by {kind}", not lacking, False, lacking)
    nftables = said.get("nftables", why)
    yield Finding(
        "nftables", "nftables data path: rules, conntrack's counters and times", not nftables, False, nftables
    )


# --- in the child ----------------------------------------------------------------------------------------------------


def _try_in_own_namespace() -> dict[str, object]:
    from pyroute2 import IPRoute

    from hostagent.datapath.hook import Interface
    from hostagent.datapath.tc_filter import add_clsact
    from hostagent.datapath.tcx_link import why_not
    from hostagent.qdisc import supported_kinds

    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        reason = f"could not be tried: no new network namespace ({os.strerror(ctypes.get_errno())})"
        return {"tcx": reason, "clsact": reason, "kinds_why": reason, "nftables": reason}
    said: dict[str, object] = {
        "tcx": why_not(),
        "clsact": "",
        "kinds": [],
        "kinds_why": "",
        "nftables": _try_nftables(),
    }
    with IPRoute() as ipr:
        try:
            add_clsact(ipr, Interface("lo", 1))
        except KernelError as error:
            said["clsact"] = str(error)
        try:
            said["kinds"] = sorted(supported_kinds(ipr))
        except KernelError as error:
            said["kinds_why"] = str(error)
    return said


def _try_nftables() -> str:
    """Put the data path on the loopback of this namespace, read it, and take it away."""
    from fabricpilot.levels import default_dscp, default_thresholds
    from hostagent.datapath.base import Settings
    from hostagent.datapath.nftables import NftablesDatapath

    try:
        datapath = NftablesDatapath(flow_entries=1024, idle_timeout_s=30)
        try:
            datapath.attach("lo")
            datapath.apply(Settings(default_thresholds(4), default_dscp(4), (0,) * 4))
            datapath.flows()
            datapath.detach()
        finally:
            datapath.close()
    except FabricpilotError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(json.dumps(_try_in_own_namespace()), flush=True)
