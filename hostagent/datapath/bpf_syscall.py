"""bpf(2) without a library: the few commands that the agent needs, on file descriptors and numpy arrays.

libbpf or bcc would cost the agent tens of megabytes; the system call is stable ABI. Every function raises OSError with
the kernel's errno; what is expected in normal work (a missing key, the end of a map) is a return value instead.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.void]

# enum bpf_cmd
_MAP_CREATE: Final = 0
_MAP_LOOKUP_ELEM: Final = 1
_MAP_UPDATE_ELEM: Final = 2
_MAP_DELETE_ELEM: Final = 3
_MAP_GET_NEXT_KEY: Final = 4
_PROG_LOAD: Final = 5
_OBJ_PIN: Final = 6
_OBJ_GET: Final = 7
_PROG_TEST_RUN: Final = 10
_OBJ_GET_INFO_BY_FD: Final = 15
_PROG_QUERY: Final = 16
_MAP_LOOKUP_BATCH: Final = 24
_MAP_UPDATE_BATCH: Final = 26
_MAP_DELETE_BATCH: Final = 27
_LINK_CREATE: Final = 28
_LINK_UPDATE: Final = 29
_ENABLE_STATS: Final = 32
_LINK_DETACH: Final = 34

# enum bpf_map_type
MAP_TYPE_HASH: Final = 1
MAP_TYPE_ARRAY: Final = 2
MAP_TYPE_PERCPU_ARRAY: Final = 6
MAP_TYPE_LRU_HASH: Final = 9
_MAP_TYPE_ARRAY_OF_MAPS: Final = 12

PROG_TYPE_SCHED_CLS: Final = 3
# The smallest tc program, to see whether one may be loaded: r0 = TC_ACT_UNSPEC; exit.
RETURN_UNSPEC: Final = bytes([0xB7, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0x95, 0, 0, 0, 0, 0, 0, 0])

TCX_EGRESS: Final = 47  # of enum bpf_attach_type
FIRST: Final = 1 << 3  # BPF_F_BEFORE, before whatever else is attached there
_TCX_PROGRAMS: Final = 64  # BPF_MPROG_MAX, as many as one hook of an interface takes

_SYSCALL_NUMBERS: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_libc = ctypes.CDLL(None, use_errno=True)


class _Element(ctypes.Structure):  # BPF_MAP_*_ELEM
    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _Batch(ctypes.Structure):  # BPF_MAP_*_BATCH
    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _Object(ctypes.Structure):  # BPF_OBJ_PIN, BPF_OBJ_GET
    _fields_ = (("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


class _Info(ctypes.Structure):  # BPF_OBJ_GET_INFO_BY_FD
    _fields_ = (("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64))


class _MapCreate(ctypes.Structure):  # BPF_MAP_CREATE
    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
    )


class _ProgLoad(ctypes.Structure):  # BPF_PROG_LOAD
    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
    )


class _LinkCreate(ctypes.Structure):  # BPF_LINK_CREATE
    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class _LinkUpdate(ctypes.Structure):  # BPF_LINK_UPDATE
    _fields_ = (
        ("link_fd", ctypes.c_uint32),
        ("new_prog_fd", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("old_prog_fd", ctypes.c_uint32),
    )


class _LinkDetach(ctypes.Structure):  # BPF_LINK_DETACH
    _fields_ = (("link_fd", ctypes.c_uint32),)


class _EnableStats(ctypes.Structure):  # BPF_ENABLE_STATS
    _fields_ = (("type", ctypes.c_uint32),)


class _TestRun(ctypes.Structure):  # BPF_PROG_TEST_RUN
    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_uint64),
        ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_uint64),
        ("ctx_out", ctypes.c_uint64),
    )


class _ProgQuery(ctypes.Structure):  # BPF_PROG_QUERY
    _fields_ = (
        ("target_ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("prog_attach_flags", ctypes.c_uint64),
        ("link_ids", ctypes.c_uint64),
        ("link_attach_flags", ctypes.c_uint64),
        ("revision", ctypes.c_uint64),  # a kernel with tcx writes this one, however small the struct it was given
    )


def _bpf(command: int, attributes: ctypes.Structure) -> int:
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of bpf(2) on {platform.machine()} is not known here")
    result: int = _libc.syscall(number, command, ctypes.byref(attributes), ctypes.sizeof(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _address(array: npt.NDArray[np.generic]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("the kernel needs contiguous arrays")
    return array.ctypes.data


# --- objects ---------------------------------------------------------------------------------------------------------


def obj_pin(fd: int, path: Path) -> None:
    """Pin a map or program at `path` in a bpffs."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, _Object(ctypes.addressof(name), fd, 0))


def obj_get(path: Path) -> int:
    """File descriptor (close-on-exec) of what is pinned at `path`."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, _Object(ctypes.addressof(name), 0, 0))


def link_create(program: int, target: int, attach_type: int, flags: int = 0) -> int:
    """Attach a program to a target (a cgroup's directory, an interface's index), until all descriptors and pins go."""
    return _bpf(_LINK_CREATE, _LinkCreate(program, target, attach_type, flags))


def link_update(link: int, program: int) -> None:
    """Put a program in the place of the one that a link attaches, in one step."""
    _bpf(_LINK_UPDATE, _LinkUpdate(link, program, 0, 0))


def link_detach(link: int) -> None:
    """Take a link's program off at once, whoever else holds the link; it attaches nothing ever after."""
    _bpf(_LINK_DETACH, _LinkDetach(link))


def link_id(link: int) -> int:
    """The kernel-wide id of a link."""
    return int(_info(link)[1])  # struct bpf_link_info: type, id, prog_id ...


def prog_id(fd: int) -> int:
    """The kernel-wide id of a program."""
    return int(_info(fd)[1])  # struct bpf_prog_info: type, id, tag ...


def prog_verified(fd: int) -> int:
    """How many instructions the verifier walked to accept a program; 0 before Linux 5.16, which does not tell."""
    return int(_info(fd)[54])


def run_time(fd: int) -> tuple[int, int]:
    """Nanoseconds a program has run and how often, while `enable_run_time_stats` was in force."""
    nanoseconds, runs = _info(fd)[48:52].view(np.uint64)
    return int(nanoseconds), int(runs)


def enable_run_time_stats() -> int:
    """Let the kernel measure all programs until the descriptor returned is closed; each run then costs more."""
    return _bpf(_ENABLE_STATS, _EnableStats(0))


def map_sizes(fd: int) -> tuple[int, int, int]:
    """Key size, value size and max_entries of a map."""
    words = _info(fd)  # struct bpf_map_info: type, id, key_size, value_size, max_entries ...
    return int(words[2]), int(words[3]), int(words[4])


def map_shape(fd: int) -> tuple[int, ...]:
    """Type, key size, value size, max_entries and flags of a map: what user space gave when it was made."""
    words = _info(fd)
    return int(words[0]), *(int(word) for word in words[2:6])


def tcx_egress(ifindex: int) -> list[tuple[int, int]] | None:
    """Program and link (0: without one) ids at an interface's tcx egress, in the order they run; None: no tcx here."""
    programs, links = np.zeros((2, _TCX_PROGRAMS), np.uint32)
    query = _ProgQuery(
        target_ifindex=ifindex,
        attach_type=TCX_EGRESS,
        prog_ids=_address(programs),
        link_ids=_address(links),
        count=_TCX_PROGRAMS,
    )
    try:
        _bpf(_PROG_QUERY, query)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        if error.errno in (errno.ENOENT, errno.ENODEV):  # nothing there, on the first kernels with tcx; no interface
            return []
        raise
    return list(zip(programs[: query.count].tolist(), links[: query.count].tolist(), strict=True))


def _info(fd: int) -> npt.NDArray[np.uint32]:
    words = np.zeros(56, np.uint32)  # what is behind the kernel's own struct stays 0
    _bpf(_OBJ_GET_INFO_BY_FD, _Info(fd, words.nbytes, _address(words)))
    return words


def map_create(kind: int, key_size: int, value_size: int, max_entries: int, name: str) -> int:
    """A new map's file descriptor. `name` has at most 15 characters."""
    return _bpf(_MAP_CREATE, _MapCreate(kind, key_size, value_size, max_entries, 0, 0, 0, name.encode()))


def prog_load(kind: int, instructions: bytes, license_name: str = "GPL") -> int:
    """Load a program given as raw instructions (8 bytes each); returns its file descriptor."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    terms = ctypes.create_string_buffer(license_name.encode())
    return _bpf(
        _PROG_LOAD, _ProgLoad(kind, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(terms), 0, 0, 0)
    )


def prog_test_run(
    fd: int, frame: bytes, context: npt.NDArray[np.uint8] | None = None, repeat: int = 1
) -> tuple[int, bytes, npt.NDArray[np.uint8], int]:
    """Run a program on one Ethernet frame.

    Args:
        fd: the program.
        frame: at least 14 bytes.
        context: `struct __sk_buff` as bytes, shape (n,), or None for an empty one.
        repeat: how many times; each run gets the packet as the run before left it.

    Returns:
        Return code, frame after the last run, context after it, mean nanoseconds per run.
    """
    given = np.frombuffer(frame, np.uint8)
    result = np.zeros(len(frame) + 256, np.uint8)
    context = np.zeros(192, np.uint8) if context is None else context
    context_after = np.zeros_like(context)
    run = _TestRun(
        prog_fd=fd,
        data_size_in=len(given),
        data_size_out=len(result),
        data_in=_address(given),
        data_out=_address(result),
        repeat=repeat,
        ctx_size_in=context.nbytes,
        ctx_size_out=context.nbytes,
        ctx_in=_address(context),
        ctx_out=_address(context_after),
    )
    _bpf(_PROG_TEST_RUN, run)
    return int(run.retval), result[: run.data_size_out].tobytes(), context_after, int(run.duration)


# --- single elements -------------------------------------------------------------------------------------------------


def lookup(fd: int, key: npt.NDArray[np.generic], value: npt.NDArray[np.generic]) -> bool:
    """Read the value of `key` into `value`; False if there is none.

    A per-CPU map needs room for every possible CPU (`possible_cpus`), each value rounded up to 8 bytes.
    """
    try:
        _bpf(_MAP_LOOKUP_ELEM, _Element(fd, _address(key), _address(value), 0))
    except FileNotFoundError:
        return False
    return True


def update(fd: int, key: npt.NDArray[np.generic], value: npt.NDArray[np.generic]) -> None:
    """Insert or replace the value of `key`."""
    _bpf(_MAP_UPDATE_ELEM, _Element(fd, _address(key), _address(value), 0))


def delete(fd: int, key: npt.NDArray[np.generic]) -> bool:
    """Delete `key`; False if it was not there."""
    try:
        _bpf(_MAP_DELETE_ELEM, _Element(fd, _address(key), 0, 0))
    except FileNotFoundError:
        return False
    return True


def keys(fd: int, dtype: np.dtype[np.void]) -> Iterator[Array]:
    """Each key of a map that knows no batches (a trie), shape (1,). Do not change the map meanwhile."""
    key: Array | None = None
    while True:
        following = np.zeros(1, dtype)
        try:
            _bpf(_MAP_GET_NEXT_KEY, _Element(fd, 0 if key is None else _address(key), _address(following), 0))
        except FileNotFoundError:
            return
        key = following
        yield following


# --- batches ---------------------------------------------------------------------------------------------------------

# Elements per system call. The kernel copies bucket by bucket and holds no lock across buckets; larger calls bring
# nothing measurable, smaller ones let a pending signal in.
_MAX_BATCH: Final = 16_384


def lookup_all(
    fd: int, key_dtype: np.dtype[np.void], value_dtype: np.dtype[np.void], expected: int
) -> tuple[Array, Array]:
    """Every element of a hash map, keys and values in arrays of shape (n,) that the caller owns.

    The kernel writes straight into them; they grow when there are more than `expected` elements. Elements inserted or
    deleted meanwhile may be missed; none is torn (the kernel copies a bucket under its lock), none is doubled.
    """
    capacity = max(1024, expected)
    keys, values = np.empty(capacity, key_dtype), np.empty(capacity, value_dtype)
    cursor = np.zeros(2, np.uint64)  # the kernel's bucket number; in and out
    found, started, at_least = 0, False, 1
    while True:
        if capacity - found < at_least:
            capacity = max(2 * capacity, found + at_least)
            keys, values = _grown(keys, found, capacity), _grown(values, found, capacity)
        room = min(capacity - found, max(_MAX_BATCH, at_least))
        batch = _Batch(
            in_batch=cursor[:1].ctypes.data if started else 0,
            out_batch=cursor[1:].ctypes.data,
            keys=keys[found:].ctypes.data,
            values=values[found:].ctypes.data,
            count=room,
            map_fd=fd,
        )
        try:
            _bpf(_MAP_LOOKUP_BATCH, batch)
        except FileNotFoundError:  # the last bucket was reached; what it held has been copied
            found += batch.count
            return keys[:found], values[:found]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            at_least = 2 * room  # one bucket holds more than there was room for: same place again, with more
            continue
        found += batch.count
        cursor[0] = cursor[1]
        started, at_least = True, 1


def _grown(array: Array, used: int, capacity: int) -> Array:
    larger = np.empty(capacity, array.dtype)
    larger[:used] = array[:used]
    return larger


def update_all(fd: int, keys: Array, values: Array) -> int:
    """Set `values` for `keys`, shape (n,) each; returns for how many of them the map had no room."""
    keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
    done = refused = 0
    while done < len(keys):
        count = min(_MAX_BATCH, len(keys) - done)
        batch = _Batch(keys=keys[done:].ctypes.data, values=values[done:].ctypes.data, count=count, map_fd=fd)
        try:
            _bpf(_MAP_UPDATE_BATCH, batch)
        except OSError as error:
            if error.errno not in (errno.E2BIG, errno.ENOMEM):
                raise
            refused += 1
            done += 1  # the kernel stopped there: go on behind it
        done += batch.count
    return refused


def delete_all(fd: int, keys: Array) -> int:
    """Delete `keys`, shape (n,); returns how many were there. One system call per run of present keys."""
    keys = np.ascontiguousarray(keys)
    done = deleted = 0
    while done < len(keys):
        batch = _Batch(keys=keys[done:].ctypes.data, count=min(_MAX_BATCH, len(keys) - done), map_fd=fd)
        try:
            _bpf(_MAP_DELETE_BATCH, batch)
        except FileNotFoundError:
            done += 1  # the kernel stopped at a key that is not there: go on behind it
        done += batch.count
        deleted += batch.count
    return deleted


def possible_cpus() -> int:
    """How many values a per-CPU map has per key."""
    return sum(1 for _ in _cpu_numbers(Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")))


def _cpu_numbers(ranges: str) -> Iterator[int]:
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def lookup_percpu(fd: int, dtype: np.dtype[np.void]) -> Array:
    """Element 0 of a per-CPU array, one value per possible CPU, shape (cpus,); `dtype`'s size is a multiple of 8."""
    values = np.zeros(possible_cpus(), dtype)
    lookup(fd, np.zeros(1, np.uint32), values)
    return values


def wait_for_running_programs() -> None:
    """Return when every BPF program that ran when this was called has finished (an RCU grace period).

    membarrier(MEMBARRIER_CMD_GLOBAL) is one. A kernel with nohz_full CPUs refuses it; replacing the inner map of a
    map of maps waits for the same.
    """
    number = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}.get(platform.machine())
    if number is not None and _libc.syscall(number, 1, 0, 0) == 0:
        return
    inner = map_create(MAP_TYPE_ARRAY, 4, 4, 1, "fp_inner")
    try:
        attributes = _MapCreate(_MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 1, 0, inner, 0, b"fp_grace")
        outer = _bpf(_MAP_CREATE, attributes)
        try:
            update(outer, np.zeros(1, np.uint32), np.array([inner], np.uint32))
        finally:
            os.close(outer)
    finally:
        os.close(inner)
