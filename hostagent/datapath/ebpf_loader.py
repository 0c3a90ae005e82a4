"""The loader child: compiles the egress program with bcc, loads it, pins program and maps, and exits.

Clang takes 120 MB that the agent must not keep, hence a process of its own:

    python -m hostagent.datapath.ebpf_loader PIN_DIR FLOW_ENTRIES [OLD_DIR MAP...]     what `load` runs
    python -m hostagent.datapath.ebpf_loader --check-bcc              only: can bcc be imported?
    python -m hostagent.datapath.ebpf_loader --check-program          only: does it compile and pass the verifier?

The folder must exist, be on a bpffs, and be empty. The last line on standard output is a JSON object, {"ok": true, ...}
or {"ok": false, "error": "one line"}; the compiler's own words go to standard error. On an error the folder is left
as it was.

The maps of OLD_DIR that are named, and are made the same way, are taken over: before the program is loaded, each gets
the file descriptor of the new map in its place, and the program is none the wiser.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from fabricpilot.errors import KernelError
from hostagent.datapath.pinned_names import CGROUP_PROGRAMS, LONG_FLOW_RING, MAPS, PROGRAM_PIN, RUN_BY_US
from hostagent.datapath.source import PROGRAM, STUB_KERNEL_DIR, program_source

_TIMEOUT_S: Final = 60.0
_DEBIAN_PACKAGES: Final = "/usr/lib/python3/dist-packages"
_UAPI_DIR: Final = Path("/usr/include")


def load(
    pin_dir: Path, flow_entries: int, old_dir: Path | None = None, agreeing: Collection[str] = ()
) -> dict[str, Any]:
    """Run the loader child on an empty folder; returns what it says of its work.

    `instructions`, `seconds`, `kept`, and `blind`: why the program cannot see the backlog of sockets, "" if it can.

    Args:
        pin_dir: the folder.
        flow_entries: size of the flow table.
        old_dir: folder of the data path that is replaced.
        agreeing: its maps whose layouts agree with this version's; `kept` says which of them were taken over.

    Raises:
        KernelError: whatever kept it from loading, in one line.
    """
    old = [] if old_dir is None else [str(old_dir), *agreeing]
    return _run_child(str(pin_dir), str(flow_entries), *old)


def check_bcc() -> str:
    """Version of the bcc that the loader child would use.

    Raises:
        KernelError: it cannot be imported.
    """
    return str(_run_child("--check-bcc")["bcc"])


def check_program() -> dict[str, Any]:
    """Compile and load the program and let go of it again; returns what `load` does.

    Raises:
        KernelError: whatever kept it from loading, in one line.
    """
    return _run_child("--check-program")


def _run_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "hostagent.datapath.ebpf_loader", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"loading the BPF program took over {_TIMEOUT_S:.0f} s and was given up") from error
    with contextlib.suppress(ValueError, IndexError):
        said: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        if said["ok"]:
            return said
        raise KernelError(said["error"] + _first_complaint(child.stderr))
    raise KernelError(f"the BPF loader died with status {child.returncode}{_first_complaint(child.stderr)}")


def _first_complaint(stderr: str) -> str:
    """The most telling line of what compiler or verifier wrote, for the end of a one-line message."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = next((line for line in lines if "error:" in line), lines[-1] if lines else "")
    return f" ({telling[:200]})" if telling else ""


# --- in the child ----------------------------------------------------------------------------------------------------


def _import_bcc() -> Any:
    os.environ["BCC_KERNEL_SOURCE"] = str(STUB_KERNEL_DIR)
    if _DEBIAN_PACKAGES not in sys.path:
        # bcc is pure ctypes, and only Debian packages it: any Python 3 can use that, behind all else it has.
        sys.path.append(_DEBIAN_PACKAGES)
    try:
        import bcc
    except ImportError as error:
        raise KernelError(
            f"bcc cannot be imported ({error}); install the Debian package python3-bpfcc, "
            "which compiles the data path when it is loaded"
        ) from error
    return bcc


def compiled(flow_entries: int, macros: Mapping[str, int]) -> tuple[Any, Any]:
    """The compiler and what it made of the programs; see `compiled_text`."""
    return compiled_text(program_source(flow_entries, macros=macros))


def compiled_text(source: str) -> tuple[Any, Any]:
    """The compiler and what it made of a C text, its maps made and nothing loaded. Keeps 120 MB.

    Raises:
        KernelError: what the compiler lacks or complains of, in one line.
    """
    if not (_UAPI_DIR / "linux" / "bpf.h").exists():
        raise KernelError("/usr/include/linux is missing; install the Debian package linux-libc-dev")
    bcc = _import_bcc()
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    flags = [f"-I{_UAPI_DIR}", f"-I{_UAPI_DIR / multiarch}", "-Wno-macro-redefined"]
    try:
        return bcc, bcc.BPF(text=source.encode(), cflags=flags)
    except Exception as error:  # bcc raises nothing more specific
        why = "" if os.geteuid() == 0 else "; it takes root, or the capabilities BPF, PERFMON and NET_ADMIN"
        raise KernelError(f"the BPF program could not be compiled, or its maps not be made{why}") from error


def _compile_and_load(
    flow_entries: int, pin_dir: Path | None, old_dir: Path | None = None, agreeing: Collection[str] = ()
) -> dict[str, Any]:
    """Compile and load; pin in `pin_dir` unless it is None, in which case all is gone when the child exits."""
    started = time.monotonic()
    macros, blind = backlog_macros()
    try:
        bcc, module, maps, program, kept = _in_kernel(flow_entries, macros, old_dir, agreeing)
    except KernelError as error:
        if not macros:
            raise
        # Whatever this kernel minds in the look into its sockets, the rest is worth having.
        bcc, module, maps, program, kept = _in_kernel(flow_entries, {}, old_dir, agreeing)
        blind = f"with a look at it, {error}"
    on_cgroups: dict[str, int] = {}
    with contextlib.suppress(Exception):  # without CONFIG_CGROUP_BPF the kernel has no such programs, nor needs them
        for pin, (function, kind, attach_type) in CGROUP_PROGRAMS.items():
            on_cgroups[pin] = module.load_func(function.encode(), kind, attach_type=attach_type).fd
    if pin_dir is not None:
        ring = bcc.lib.bpf_table_fd(module.module, LONG_FLOW_RING.encode())
        by_us = {pin: module.load_func(name.encode(), bcc.BPF.SCHED_CLS).fd for pin, name in RUN_BY_US.items()}
        _pin(pin_dir, {PROGRAM_PIN: program.fd, **by_us, **on_cgroups, **maps, LONG_FLOW_RING: ring})
    return {
        "ok": True,
        "blind": blind,
        "on_cgroups": sorted(on_cgroups),
        "instructions": len(module.dump_func(PROGRAM.encode())) // 8,
        "seconds": round(time.monotonic() - started, 3),
        "kept": kept,
    }


def _in_kernel(
    flow_entries: int, macros: Mapping[str, int], old_dir: Path | None, agreeing: Collection[str]
) -> tuple[Any, Any, dict[str, int], Any, list[str]]:
    """The compiler, its module, the maps by name, the loaded egress program, and the old maps that it works on."""
    bcc, module = compiled(flow_entries, macros)
    maps = {name: bcc.lib.bpf_table_fd(module.module, name.encode()) for name in MAPS}
    kept = _take_over(maps, old_dir, agreeing) if old_dir is not None else []
    try:
        program = module.load_func(PROGRAM.encode(), bcc.BPF.SCHED_CLS)
    except Exception as error:
        raise KernelError(f"the kernel refused the BPF program: {error}") from error
    return bcc, module, maps, program, kept


def _take_over(maps: dict[str, int], old_dir: Path, agreeing: Collection[str]) -> list[str]:
    """Put old maps in the place of new ones of the same make; returns the names of those that were."""
    from hostagent.datapath import bpf_syscall as bpf
    from hostagent.datapath.pins import kept_maps

    with contextlib.ExitStack() as closing:
        alike: dict[str, int] = {}
        for name in set(agreeing).intersection(maps):
            try:
                old = bpf.obj_get(old_dir / name)
            except OSError as error:
                raise KernelError(f"cannot open {old_dir / name}: {error.strerror}") from error
            closing.callback(os.close, old)
            if bpf.map_shape(old) == bpf.map_shape(maps[name]):
                alike[name] = old
        kept = kept_maps(alike)
        for name in kept:
            os.dup2(alike[name], maps[name], inheritable=False)
    return sorted(kept)


def _die_with_parent() -> None:
    """An agent that is killed takes its loader along: nothing is pinned behind the back of the next one."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def backlog_macros() -> tuple[Mapping[str, int], str]:
    """Offsets for ebpf/socket.h, and why there are none where there are none."""
    from hostagent.datapath import backlog_offsets

    try:
        return backlog_offsets.backlog_macros(), ""
    except OSError:
        return {}, f"{backlog_offsets.KERNEL_BTF} is missing: the kernel was built without CONFIG_DEBUG_INFO_BTF"
    except (KeyError, ValueError) as error:
        return {}, f"the kernel's BTF does not tell where it is: {error.args[0]}"


def _pin(pin_dir: Path, objects: dict[str, int]) -> None:
    from hostagent.datapath.bpf_syscall import obj_pin

    made: list[Path] = []
    try:
        for name, fd in objects.items():
            obj_pin(fd, pin_dir / name)
            made.append(pin_dir / name)
    except OSError as error:
        for path in made:
            path.unlink()
        raise KernelError(f"cannot pin the data path in {pin_dir}: {error.strerror}") from error


def _main(arguments: list[str]) -> int:
    _die_with_parent()
    try:
        if arguments == ["--check-bcc"]:
            said = {"ok": True, "bcc": _import_bcc().__version__}
        elif arguments == ["--check-program"]:
            said = _compile_and_load(1024, None)
        else:
            old_dir = Path(arguments[2]) if len(arguments) > 2 else None
            said = _compile_and_load(int(arguments[1]), Path(arguments[0]), old_dir, arguments[3:])
    except KernelError as error:
        said = {"ok": False, "error": str(error)}
    print(json.dumps(said), flush=True)
    return 0 if said["ok"] else 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
