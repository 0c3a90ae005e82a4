"""What is pinned in the bpffs and under which names: programs, maps and the ring, as ebpf/egress.c calls them."""

from typing import Final

PROGRAM_PIN: Final = "egress"
# Programs that user space runs itself, by pin: function.
READ_PIN: Final = "read"
FORGET_PIN: Final = "forget"
RUN_BY_US: Final = {READ_PIN: "fabricpilot_read", FORGET_PIN: "fabricpilot_forget"}
MAPS: Final = (
    "flows",
    "flow_tags",
    "flow_hash",
    "flow_copies",
    "slots",
    "active",
    "counters",
    "steering",
    "prefixes",
    "rule_sets",
    "verdicts",
    "routes",
    "finished",
    "sources",
    "source_seed",
    "hints",
    "send_buffers",
)
# The ring of flows that became long: pinned like the maps, but never taken over from another version, as whatever is
# in it is read within a moment.
LONG_FLOW_RING: Final = "became_long"
# Programs on cgroups, by pin: function, the number of the program's type and that of where it is attached.
CGROUP_PROGRAMS: Final = {"hint": ("fabricpilot_hint", 25, 22), "send_buffer": ("fabricpilot_send_buffer", 13, 3)}
