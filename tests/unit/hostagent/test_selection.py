"""Which interfaces the configuration wants, and which of them get queues."""

import pytest

from fabricpilot.config import AgentConfig, load
from fabricpilot.errors import UsageError
from hostagent.nics import Nic
from hostagent.selection import Selection, is_pattern


def selection(*interfaces: str, **queues: object) -> Selection:
    overrides = {"host.interfaces": list(interfaces), **{f"queues.{name}": value for name, value in queues.items()}}
    return Selection.of(load(AgentConfig, None, overrides, {}))


def nic(name: str, *, ethernet: bool = True) -> Nic:
    return Nic(7, name, ethernet, up=True)


@pytest.mark.parametrize(("entry", "pattern"), [("eth0", False), ("eth*", True), ("eth?", True), ("eth[01]", True)])
def test_what_a_pattern_is(entry, pattern):
    assert is_pattern(entry) == pattern


def test_names_and_patterns():
    wanted = selection("eth0", "cali*")
    assert [name for name in ("eth0", "eth00", "cali1", "xcali", "lo") if wanted.wants(nic(name))] == ["eth0", "cali1"]


def test_a_pattern_never_takes_loopback_temporary_or_other_than_ethernet_interfaces():
    everything = selection("*")
    assert everything.wants(nic("eth0"))
    assert not everything.wants(nic("lo"))
    assert not everything.wants(nic("fptry00000010a"))
    assert not everything.wants(nic("wg0", ethernet=False))
    assert selection("lo", "*").wants(nic("lo"))  # named


def test_upper_and_lower_case_differ():
    assert not selection("ETH*").wants(nic("eth0"))


@pytest.mark.parametrize(
    ("interfaces", "tag_only", "name", "expected"),
    [
        (["eth0", "veth*"], ["veth*"], "veth1", True),
        (["eth0", "veth*"], ["veth*"], "eth0", False),
        (["veth1", "veth*"], ["veth*"], "veth1", False),  # named in full
        (["veth1", "veth*"], ["veth1"], "veth1", True),  # in both: the narrower key
        (["eth*"], [], "eth0", False),
    ],
)
def test_tag_only(interfaces, tag_only, name, expected):
    assert selection(*interfaces, tag_only=tag_only).is_tag_only(name) == expected


def test_containers_are_tag_only_by_default():
    default = selection("*")
    assert all(default.is_tag_only(name) for name in ("veth12ab", "cali0", "tap3", "vnet1", "lxc9"))
    assert not default.is_tag_only("ens3")


@pytest.mark.parametrize(("interfaces", "says"), [([], "no interface"), (["eth0", "eth0"], "twice")])
def test_what_is_refused(interfaces, says):
    with pytest.raises(UsageError, match=says):
        selection(*interfaces)
