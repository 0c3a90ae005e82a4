"""What counts, tags and prioritises packets: one interface (base.py), several backends.

`open_datapath` gives the configured one. Opening adopts what an earlier agent left and changes nothing in the kernel.
"""

from pathlib import Path

from fabricpilot.config import DatapathSection
from hostagent.datapath.base import Datapath


def open_datapath(section: DatapathSection) -> Datapath:
    """The data path that `[datapath]` asks for; `attach` and `apply` bring it into the kernel.

    Raises:
        KernelError: the kernel does not allow it, or what is pinned cannot be opened.
        UsageError: `pin_dir` belongs to the data path of another network namespace.
    """
    if section.backend == "fake":
        from hostagent.datapath.fake import FakeDatapath

        return FakeDatapath(section.flow_entries)
    from hostagent.datapath.ebpf import EbpfDatapath

    return EbpfDatapath(Path(section.pin_dir), section.flow_entries)
