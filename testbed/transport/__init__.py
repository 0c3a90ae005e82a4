"""DCTCP and ECN marking for testbeds on kernels that have neither: the BPF programs of `ebpf/transport`, put to use.

    with dctcp_registered() as name, attach_marker("sw", "rx", k_bytes=30_000) as marker:
        ...  # sockets that set TCP_CONGESTION to `name`, on both ends
        print(marker.stats().mean_queue_bytes)

`build` compiles, `bpftool` loads, `dctcp` and `marker` attach and always detach, `rfc8257` is the model the tests hold
the kernel's results against, `compare` measures DCTCP beside cubic. docs/transport.md explains and has figures.
"""

from testbed.transport.counters import MarkerStats
from testbed.transport.dctcp import DCTCP, dctcp_registered
from testbed.transport.marker import EcnMarker, attach_marker

__all__ = ["DCTCP", "EcnMarker", "MarkerStats", "attach_marker", "dctcp_registered"]
