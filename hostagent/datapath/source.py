"""The egress program's source as one text, its fingerprint, and those of its maps.

bcc rewrites map accesses only in the main file, not in headers, so the headers of ebpf/ are put in its place here;
`#line` keeps compiler messages pointing at the real files. The program's fingerprint decides whether what is pinned is
this version; a map's, whether another version's map may be read and kept. That one covers the map's declaration and
every struct, enum and macro it leads to, so a field that changes its meaning must change its name.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from hostagent.datapath.flow_table import BUCKET_DTYPE, BUCKET_FLOWS
from hostagent.datapath.layout import COUNTERS_DTYPE, FINISHED_DTYPE, LONG_FLOW_DTYPE, SETTINGS_DTYPE

EBPF_DIR = Path(__file__).resolve().parents[2] / "ebpf"
STUB_KERNEL_DIR = EBPF_DIR / "stub"  # the little that bcc wants of a kernel source tree
PROGRAM = "fabricpilot_egress"

_OWN_INCLUDE = re.compile(r'#include "([\w.]+)"')


def program_source(
    flow_entries: int, directory: Path = EBPF_DIR, macros: Mapping[str, int] = MappingProxyType({})
) -> str:
    """The whole program as one C text, with a flow table of `flow_entries`, rounded up to whole buckets.

    Args:
        flow_entries: size of the flow table.
        directory: where the sources are.
        macros: further numbers to define; what the running kernel decides, so not part of the fingerprint.
    """
    defined = {"FLOW_BUCKETS": max(1, -(-flow_entries // BUCKET_FLOWS)), **macros}
    head = [f"#define {name} {value}" for name, value in defined.items()]
    return "\n".join([*head, *_inlined("egress.c", directory, set())]) + "\n"


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
    dtypes = (BUCKET_DTYPE, SETTINGS_DTYPE, COUNTERS_DTYPE, FINISHED_DTYPE, LONG_FLOW_DTYPE)
    layouts = [dtype.descr for dtype in dtypes]
    return hashlib.sha256(f"{layouts}\n{program_source(flow_entries)}".encode()).digest()


def map_layouts(directory: Path = EBPF_DIR) -> dict[str, bytes]:
    """What each map holds, by its name: 32 bytes that are equal exactly when declaration and C types are.

    The number of flows is left out: it makes another map, but not one that reads differently.
    """
    text = _COMMENT.sub(" ", program_source(0, directory))
    definitions = _definitions(text)
    layouts = {}
    for macro, arguments in _MAP.findall(text):
        words = [word.strip() for word in arguments.split(",")]
        name = words[3] if macro.endswith("TABLE") else words[0]
        told = "\n".join(_told(f"{macro}({arguments})", definitions))
        layouts[name] = hashlib.sha256(" ".join(told.split()).encode()).digest()
    return layouts


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|^#line[^\n]*", re.DOTALL | re.MULTILINE)
_MAP = re.compile(r"^(BPF_[A-Z_]+)\((.*?)\);", re.DOTALL | re.MULTILINE)
_MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(?:.*\\\n)*.*$", re.MULTILINE)
_TYPE = re.compile(r"^(struct|union|enum)\s+(\w+)\s*\{.*?^\}[^;\n]*;", re.DOTALL | re.MULTILINE)
_WORD = re.compile(r"\b(?:(?:struct|union|enum)\s+)?[A-Za-z_]\w*\b")


def _definitions(text: str) -> dict[str, str]:
    """Every macro, type (`struct x`) and enum constant of `text`, with the text that defines it."""
    found = {match[1]: match[0] for match in _MACRO.finditer(text)}
    for match in _TYPE.finditer(text):
        found[f"{match[1]} {match[2]}"] = match[0]
        if match[1] == "enum":
            found |= dict.fromkeys(_WORD.findall(match[0].partition("{")[2]), match[0])
    return found


def _told(declaration: str, definitions: dict[str, str]) -> list[str]:
    """The declaration and all definitions it leads to, in the order they are come upon."""
    told, waiting = [], [declaration]
    while waiting:
        text = waiting.pop(0)
        if text in told:
            continue
        told.append(text)
        waiting += [definitions[word] for word in _WORD.findall(text) if word in definitions]
    return told
