"""What counts, tags and prioritises packets: one interface (base.py), several backends.

`open_datapath` gives the configured one. Opening adopts what an earlier agent left and changes nothing in the kernel.
"""

import errno
import logging
import os
from pathlib import Path
from typing import Final

from fabricpilot.config import DatapathSection
from fabricpilot.errors import UsageError
from hostagent.datapath.base import CAPABILITIES, Datapath

log = logging.getLogger(__name__)

# Settings that not every data path can follow: key in [datapath], the value that needs it (None: any but the default),
# the capability.
_NEEDS: Final = (
    ("mode", "backlog", "backlog"),
    ("hint_cgroups", None, "sockets"),
    ("send_buffer_bytes", None, "sockets"),
    ("new_flows_per_s", None, "share"),
)

_DEFAULTS: Final = DatapathSection()

_BPF_REFUSED: Final = {
    errno.EPERM: "bpf(2) is refused (lockdown, a seccomp filter, or no CAP_BPF)",
    errno.ENOSYS: "this kernel has no bpf(2)",
    errno.EINVAL: "this kernel has no tc programs",
}


def open_datapath(section: DatapathSection) -> Datapath:
    """The data path that `[datapath]` asks for; `attach` and `apply` bring it into the kernel.

    `auto` is the one that is attached already, else eBPF, or nftables where the kernel refuses BPF.

    Raises:
        KernelError: the kernel does not allow it, or what is pinned cannot be opened.
        UsageError: `pin_dir` is no such path, or belongs to the data path of another network namespace; or the data
            path asked for cannot do what is configured.
    """
    backend = _choose(section) if section.backend == "auto" else section.backend
    datapath = _open(backend, section)
    lacking = missing_capabilities(datapath, section)
    if lacking and section.backend == "auto":
        log.warning("the %s data path goes without: %s", datapath.name, "; ".join(lacking))
    elif lacking:
        datapath.close()
        raise UsageError(f"the {datapath.name} data path cannot do what is configured: {'; '.join(lacking)}")
    return datapath


def missing_capabilities(datapath: Datapath, section: DatapathSection) -> list[str]:
    """What is configured and `datapath` cannot do, one text each."""
    lacking = configured_beyond(datapath.capabilities, section)
    return [f"{setting} needs {name}: {CAPABILITIES[name]}" for name, setting in lacking.items()]


def configured_beyond(capabilities: frozenset[str], section: DatapathSection) -> dict[str, str]:
    """By capability that is needed and not there: the setting that needs it, as "datapath.key = value"."""
    return {
        capability: f"datapath.{key} = {getattr(section, key)}"
        for key, value, capability in _NEEDS
        if (getattr(section, key) == value if value else getattr(section, key) != getattr(_DEFAULTS, key))
        and capability not in capabilities
    }


def _open(backend: str, section: DatapathSection) -> Datapath:
    if backend == "fake":
        from hostagent.datapath.fake import FakeDatapath

        return FakeDatapath(section.flow_entries)
    if backend == "nftables":
        from hostagent.datapath.nftables import NftablesDatapath

        return NftablesDatapath(section.flow_entries, section.idle_timeout_s)
    from hostagent.datapath.ebpf import EbpfDatapath

    return EbpfDatapath(Path(section.pin_dir), section.flow_entries, section.hook)


def _choose(section: DatapathSection) -> str:
    from hostagent.datapath import nft_table
    from hostagent.datapath.bpffs import check_path

    pin_dir = Path(section.pin_dir)
    check_path(pin_dir)
    if pin_dir.is_dir():
        return "ebpf"
    if nft_table.exists_here():
        return "nftables"
    if refused := bpf_refused():
        log.info("%s: the nftables data path is used", refused)
        return "nftables"
    return "ebpf"


def bpf_refused() -> str:
    """Why this kernel would not load a tc program for this process; empty if it would."""
    from hostagent.datapath import bpf_syscall as bpf

    try:
        os.close(bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC))
    except OSError as error:
        return _BPF_REFUSED.get(error.errno or 0, "")
    return ""
