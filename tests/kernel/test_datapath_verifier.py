"""What the egress program costs the verifier: it gives up at a million instructions walked, on every kernel since 5.2.

Older kernels recognise fewer states as alike and walk more for the same program, so ours stays far below.
"""

import os

import pytest

from hostagent.datapath import bpf_syscall as bpf

BOUND = 150_000


def test_verifier_walks_a_fraction_of_its_limit(kernel_sender):
    program = bpf.obj_get(kernel_sender.pin_dir / "egress")
    walked = bpf.prog_verified(program)
    os.close(program)
    if walked == 0:
        pytest.skip("the kernel does not say how much it verified (struct bpf_prog_info.verified_insns, Linux 5.16)")
    assert walked < BOUND


def test_smallest_program_costs_its_own_length():
    program = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC)
    walked = bpf.prog_verified(program)
    os.close(program)
    assert walked in (0, 2)
