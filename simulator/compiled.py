"""The decorator of all compiled functions: numba in nopython mode, machine code kept between runs.

The first call after an installation compiles (up to a minute for the fabric); afterwards the code is read from a cache.
numba looks at the file of a function to see whether its code is stale, not at the functions it calls in other files, so
the cache folder's name has a hash of all files with compiled code: a change in any of them compiles all anew.
"""

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import numba as nb

P = ParamSpec("P")
R = TypeVar("R")

_HERE = Path(__file__).parent
_SOURCES = ("arrays", "compiled", "fabric", "rank", "schemes", "sharing", "star")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as machine code with the same signature."""
    return _njit(function)


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """As `compiled`, for functions that only compiled ones call: without the costly entry from Python."""
    return _njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _njit(function: Callable[P, R], **options: bool) -> Callable[P, R]:
    """No kernel allocates, so none counts references to its arrays (`_nrt`), which took half of the fabric's time."""
    before = nb.config.CACHE_DIR
    nb.config.CACHE_DIR = _cache_dir()
    try:
        return cast(Callable[P, R], nb.njit(cache=True, _nrt=False, error_model="numpy", **options)(function))
    finally:
        nb.config.CACHE_DIR = before


@cache
def _cache_dir() -> str:
    """Beside the byte code where that is writable, else in the user's cache."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((_HERE / f"{name}.py").read_bytes())
    folder = f"kernels-{digest.hexdigest()[:12]}"
    if os.access(_HERE, os.W_OK):
        return str(_HERE / "__pycache__" / folder)
    user = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return str(user / "fabricpilot" / folder)
