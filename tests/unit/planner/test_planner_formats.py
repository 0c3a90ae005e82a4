"""Mappings are read as published, written again alike, and refused by name when they contradict themselves."""

import json
import re

import pytest

from central.planner.formats import vmr2l
from central.planner.generator import SHAPES, Shape, generate
from fabricpilot.errors import UsageError

PUBLISHED = {
    "cluster_list": [
        {
            "cluster_name": "c1",
            "host_info": [
                {
                    "node_id": 7,
                    "status": "ACTIVE",
                    "node_cpu": 88,
                    "node_mem_mb": 368776,
                    "numa": [
                        {
                            "node": number,
                            "total_cpu": 44,
                            "free_cpu": 1,
                            "memory_huge_total_mb": 184388,
                            "memory_huge_free_mb": 5,
                        }
                        for number in (0, 1)
                    ],
                    "rack_id": "r1",
                }
            ],
            "vm_type_info": [{"vm_type": "x", "flavor_limit": 3}],
            "vm_instance": [
                {
                    "instance_id": "a",
                    "instance_type": "x",
                    "host_id": 7,
                    "numa": [{"node": 0, "cpu": 4, "mem_mb": 8192}, {"node": 1, "cpu": 0, "mem_mb": 0}],
                    "allow_migration": True,
                },
                {
                    "instance_id": "b",
                    "instance_type": "y",
                    "host_id": 7,
                    "numa": [{"node": 0, "cpu": 8, "mem_mb": 1}, {"node": 1, "cpu": 8, "mem_mb": 1}],
                    "allow_migration": False,
                },
            ],
            "other_requirement": {"deployment_set": [{"granularity": "rack", "data": ["a", "b"]}]},
        }
    ],
    "vm_type_list": ["x", "y"],
    "general_requirement": {"maximum_migration": 12, "something_else": 1},
}


def parse(change=None):
    document = json.loads(json.dumps(PUBLISHED))
    if change:
        change(document["cluster_list"][0])
    return vmr2l.parse(json.dumps(document).encode())


def test_published_form():
    mapping = parse()
    assert mapping.maximum_migration == 12
    assert [len(vm.shares) for vm in mapping.vms] == [1, 2]
    assert not mapping.vms[1].movable
    assert mapping.anti_affinity[0].granularity == "rack"
    free = vmr2l.document(mapping)["cluster_list"][0]["host_info"][0]["numa"]
    assert [node["free_cpu"] for node in free] == [44 - 12, 44 - 8]  # not the untrue free_cpu of the file


@pytest.mark.parametrize("shape", ["tiny", "affinity", "multi"])
def test_written_and_read_again(tmp_path, shape):
    mapping = generate(SHAPES[shape], 5)
    for name in ("m.json", "m.json.gz"):
        vmr2l.write_file(mapping, tmp_path / name)
        assert vmr2l.read_file(tmp_path / name) == mapping


def test_several_clusters_outages_and_still_vms_survive(tmp_path):
    mapping = generate(Shape(pms=20, vms=120, clusters=3, outage_pms=2, immovable_share=0.2), 1)
    vmr2l.write_file(mapping, tmp_path / "m.json")
    again = vmr2l.read_file(tmp_path / "m.json")
    assert {pm.cluster for pm in again.pms} == {"cluster-0", "cluster-1", "cluster-2"}
    assert sum(not pm.active for pm in again.pms) == 2
    assert sorted(vm.name for vm in again.vms if not vm.movable) == sorted(
        vm.name for vm in mapping.vms if not vm.movable
    )


def vm(cluster, key, value):
    cluster["vm_instance"][0][key] = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: vm(c, "host_id", 9), "VM a is on host 9"),
        (lambda c: c["vm_instance"].append(c["vm_instance"][1]), "VM b appears twice"),
        (lambda c: vm(c, "numa", [{"node": 0, "cpu": 99, "mem_mb": 0}]), "PM 7 node 0 is over-committed"),
        (lambda c: vm(c, "numa", [{"node": 0, "cpu": 1, "mem_mb": 10**6}]), "mem_mb of 184388"),
        (lambda c: vm(c, "numa", [{"node": 4, "cpu": 1, "mem_mb": 0}]), "NUMA node 4"),
        (lambda c: vm(c, "numa", []), "VM a takes nothing"),
        (lambda c: vm(c, "numa", [{"node": 0, "cpu": -1, "mem_mb": 0}]), "negative"),
        (
            lambda c: vm(c, "numa", [{"node": 0, "cpu": "four", "mem_mb": 0}]),
            "$.cluster_list[0].vm_instance[0].numa[0].cpu",
        ),
        (lambda c: c["host_info"].append(c["host_info"][0]), "PM 7 appears twice"),
        (lambda c: c["other_requirement"]["deployment_set"][0]["data"].append("z"), "names VM z"),
        (lambda c: c["other_requirement"]["deployment_set"][0]["data"].append("a"), "names a VM twice"),
        (lambda c: c.pop("host_info"), "host_info"),
    ],
)
def test_contradictions_are_named(change, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse(change)


def test_truncated(tmp_path):
    raw = json.dumps(PUBLISHED).encode()
    with pytest.raises(UsageError, match="truncated"):
        vmr2l.parse(raw[: len(raw) // 2], "half.json")
    (tmp_path / "half.json.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(UsageError, match="half"):
        vmr2l.read_file(tmp_path / "half.json.gz")
    with pytest.raises(UsageError, match="absent"):
        vmr2l.read_file(tmp_path / "absent.json")
