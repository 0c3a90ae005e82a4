"""Verdicts as the kernel keeps them: level and route of single flows, each with an end. Pure; steering.py writes them.

The word's layout is `union verdict` in ebpf/verdict.h. Times are CLOCK_MONOTONIC in whole seconds, so a verdict ends up
to a second late, never early.
"""

import ipaddress
import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from fabricpilot.wire import FlowVerdict
from hostagent.datapath.base import FLOW_KEY_DTYPE

MAX_VERDICTS: Final = 8192  # in the kernel's table
_KEY: Final = struct.Struct("<16s16sHHB3x")  # FLOW_KEY_DTYPE
VERDICT_DTYPE: Final = np.dtype([("until_s", "<u4"), ("generation", "<u2"), ("level", "u1"), ("route", "u1")])


def flow_keys(verdicts: Sequence[FlowVerdict]) -> npt.NDArray[np.void]:
    """The flows of `verdicts`, FLOW_KEY_DTYPE, shape (n,)."""
    packed = (
        _KEY.pack(_mapped(v.source), _mapped(v.destination), v.source_port, v.destination_port, v.protocol)
        for v in verdicts
    )
    return np.frombuffer(b"".join(packed), FLOW_KEY_DTYPE)


def verdict_words(verdicts: Sequence[FlowVerdict], now_ns: int) -> npt.NDArray[np.void]:
    """What is to be done with the flows of `verdicts`, VERDICT_DTYPE, shape (n,)."""
    words = np.zeros(len(verdicts), VERDICT_DTYPE)
    words["until_s"] = [math.ceil(now_ns / 1e9 + verdict.ttl_s) for verdict in verdicts]
    words["level"] = [verdict.level + 1 for verdict in verdicts]
    words["route"] = [verdict.route for verdict in verdicts]
    return words


def expired(words: npt.NDArray[np.void], now_ns: int) -> npt.NDArray[np.bool_]:
    """Which of `words` (VERDICT_DTYPE, shape (n,)) have ended."""
    return np.asarray(words["until_s"].astype(np.int64) * 1_000_000_000 <= now_ns)


@lru_cache(maxsize=4096)
def _mapped(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
