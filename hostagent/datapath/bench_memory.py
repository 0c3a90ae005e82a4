"""One random load from memory of a flow table's size: the least that any table costs a packet of a random flow here.

A program follows a chain through an array of as many elements as the table has places, each of the size of a flow; the
next element is known only when the one before has come, so nothing can be fetched ahead.
"""

import os
from contextlib import ExitStack
from typing import Final

import numpy as np

from hostagent.datapath.flow_table import FLOW_DTYPE

_SOURCE: Final = """
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

struct element {
	__u32 next, pad[ELEMENT_WORDS - 1];
};
BPF_F_TABLE("array", __u32, struct element, chain, ELEMENTS, BPF_F_MMAPABLE);
BPF_ARRAY(place, __u32, 1);

int follow(struct __sk_buff *skb)
{
	__u32 zero = 0, *at = place.lookup(&zero);
	struct element *here = at ? chain.lookup(at) : 0;

	if (here)
		*at = here->next;
	return TC_ACT_UNSPEC;
}
"""
_WORDS: Final = FLOW_DTYPE.itemsize // 4
_KEY_DTYPE: Final = np.dtype([("element", "<u4")])
_ELEMENT_DTYPE: Final = np.dtype([("next", "<u4"), ("pad", "<u4", _WORDS - 1)])
_AT_ONCE: Final = 16_384


def random_load_ns(elements: int, loads: int, rounds: int) -> int:
    """Nanoseconds of one dependent load, net of an empty program.

    Args:
        elements: places of the flow table.
        loads: of each round.
        rounds: the fastest counts.

    Raises:
        KernelError: the program could not be compiled or loaded.
    """
    from hostagent.datapath import bpf_syscall as bpf
    from hostagent.datapath.bench_visit import DATA
    from hostagent.datapath.ebpf_loader import compiled_text

    bcc, module = compiled_text(f"#define ELEMENTS {elements}\n#define ELEMENT_WORDS {_WORDS}\n{_SOURCE}")
    with ExitStack() as undo:
        undo.callback(module.cleanup)
        follow = module.load_func(b"follow", bcc.BPF.SCHED_CLS).fd
        chain = bcc.lib.bpf_table_fd(module.module, b"chain")
        order = np.random.default_rng(1).permutation(elements).astype(np.uint32)
        following = np.empty(elements, np.uint32)
        following[order] = np.roll(order, -1)  # one circle
        keys, values = np.zeros(_AT_ONCE, _KEY_DTYPE), np.zeros(_AT_ONCE, _ELEMENT_DTYPE)
        for first in range(0, elements, _AT_ONCE):
            some = following[first : first + _AT_ONCE]
            keys["element"][: len(some)] = np.arange(first, first + len(some))
            values["next"][: len(some)] = some
            bpf.update_all(chain, keys[: len(some)], values[: len(some)])
        empty = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC)
        undo.callback(os.close, empty)
        both = [[bpf.prog_test_run(fd, DATA, repeat=loads)[3] for fd in (follow, empty)] for _ in range(rounds)]
    return min(taken for taken, _ in both) - min(nothing for _, nothing in both)
