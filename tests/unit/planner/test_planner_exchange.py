"""Tables and virsh output in, scripts and neutral JSON out; plans as flows; requests over the link."""

import json
import subprocess

import pytest

from central.planner.formats import export, libvirt, table
from central.planner.generator import SHAPES, generate
from central.planner.planning import make_plan
from fabricpilot.errors import UsageError

CSV = """kind,name,pm,node,cores,mem_mb,status,rack,tenant,movable,host_set,rack_set
pm,p1,,0,20,65536,ACTIVE,r1,,,,
pm,p1,,1,16,65536,,,,,,
pm,p2,,0,16,65536,OUTAGE,r2,,,,
vm,a,p1,0,4,8192,,,shop,yes,web,
vm,b,p1,0,2,4096,,,shop,no,web,db
vm,c,p1,0,2,1024,,,,,,db
vm,c,p1,1,2,1024,,,,,,
"""
CAPABILITIES = """<capabilities><host><topology><cells num='2'>
<cell id='0'><memory unit='KiB'>67108864</memory><cpus num='16'/></cell>
<cell id='1'><memory unit='KiB'>67108864</memory><cpus num='16'/></cell>
</cells></topology></host></capabilities>"""
DOMAIN = "<domain type='kvm'><name>{name}</name><memory unit='GiB'>{gib}</memory><vcpu>{cpus}</vcpu>{tune}</domain>"


def test_table():
    mapping = table.parse(CSV)
    assert [pm.active for pm in mapping.pms] == [True, False]
    assert [len(vm.shares) for vm in mapping.vms] == [1, 1, 2]
    assert [vm.movable for vm in mapping.vms] == [True, False, True]
    assert [(group.granularity, group.members) for group in mapping.anti_affinity] == [
        ("host", (0, 1)),
        ("rack", (1, 2)),
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("vm,a,p1,0,4", "vm,a,p1,0,x", "line 5"),
        ("vm,a,p1", "vm,a,p9", "VM a is on PM 'p9'"),
        ("vm,a,", "cat,a,", "'cat'"),
        ("kind,name,pm,node", "kind,name,pm,nod", "lacks node"),
        ("vm,a,p1,0,4", "vm,a,p1,0,19", "over-committed"),
    ],
)
def test_bad_tables(old, new, words):
    with pytest.raises(UsageError, match=words):
        table.parse(CSV.replace(old, new, 1))


@pytest.fixture
def virsh(tmp_path):
    for host in ("h1", "h2"):
        (tmp_path / host).mkdir()
        (tmp_path / host / "capabilities.xml").write_text(CAPABILITIES)
    (tmp_path / "h1" / "rack").write_text("r7\n")
    pinned = "<numatune><memory mode='strict' nodeset='0-1'/></numatune>"
    (tmp_path / "h1" / "big.xml").write_text(DOMAIN.format(name="big", gib=8, cpus=8, tune=pinned))
    (tmp_path / "h1" / "small.xml").write_text(DOMAIN.format(name="small", gib=2, cpus=2, tune=""))
    return tmp_path


def test_libvirt(virsh):
    mapping = libvirt.read_folder(virsh)
    assert [str(pm.name) for pm in mapping.pms] == ["h1", "h2"]
    assert mapping.pms[0].rack == "r7"
    big = mapping.vms[mapping.vm_by_name["big"]]
    assert [(share.node, share.cores, share.mem_mb) for share in big.shares] == [(0, 4, 4096), (1, 4, 4096)]
    assert len(mapping.vms[mapping.vm_by_name["small"]].shares) == 1


def test_bad_libvirt(virsh):
    with pytest.raises(UsageError, match="found none"):
        libvirt.read_folder(virsh / "h1")
    (virsh / "h1" / "small.xml").write_text("<domain><name>x</name>")
    with pytest.raises(UsageError, match=r"small\.xml"):
        libvirt.read_folder(virsh)


@pytest.fixture
def made(pose):
    mapping = generate(SHAPES["small"], 1)
    return mapping, make_plan(pose(mapping, 8), "swap", 5.0)


def test_script_runs_dry(made, tmp_path):
    mapping, plan = made
    path = tmp_path / "plan.sh"
    path.write_text(export.shell_script(mapping, plan))
    done = subprocess.run(["sh", str(path)], env={"DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("virsh")]
    assert len(lines) == len(plan.moves)
    first = plan.moves[0]
    wanted = f"qemu+ssh://{mapping.pms[first.target.pm].name}/system"
    assert any(str(mapping.vms[first.vm].name) in line and wanted in line for line in lines)


def test_neutral_form(made):
    mapping, plan = made
    document = json.loads(json.dumps(export.neutral(mapping, plan)))
    assert sum(len(batch["parallel"]) for batch in document["batches"]) == document["migrations"] == len(plan.moves)
