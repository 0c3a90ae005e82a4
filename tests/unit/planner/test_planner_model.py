"""Arrays, incremental state, objectives, and the generator."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.planner import checker
from central.planner.generator import LEVELS, SHAPES, generate, shape
from central.planner.model.cluster import Cluster
from central.planner.model.mapping import check_mapping
from central.planner.model.objective import parse_objective, parse_request
from central.planner.model.problem import Limits
from central.planner.model.state import State, Valuation
from central.planner.solvers.gains import shift_gain
from fabricpilot.errors import UsageError


@pytest.mark.parametrize("objective", ["fr", "mixed", "multi:0.3", "16c*0.7+64c/2numa*0.3", "8c/64G"])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_value_agrees_with_the_checker(objective, name):
    mapping = generate(SHAPES[name], 2)
    goal = parse_objective(objective)
    cluster = Cluster(mapping)
    valuation = Valuation.of(goal, cluster)
    value = valuation.value(cluster, cluster.free_cores, cluster.free_mem_mb)
    expected = checker.check(mapping, [], goal, Limits(0)).worths[0].fragment_rate
    assert valuation.objective(value) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_moves_and_their_undo(seed):
    mapping = generate(SHAPES["tiny"], seed % 7)
    state = State(Cluster(mapping))
    random = np.random.default_rng(seed)
    before = (state.free_cores.copy(), state.free_mem_mb.copy(), state.vm_place.copy())
    done = 0
    for vm in random.permutation(len(mapping.vms)).tolist():
        places = state.cluster.group_places[int(state.cluster.vm_group[vm])]
        place = int(random.integers(places.start, places.stop))
        if place != state.vm_place[vm] and state.fits_vm_at(vm, place):
            state.apply(vm, place)
            done += 1
    assert done > 0
    assert (state.free_cores >= 0).all()
    assert state.free_cores.sum() == before[0].sum()
    for _ in range(done):
        state.undo()
    for now, then in zip((state.free_cores, state.free_mem_mb, state.vm_place), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("objective", ["fr", "mixed", "multi"])
def test_gains_are_what_the_value_changes_by(objective):
    mapping = generate(SHAPES["tiny"], 4)
    cluster = Cluster(mapping)
    state = State(cluster)
    valuation = Valuation.of(parse_objective(objective), cluster)
    base = valuation.value(cluster, state.free_cores, state.free_mem_mb)
    for vm in range(0, len(mapping.vms), 7):
        group, source = int(cluster.vm_group[vm]), int(state.vm_place[vm])
        places = cluster.group_places[group]
        leave = shift_gain(state, valuation, group, 1)[source - places.start]
        arrive = shift_gain(state, valuation, group, -1)
        for place in np.flatnonzero(state.fits(group)) + places.start:
            if cluster.place_pm[place] != cluster.place_pm[source]:
                state.apply(vm, int(place))
                value = valuation.value(cluster, state.free_cores, state.free_mem_mb)
                assert value - base == pytest.approx(leave + arrive[place - places.start])
                state.undo()


def test_places_and_targets_are_inverse():
    mapping = generate(SHAPES["tiny"], 1)
    cluster = Cluster(mapping)
    for vm in range(len(mapping.vms)):
        for place in cluster.group_places[int(cluster.vm_group[vm])]:
            assert cluster.place_index(vm, cluster.target(vm, place)) == place


def test_uneven_shares_keep_their_order(build):
    mapping = build([[16, 16], [16, 16]], [(0, {0: 2, 1: 6})])
    cluster = Cluster(mapping)
    assert len(cluster.group_places[0]) == 4  # both orders on both PMs
    here = cluster.target(0, int(cluster.vm_place[0]))
    assert here.nodes == (0, 1)


def test_generator_is_seeded_and_sound():
    for name in SHAPES:
        kind = SHAPES[name]
        if kind.pms > 60:  # the same kind of mapping, smaller
            kind = replace(kind, pms=kind.pms // 6, vms=kind.vms // 6, affinity_sets=kind.affinity_sets // 6)
        mapping = generate(kind, 3)
        check_mapping(mapping)
        assert mapping == generate(kind, 3)
        assert mapping != generate(kind, 4)
        assert len(mapping.vms) == kind.vms
        for group in mapping.anti_affinity:
            homes = [mapping.vms[vm].pm for vm in group.members]
            racks = [mapping.pms[pm].rack for pm in homes]
            assert len(set(homes if group.granularity == "host" else racks)) == len(group.members)


def test_affinity_shape_has_the_sets_asked_for():
    mapping = generate(SHAPES["affinity"], 1)
    assert len(mapping.anti_affinity) == 300
    assert sum(len(group.members) for group in mapping.anti_affinity) > 0.45 * len(mapping.vms)


def test_levels_fill_the_cluster_as_told():
    used = {}
    for level in LEVELS:
        mapping = generate(shape("medium", level), 0)
        total = sum(node.cores for pm in mapping.pms for node in pm.nodes)
        used[level] = sum(vm.cores for vm in mapping.vms) / total
        assert used[level] == pytest.approx(LEVELS[level], abs=0.06)
    with pytest.raises(UsageError, match="level 'x'"):
        shape("small", "x")


@pytest.mark.parametrize("text", ["", "fr:1", "fr-goal", "fr-goal:2", "mixed:x", "16", "16c*2", "0c", "15c/2numa"])
def test_bad_objectives(text):
    with pytest.raises(UsageError):
        parse_objective(text)


def test_requests():
    term = parse_request("64c/128G/2numa")
    assert (term.cores, term.mem_mb, term.nodes) == (32, 65536, 2)
    assert term.label == "64c/128G/2numa"
    with pytest.raises(UsageError, match="share"):
        parse_request("3c/2numa")
