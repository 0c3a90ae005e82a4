"""The host's ways into the fabric.

Which there are (paths.py), where policy routing sends a flow (marks.py), and which lead somewhere now (watch.py).
ebpf/route.h takes packets there.
"""

from hostagent.routes.paths import Path, parse_paths
from hostagent.routes.watch import RouteWatch

__all__ = ["Path", "RouteWatch", "parse_paths"]
