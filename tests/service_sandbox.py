"""Run a command as a systemd unit would: its capabilities, system calls, and no memory both writable and executable.

Not a test: `python service_sandbox.py UNIT COMMAND...` for test_service_sandbox.py. Where systemd is not the init, this
is as near as one gets to the unit: what it reads is the unit file itself.
"""

import ctypes
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_MDWE = 38, 22, 65
SECCOMP_MODE_FILTER = 2
ALLOW, ERRNO_EPERM, KILL = 0x7FFF0000, 0x00050001, 0x80000000
AUDIT_ARCH_X86_64 = 0xC000003E
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
UNISTD = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"


def settings(unit):
    """`[Service]` of a unit: values by key, the repeated ones in order."""
    found = {}
    section = ""
    for line in Path(unit).read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def expand(names):
    """System call names, sets (`@system-service`) replaced by what is in them."""
    calls = set()
    for name in names:
        if name.startswith("@"):
            shown = subprocess.run(
                ["systemd-analyze", "syscall-filter", name], check=True, capture_output=True, text=True
            )
            lines = [line.strip() for line in shown.stdout.splitlines()[1:]]
            calls |= expand([line for line in lines if line and not line.startswith("#")])
        else:
            calls.add(name)
    return calls


def allowed_calls(filters):
    """The system calls that a list of SystemCallFilter= lines lets through."""
    allowed = set()
    for line in filters:
        calls = expand(line.lstrip("~").split())
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed


def seccomp_program(allowed):
    """A classic BPF program: EPERM for every system call that is not allowed."""
    numbers = {m[1]: int(m[2]) for m in re.finditer(r"__NR_(\w+) (\d+)", Path(UNISTD).read_text())}
    code = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for name in sorted(allowed & numbers.keys()):
        code += [(JUMP_EQUAL, 0, 1, numbers[name]), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ERRNO_EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code), len(code)


def confine(unit):
    """Restrict this process to what the unit gives its service; capabilities go at the next exec."""
    service = settings(unit)
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(what, *arguments):
        if libc.prctl(what, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0)[:4])) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {what}")

    if service.get("MemoryDenyWriteExecute") == ["yes"]:
        prctl(PR_SET_MDWE, 1)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    program, length = seccomp_program(allowed_calls(service["SystemCallFilter"]))
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("=H6xQ", length, ctypes.addressof(buffer)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


if __name__ == "__main__":
    confine(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
