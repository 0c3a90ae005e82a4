"""Which level a flow is in, and after how many more bytes that changes: the rules every scheme is made of.

Both kernels (`star`, `fabric`) call `place` when a flow arrives and whenever it reaches the boundary that the previous
call named. A flow's level is found from what the scheme may know:

    ATTAINED   bytes sent so far (PIAS, AuTO's MLFQ, LAS with many levels)
    SIZE       size known at the start, never changed (QSJF)
    REMAINING  bytes left (SRPT with many levels)
    BACKLOG    bytes left where the send buffer holds all of them, else the larger of attained and buffer size
    WRITTEN    bytes sent and those that wait in the send buffer: only sinks (what the data path does)

Thresholds follow `fabricpilot.levels`: a flow has the level k when it has reached k of them.
"""

from simulator.arrays import Floats
from simulator.compiled import inner
from simulator.schemes import ATTAINED, BACKLOG, SIZE, WRITTEN


@inner
def _reached(row: Floats, value: float) -> int:
    """How many of the ascending thresholds `row` are at most `value`."""
    level = 0
    while level < len(row) and row[level] <= value:
        level += 1
    return level


@inner
def _exceeded(row: Floats, value: float) -> int:
    """How many of the ascending thresholds `row` are below `value`."""
    level = 0
    while level < len(row) and row[level] < value:
        level += 1
    return level


@inner
def _place_once(basis: int, row: Floats, buffer_bytes: float, size: float, remaining: float) -> tuple[int, float]:
    attained = size - remaining
    if basis == SIZE:
        return _reached(row, size), 0.0
    if basis == WRITTEN:
        level = _reached(row, min(size, attained + buffer_bytes))
        sinks = level < len(row) and row[level] <= size
        return level, size + buffer_bytes - row[level] if sinks else 0.0
    if basis == BACKLOG and remaining > buffer_bytes:
        level = _reached(row, max(attained, buffer_bytes))
        sinks = size - row[level] if level < len(row) else 0.0
        return level, max(buffer_bytes, sinks)
    if basis == ATTAINED:
        level = _reached(row, attained)
        return level, size - row[level] if level < len(row) else 0.0
    level = _exceeded(row, remaining)  # REMAINING, and BACKLOG in full view
    return level, row[level - 1] if level > 0 else 0.0


@inner
def place(basis: int, row: Floats, buffer_bytes: float, size: float, remaining: float) -> tuple[int, float]:
    """Level of a flow, and the remaining bytes at which its level changes next (0 or less: it ends first).

    Args:
        basis: ATTAINED ... WRITTEN.
        row: ascending thresholds in bytes, float64, shape (K-1,); empty for one level.
        buffer_bytes: how much of the backlog is visible (BACKLOG and WRITTEN).
        size: payload bytes of the flow.
        remaining: payload bytes not yet sent, above 0.
    """
    level, boundary = _place_once(basis, row, buffer_bytes, size, remaining)
    while boundary > 0.0:  # pass over boundaries that do not change the level
        then, further = _place_once(basis, row, buffer_bytes, size, boundary)
        if then != level:
            break
        boundary = further
    return level, boundary


@inner
def standing(queue_bytes: float, peers: int, to_send: float) -> float:
    """Bytes that stand in a level's queue when a flow comes to `peers` others that have `to_send` left together.

    Several senders keep the queue at `queue_bytes`, one of them with a newcomer at half of that, since two flows only
    sometimes fill it; and nobody queues what he does not have to send.
    """
    stands: float = max(min(queue_bytes * min(peers / 2, 1.0), to_send), 0.0)
    return stands
