"""What the programs ask of a kernel, held against the Linux version that brought it: nothing may be newer than 5.15.

The bytecode is looked at as the compiler made it, with BTF and without: the helpers it calls and its instructions; and
the kinds of the maps. Versions are of the kernel's history, where a helper became open to the type of program that
calls it. Whoever uses something new finds out since when it is there, and adds it here.
"""

import json

import pytest
from datapath_kit import run, start_agent

from hostagent.datapath.pinned_names import CGROUP_PROGRAMS, PROGRAM_PIN, RUN_BY_US

OLDEST = (5, 15)

HELPERS = {  # by number, which is ABI
    1: ("map_lookup_elem", (3, 19)),
    2: ("map_update_elem", (3, 19)),
    5: ("ktime_get_ns", (4, 1)),
    7: ("get_prandom_u32", (4, 1)),
    9: ("skb_store_bytes", (4, 1)),
    26: ("skb_load_bytes", (4, 5)),
    39: ("skb_pull_data", (4, 9)),
    48: ("set_hash", (4, 13)),
    49: ("setsockopt", (4, 13)),
    79: ("skb_cgroup_id", (4, 18)),
    83: ("skb_ancestor_cgroup_id", (4, 19)),
    93: ("spin_lock", (5, 1)),
    94: ("spin_unlock", (5, 1)),
    95: ("sk_fullsock", (5, 1)),
    96: ("tcp_sock", (5, 1)),
    107: ("sk_storage_get", (5, 3)),  # 5.2; programs on setsockopt came with 5.3
    113: ("probe_read_kernel", (5, 10)),  # 5.5; in programs on setsockopt 5.10 has it
    118: ("jiffies64", (5, 6)),
    131: ("ringbuf_reserve", (5, 8)),
    132: ("ringbuf_submit", (5, 8)),
    137: ("skc_to_tcp_sock", (5, 9)),
    152: ("redirect_neigh", (5, 10)),
    160: ("ktime_get_coarse_ns", (5, 11)),
}
MAPS = {
    "hash": (3, 19),
    "array": (3, 19),
    "percpu_array": (4, 6),
    "lru_hash": (4, 10),
    "lpm_trie": (4, 11),
    "sk_storage": (5, 2),
    "ringbuf": (5, 8),
}

CALL = 0x85
JUMPS_BY_32_BITS = 6  # class of Linux 5.1, which clang leaves alone unless told
ATOMICS, PLAIN_ADDITION = (0xC3, 0xDB), 0  # those that return what was there are of 5.12
ARITHMETIC, LOAD = (4, 7), 1
FROM_MEMORY = 0x60  # mode of a load without sign extension; with one, and signed division, are of 6.6

COMPILE = """
import json
from hostagent.datapath import ebpf_loader as loader
functions = [loader.PROGRAM, *loader.RUN_BY_US.values(), *(made[0] for made in loader.CGROUP_PROGRAMS.values())]
for macros in (loader.backlog_macros()[0], {}):
    _, module = loader.compiled(1024, macros)
    print(json.dumps({name: module.dump_func(name.encode()).hex() for name in functions}), flush=True)
"""


@pytest.fixture(scope="module")
def instructions() -> list[tuple[int, int, int, int]]:
    """Operation, source register, offset and number of each instruction of all programs, with BTF and without."""
    child = start_agent(COMPILE)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    codes = [bytes.fromhex(code) for line in said.splitlines() for code in json.loads(line).values()]
    assert len(codes) == 2 * (3 + len(CGROUP_PROGRAMS))
    return [
        (one[0], one[1] >> 4, int.from_bytes(one[2:4], "little"), int.from_bytes(one[4:], "little", signed=True))
        for code in codes
        for one in (code[at : at + 8] for at in range(0, len(code), 8))
    ]


def test_helpers(instructions):
    called = {(source, number) for operation, source, _, number in instructions if operation == CALL}
    assert {source for source, _ in called} == {0}, "something else than a helper is called"
    assert {number for _, number in called} == set(HELPERS)
    assert [name for name, since in HELPERS.values() if since > OLDEST] == []


def test_instructions(instructions):
    for operation, _, offset, number in instructions:
        kind = operation & 7
        assert kind != JUMPS_BY_32_BITS
        assert operation not in ATOMICS or number == PLAIN_ADDITION
        assert kind not in ARITHMETIC or offset == 0
        assert kind != LOAD or operation & 0xE0 == FROM_MEMORY


def test_kinds_of_maps(kernel_sender):
    ids = set()
    for pin in (PROGRAM_PIN, *RUN_BY_US, *CGROUP_PROGRAMS):
        ids |= set(
            json.loads(run("bpftool", "-j", "prog", "show", "pinned", str(kernel_sender.pin_dir / pin)))["map_ids"]
        )
    kinds = {json.loads(run("bpftool", "-j", "map", "show", "id", str(number)))["type"] for number in ids}
    assert kinds == set(MAPS)
    assert max(MAPS.values()) <= OLDEST
