"""Mark CE on one switch port: attach `ecn_marker` to its egress, read what it saw, always detach.

Two ways to know the queue:
- `real`: the backlog of the port's qdisc, or with `class_by_dscp` of the child qdisc of the packet's class (one
  threshold per level). Exact; needs Linux 6.2 and a root qdisc that counts its own backlog (htb, tbf, bfifo, pfifo).
- `virtual`: a leaky bucket that drains at gamma * rate. Works on any port.
Only descriptors and the port's filter hold the program: when the process is killed, the filter stays until the
namespace goes or `detach_marker` is called.
"""

import ctypes
import mmap
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import MAX_DSCP
from testbed.transport.bpftool import LoadedProgram, load_program
from testbed.transport.build import compile_program
from testbed.transport.counters import Config, Counters, MarkerStats, read_stats
from testbed.transport.port import Port, open_port

Mode = Literal["auto", "real", "virtual"]

DEFAULT_GAMMA = 0.95  # HULL (NSDI 2012): 5 % of the link buys a real queue near zero
SWITCH_MAJOR = 0xFAB  # of the root qdisc that tc_scripts/switch makes
_CONTROL_DSCPS = (48, 56)  # CS6 and CS7 go first there
_CAP_FACTOR = 8  # the virtual queue forgets what exceeds this many K
_BINS_PER_K = 16
_MAX_U32 = 2**32 - 1


@dataclass(frozen=True)
class EcnMarker:
    """An attached marker; `mode` is how it knows the queue."""

    mode: Literal["real", "virtual"]
    _config: mmap.mmap
    _counters: mmap.mmap

    @property
    def k_bytes(self) -> int:
        """The marking threshold."""
        return int(Config.from_buffer_copy(self._config).k_bytes)

    def set_k_bytes(self, k_bytes: int) -> None:
        """Change the threshold from the next packet on. The bins of the histogram stay as they are."""
        _check_k(k_bytes)
        offset = Config.k_bytes.offset
        self._config[offset : offset + 4] = bytes(ctypes.c_uint32(k_bytes))

    def stats(self) -> MarkerStats:
        """What it saw so far. Costs no system call."""
        counters = Counters.from_buffer_copy(self._counters)
        return read_stats(counters, int(Config.from_buffer_copy(self._config).bin_bytes))


@contextmanager
def attach_marker(
    netns: str | None,
    interface: str,
    k_bytes: int,
    rate_bps: float = 0.0,
    mode: Mode = "auto",
    *,
    gamma: float = DEFAULT_GAMMA,
    class_by_dscp: Mapping[int, int] | None = None,
) -> Iterator[EcnMarker]:
    """Mark packets that leave `interface` and find more than `k_bytes` queued, inside the block.

    Args:
        netns: name of the network namespace (/run/netns), or None for the one we are in.
        interface: the port.
        k_bytes: threshold; DCTCP wants more than rate * RTT / 7.
        rate_bps: rate of the port in bits per second; what a virtual queue drains by.
        mode: `real`, `virtual`, or `auto`: real where it can be, otherwise virtual.
        gamma: share of the rate at which a virtual queue drains.
        class_by_dscp: real queue only: traffic class (major << 16 | minor) by DSCP; its child qdisc's backlog
            counts instead of the port's.

    Raises:
        UsageError: arguments out of bounds, no such interface, or it has a marker already.
        KernelError: the kernel lacks what the mode needs.
    """
    _check_k(k_bytes)
    with open_port(netns, interface) as port:
        real, program = _load(mode, port, class_by_dscp)
        try:
            config = Config(k_bytes=k_bytes, bin_bytes=max(1, k_bytes // _BINS_PER_K))
            if real:
                _set_classes(config, class_by_dscp or {})
            else:
                _set_drain(config, rate_bps, gamma, k_bytes)
            with (
                mmap.mmap(program.map_fds["marker_config"], ctypes.sizeof(Config)) as settings,
                mmap.mmap(program.map_fds["marker_stats"], ctypes.sizeof(Counters), prot=mmap.PROT_READ) as counters,
            ):
                settings[: ctypes.sizeof(Config)] = bytes(config)
                with port.filtered_by(program.program_fd):
                    yield EcnMarker("real" if real else "virtual", settings, counters)
        finally:
            program.close()


def detach_marker(netns: str | None, interface: str) -> bool:
    """Remove a marker that a killed process left on a port; returns whether there was one."""
    with open_port(netns, interface) as port:
        return port.remove_filter()


def classes_of_bands(dscp: Sequence[int], major: int = SWITCH_MAJOR) -> dict[int, int]:
    """`class_by_dscp` for a port that `tc_scripts/switch --levels K` made: one threshold per band.

    Args:
        dscp: code point of each level, first level first.
        major: major number of the port's root qdisc.
    """
    bands = [major << 16 | band for band in range(1, len(dscp) + 1)]
    by_dscp = dict.fromkeys(range(MAX_DSCP + 1), bands[-1]) | dict.fromkeys(_CONTROL_DSCPS, bands[0])
    return by_dscp | dict(zip(dscp, bands, strict=True))


def recommended_k_bytes(rate_bps: float, rtt_s: float, packet_bytes: int = 1514) -> int:
    """A threshold for a port: C * RTT / 7 (Alizadeh et al., SIGCOMM 2010, equation 13), and at least 5 packets.

    The bound is for smooth arrivals; hosts send bursts, which is why the paper itself used 20 packets at 1 Gbit/s.
    """
    return max(5 * packet_bytes, round(rate_bps / 8 * rtt_s / 7))


def _check_k(k_bytes: int) -> None:
    if not 1 <= k_bytes <= _MAX_U32 // _CAP_FACTOR:
        raise UsageError(f"k_bytes = {k_bytes}; the marking threshold is 1 to {_MAX_U32 // _CAP_FACTOR} bytes")


def _set_drain(config: Config, rate_bps: float, gamma: float, k_bytes: int) -> None:
    if not 8e3 <= rate_bps <= 1e11:
        raise UsageError(f"rate_bps = {rate_bps:g}; a virtual queue needs the port's rate, 8e3 to 1e11 bits per second")
    if not 0.1 <= gamma <= 1.0:
        raise UsageError(f"gamma = {gamma:g}; a virtual queue drains at 0.1 to 1 of the rate")
    config.drain_bytes_per_s = round(gamma * rate_bps / 8)
    config.cap_bytes = _CAP_FACTOR * k_bytes


def _set_classes(config: Config, class_by_dscp: Mapping[int, int]) -> None:
    for dscp, handle in class_by_dscp.items():
        if not 0 <= dscp <= MAX_DSCP or not 0 < handle <= _MAX_U32:
            raise UsageError(f"class_by_dscp[{dscp}] = {handle}; give DSCP 0 to {MAX_DSCP} and a class like 0x10001")
        config.class_of_dscp[dscp] = handle


def _load(mode: Mode, port: Port, class_by_dscp: Mapping[int, int] | None) -> tuple[bool, LoadedProgram]:
    """The program for the mode, and whether it reads the real queue."""
    if mode not in ("auto", "real", "virtual"):
        raise UsageError(f"mode = '{mode}'; give auto, real or virtual")
    if mode == "virtual" and class_by_dscp:
        raise UsageError("class_by_dscp needs mode 'real': a virtual queue is one per port")
    if mode != "virtual":
        try:
            port.check_backlog()
            return True, _compiled("MARKER_REAL_QUEUE")
        except KernelError as error:
            if mode == "real" or class_by_dscp:
                hint = "; use mode 'virtual'" if not class_by_dscp else ""
                raise KernelError(f"cannot read the queue of {port.name}: {error}{hint}") from error
    return False, _compiled()


def _compiled(*defines: str) -> LoadedProgram:
    with tempfile.TemporaryDirectory(prefix="fabricpilot-") as directory:
        return load_program(compile_program("ecn_marker.bpf.c", Path(directory), defines))
