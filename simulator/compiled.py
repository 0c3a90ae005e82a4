"""The decorator of all compiled functions: numba in nopython mode, machine code kept between runs.

The first call after an installation compiles (some seconds); afterwards the code comes from `__pycache__`, or from
numba's cache folder where that is not writable.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba as nb

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as machine code with the same signature."""
    return cast(Callable[P, R], nb.njit(cache=True)(function))
