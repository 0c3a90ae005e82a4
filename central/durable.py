"""Files that are whole or not there: written beside, then renamed over the old one."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object], flush: bool = True) -> None:
    """Let `write` write a file beside `path`, and put it in place of `path` at once.

    Whenever the process ends, `path` holds the old content or the new one, whole; with `flush` also whenever the
    machine does. Flushing waits for the disk.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        write(beside)
        if flush:
            _flush(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if flush:
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
