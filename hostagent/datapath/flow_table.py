"""The kernel's flow table as numpy columns, and flows taken out of it (ebpf/flow_table.h, ebpf/flow_access.h).

Both are done by programs that this module runs. One copies the flows of some buckets at a time into a map, each bucket
under its lock, so that no flow is reported that was half replaced by another; states change like any counter. The other
one is run with keys for a packet.
"""

import os
from typing import Final

import numpy as np
import numpy.typing as npt

from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import FLOW_KEY_DTYPE, FLOW_STATE_DTYPE

BUCKET_FLOWS: Final = 8
_READ_FLOWS: Final = 512  # that there is room for, so one run of the program stops short of it
_READ_BUCKETS: Final = 16  # that one run of the program looks at
_MOST_RUNS: Final = 512  # per system call; those for which there is no room left cost little
_FORGET_AT_ONCE: Final = 80  # keys that one run of the program takes

# `struct flow`, `struct flow_bucket` and `struct flow_tags` of ebpf/flow_table.h.
FLOW_DTYPE: Final = np.dtype(
    {
        "names": ["key", "state"],
        "formats": [FLOW_KEY_DTYPE, FLOW_STATE_DTYPE],
        "offsets": [0, FLOW_KEY_DTYPE.itemsize],
        "itemsize": 192,
    }
)
BUCKET_DTYPE: Final = np.dtype([("flow", FLOW_DTYPE, BUCKET_FLOWS)])
TAGS_DTYPE: Final = np.dtype([("tags", "u1", BUCKET_FLOWS), ("lock", "<u4"), ("pad", "<u4")])
HASH_DTYPE: Final = np.dtype([("secret", "<u4", FLOW_KEY_DTYPE.itemsize // 4)])
# `struct flow_copy` and `struct flow_copies` of ebpf/flow_access.h.
COPY_DTYPE: Final = np.dtype([("key", FLOW_KEY_DTYPE), ("state", FLOW_STATE_DTYPE)])
COPIES_DTYPE: Final = np.dtype([("bucket", "<u4"), ("count", "<u4"), ("raw", "u1", _READ_FLOWS * COPY_DTYPE.itemsize)])

_KEY_WORDS: Final = FLOW_KEY_DTYPE.itemsize // 8
_ANY_FRAME: Final = bytes(14)


def read_flows(program: int, copies: int, buckets: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """Every flow in the table: keys (FLOW_KEY_DTYPE, shape (n,)) and states (FLOW_STATE_DTYPE, shape (n,)).

    Flows that come and go meanwhile may be missed, and one that left and came back may be there as both.

    Args:
        program: file descriptor of the program `read`; the caller sees to it that nobody else runs it.
        copies: file descriptor of the map `flow_copies`.
        buckets: of the table.
    """
    zero, value = np.zeros(1, np.uint32), np.zeros(1, COPIES_DTYPE)
    words = value["raw"].view(np.uint64).reshape(_READ_FLOWS, -1)
    keys, states = [], []
    while True:
        value["count"] = 0
        bpf.update(copies, zero, value)  # all of it, as the kernel knows no parts
        runs = (buckets - int(value["bucket"][0])) // _READ_BUCKETS + 1
        bpf.prog_test_run(program, _ANY_FRAME, repeat=min(runs, _MOST_RUNS))
        bpf.lookup(copies, zero, value)
        count = int(value["count"][0])
        keys.append(words[:count, :_KEY_WORDS].copy())
        states.append(words[:count, _KEY_WORDS:].copy())
        if int(value["bucket"][0]) >= buckets:
            break
    return np.concatenate(keys).view(FLOW_KEY_DTYPE)[:, 0], np.concatenate(states).view(FLOW_STATE_DTYPE)[:, 0]


def draw_hash(flow_hash: int) -> None:
    """Draw what flows are hashed with, for a table that is empty and not in use yet.

    Args:
        flow_hash: file descriptor of the map `flow_hash`.
    """
    secret = np.frombuffer(os.urandom(HASH_DTYPE.itemsize), HASH_DTYPE)
    bpf.update(flow_hash, np.zeros(1, np.uint32), secret)


def forget_flows(program: int, keys: npt.NDArray[np.void]) -> int:
    """Take flows (FLOW_KEY_DTYPE, shape (n,)) out of the table; returns how many were there.

    Args:
        program: file descriptor of the program `forget`.
        keys: of the flows.
    """
    return sum(
        bpf.prog_test_run(program, keys[begin : begin + _FORGET_AT_ONCE].tobytes())[0]
        for begin in range(0, len(keys), _FORGET_AT_ONCE)
    )
