"""Compile the BPF programs of `ebpf/transport` with clang.

No kernel headers: the sources name the kernel members they use and the loader finds them in the running kernel's BTF.
What is needed is clang, and libbpf's headers. A build takes about a third of a second and is made anew each time, so
nothing stale can be loaded and nothing is left behind.
"""

import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from fabricpilot.errors import FabricpilotError, KernelError

SOURCES = Path(__file__).parents[2] / "ebpf" / "transport"
_LIBBPF_HEADER = Path("/usr/include/bpf/bpf_helpers.h")
_BUILD_TIMEOUT_S = 60.0


def compile_program(source: str, directory: Path, defines: Iterable[str] = ()) -> Path:
    """Compile `ebpf/transport/<source>` into `directory`.

    Args:
        source: file name, for example `dctcp.bpf.c`.
        directory: where the object goes; it must exist.
        defines: preprocessor names to define.

    Returns:
        The object file, with BTF.

    Raises:
        KernelError: clang or libbpf's headers are missing.
        FabricpilotError: the compiler refused the source.
    """
    clang = shutil.which("clang")
    if clang is None or not _LIBBPF_HEADER.exists():
        missing = "clang" if clang is None else f"{_LIBBPF_HEADER} (libbpf's headers)"
        raise KernelError(f"compiling {source} needs {missing}; run `apt-get install clang libbpf-dev`")
    target = directory / f"{source.removesuffix('.bpf.c')}.o"
    includes = [f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH')}"]  # <asm/types.h>; the BPF target has no own
    argv = [clang, "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror", *includes]
    argv += [f"-D{name}" for name in defines]
    argv += ["-c", str(SOURCES / source), "-o", str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise FabricpilotError(f"clang does not compile {source}: {(errors or ['no error shown'])[0]}")
    return target
