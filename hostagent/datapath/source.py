"""The egress program's source as one text, and its fingerprint.

bcc rewrites map accesses only in the main file, not in headers, so the headers of ebpf/ are put in its place here;
`#line` keeps compiler messages pointing at the real files. The fingerprint decides whether what is pinned can be
adopted: it covers all that makes a program and its maps what they are.
"""

import hashlib
import re
from pathlib import Path

from hostagent.datapath.base import FLOW_KEY_DTYPE, FLOW_STATE_DTYPE
from hostagent.datapath.layout import COUNTERS_DTYPE, SETTINGS_DTYPE

EBPF_DIR = Path(__file__).resolve().parents[2] / "ebpf"
STUB_KERNEL_DIR = EBPF_DIR / "stub"  # the little that bcc wants of a kernel source tree
PROGRAM = "fabricpilot_egress"

_OWN_INCLUDE = re.compile(r'#include "([\w.]+)"')


def program_source(flow_entries: int, directory: Path = EBPF_DIR) -> str:
    """The whole program as one C text, with a flow table of `flow_entries`."""
    return f"#define FLOW_ENTRIES {flow_entries}\n" + "\n".join(_inlined("egress.c", directory, set())) + "\n"


def _inlined(name: str, directory: Path, seen: set[str]) -> list[str]:
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((directory / name).read_text(encoding="utf-8").splitlines(), 1):
        include = _OWN_INCLUDE.fullmatch(line)
        if include is None:
            lines.append("" if line == "#pragma once" else line)
        elif include[1] not in seen:
            lines += [*_inlined(include[1], directory, seen), f'#line {number + 1} "{name}"']
    return lines


def fingerprint(flow_entries: int) -> bytes:
    """32 bytes that are equal exactly when program and maps are."""
    layouts = [FLOW_KEY_DTYPE.descr, FLOW_STATE_DTYPE.descr, SETTINGS_DTYPE.descr, COUNTERS_DTYPE.descr]
    return hashlib.sha256(f"{layouts}\n{program_source(flow_entries)}".encode()).digest()
