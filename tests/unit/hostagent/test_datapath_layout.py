"""Settings to bytes and back, the source as one text, the fingerprint: what needs no kernel."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabricpilot.config import DatapathSection
from fabricpilot.levels import Thresholds, default_dscp, default_thresholds
from hostagent.datapath import bpf_syscall, open_datapath, source
from hostagent.datapath.base import Settings
from hostagent.datapath.layout import COUNTERS_DTYPE, SETTINGS_DTYPE, counter_names, pack_settings, unpack_settings


@given(
    st.integers(2, 8).flatmap(
        lambda levels: st.tuples(
            st.sets(st.integers(1, 2**62), min_size=levels - 1, max_size=levels - 1),
            st.lists(st.integers(0, 63), min_size=levels, max_size=levels, unique=True),
            st.lists(st.integers(0, 2**32 - 1), min_size=levels, max_size=levels),
            st.booleans(),
        )
    )
)
def test_settings_survive_packing(drawn):
    thresholds, dscp, priority, respect = drawn
    settings = Settings(Thresholds.of(sorted(thresholds)), tuple(dscp), tuple(priority), respect)
    assert unpack_settings(pack_settings(settings)) == settings


def test_a_slot_never_filled_is_no_settings():
    assert unpack_settings(np.zeros((), SETTINGS_DTYPE)) is None


def test_unmarked_and_own_marks_may_be_overwritten_and_no_others():
    bits = int(pack_settings(Settings(default_thresholds(4), default_dscp(4), (1, 2, 3, 4)))["writable_dscp"])
    assert [dscp for dscp in range(64) if bits >> dscp & 1] == [0, 8, 16, 24, 32]


@pytest.mark.parametrize("priority", [(-1, 0), (2**32, 0)])
def test_priority_must_fit_the_kernels_field(priority):
    with pytest.raises(ValueError, match="32-bit"):
        Settings(Thresholds((1,)), (8, 16), priority)


def test_per_cpu_values_need_no_rounding():
    assert COUNTERS_DTYPE.itemsize % 8 == 0


def test_counters_fit_a_report():
    assert len(counter_names(8)) <= 64  # fabricpilot.wire.Report.counters


def test_the_source_is_whole_and_each_header_is_in_it_once():
    text = source.program_source(4096)
    assert text.startswith("#define FLOW_BUCKETS 512\n")
    assert '#include "' not in text
    for name in ("egress.c", "parse.h", "level.h", "flow.h", "mark.h", "counters.h"):
        assert text.count(f'#line 1 "{name}"') == 1


def test_line_marks_point_at_the_real_lines():
    lines = source.program_source(4096).splitlines()
    name, number, checked = "", 0, 0
    for line in lines[1:]:
        if line.startswith("#line "):
            _, shown, quoted = line.split()
            name, number = quoted.strip('"'), int(shown)
            continue
        if line:
            assert (source.EBPF_DIR / name).read_text().splitlines()[number - 1] == line
            checked += 1
        number += 1
    assert checked > 300


def test_fingerprint_follows_size_and_sources(tmp_path, monkeypatch):
    same = source.fingerprint(4096)
    assert source.fingerprint(4096) == same != source.fingerprint(8192)
    changed = tmp_path / "ebpf"
    shutil.copytree(source.EBPF_DIR, changed)
    with (changed / "mark.h").open("a") as file:
        file.write("\n/* another version */\n")
    monkeypatch.setattr(source.program_source, "__defaults__", (changed, {}))
    assert source.fingerprint(4096) != same


@pytest.mark.parametrize(("text", "cpus"), [("0", 1), ("0-1", 2), ("0-3,8-11", 8), ("0,2,4-5\n", 4)])
def test_possible_cpus(text, cpus):
    assert len(list(bpf_syscall._cpu_numbers(text))) == cpus


def test_the_configured_backend_is_opened():
    assert open_datapath(DatapathSection(backend="fake")).name == "fake"
