"""Rules and routes as configured: what is refused, and what they decide in plain reading."""

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fabricpilot.config import AgentConfig, Rule, load
from fabricpilot.errors import UsageError
from hostagent.cli import agent as command
from hostagent.datapath.base import FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, FlowTable
from hostagent.datapath.fake import FakeDatapath
from hostagent.datapath.rules import (
    KEPT_OUTCOME_DTYPE,
    MAX_RULES,
    Cgroup,
    Flow,
    _port_prefixes,
    compile_rules,
    first_match,
    flows_by_rule,
    parse_rules,
)
from hostagent.flow_control import require
from hostagent.observe import observe


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"action": "pin"}, "needs level = 0 to 3"),
        ({"action": "pin", "level": 4}, "levels 0 to 3"),
        ({"level": 1}, "needs action = 'pin'"),
        ({"source": ["10.0.0.1/8"]}, "'10.0.0.1/8' is no network"),
        ({"destination": ["host"]}, "no network"),
        ({"source_port": [70000]}, "port '70000'"),
        ({"destination_port": ["90-80"]}, "port '90-80'"),
        ({"destination_port": ["-1"]}, "port"),
        ({"dscp": [64]}, "0 to 63"),
        ({"cgroup": "system.slice"}, "cgroup = 'system.slice'"),
        ({"cgroup": "/"}, "every socket"),
        ({"route": 3}, "no route 3"),
        ({"route": 1, "action": "exclude"}, "take route away"),
    ],
)
def test_a_wrong_rule_is_named(rule, match):
    given_rules = [Rule(), msgspec.convert({"name": "mine", **rule}, Rule)]
    with pytest.raises(UsageError, match=f"rule 'mine'.*{match}") as caught:
        parse_rules(given_rules, 4, (1, 2))
    assert "\n" not in str(caught.value)


def test_there_is_a_bound_on_rules_and_prefixes():
    parse_rules([Rule()] * MAX_RULES, 4)
    with pytest.raises(UsageError, match="65 rules"):
        parse_rules([Rule()] * (MAX_RULES + 1), 4)
    many = parse_rules([Rule(source=[f"10.{i // 256}.{i % 256}.0/24" for i in range(9000)])], 4)
    with pytest.raises(UsageError, match="there is room for"):
        compile_rules(many, [None])
    deep = parse_rules([Rule(cgroup="/a")], 4)
    with pytest.raises(UsageError, match="9 below the root"):
        compile_rules(deep, [Cgroup(7, 9)])


@given(st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(sorted))
def test_a_range_of_ports_is_covered_exactly_by_few_prefixes(ends):
    low, high = ends
    prefixes = _port_prefixes([f"{low}-{high}"])
    assert len(prefixes) <= 30
    covered = sorted((int.from_bytes(value, "big"), 1 << (16 - bits)) for value, bits in prefixes)
    following = low
    for start, size in covered:
        assert start == following
        following += size
    assert following == high + 1


def test_a_list_of_tables_is_read_from_the_file(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text('[[rules]]\nname = "a"\naction = "pin"\nlevel = 1\ndestination_port = [80, "90-99"]\n[[rules]]\n')
    config = load(AgentConfig, path, environ={})
    assert config.rules == [Rule(name="a", action="pin", level=1, destination_port=[80, "90-99"]), Rule()]
    path.write_text("rules = 4")
    with pytest.raises(UsageError, match=r"\[\[rules\]\]"):
        load(AgentConfig, path, environ={})
    path.write_text("[[rules]]\nsourc = []")
    with pytest.raises(UsageError, match="sourc"):
        load(AgentConfig, path, environ={})


def test_what_a_rule_says_nothing_about_it_admits():
    rules = parse_rules([Rule(cgroup="/c"), Rule(protocol="udp"), Rule(source=["::/0"]), Rule()], 4)
    flow = Flow("10.0.0.1", "10.0.0.2", 1, 2, 6)
    assert first_match(rules, [None] * 4, flow) == 2  # ::/0 holds the IPv4-mapped addresses, too
    in_cgroup = Flow("10.0.0.1", "10.0.0.2", 1, 2, 6, cgroups=frozenset({5}))
    assert first_match(rules, [Cgroup(5, 1), None, None, None], in_cgroup) == 0


def states_of(outcomes):
    states = np.zeros(len(outcomes), FLOW_STATE_DTYPE)
    kept = np.zeros(len(outcomes), KEPT_OUTCOME_DTYPE)
    for row, (rule, treatment) in enumerate(outcomes):
        kept[row]["rule"], kept[row]["treatment"] = rule, treatment
    states["rules"] = kept.view("<u8")
    return states


def test_excluded_flows_are_not_told_but_leave_the_table():
    states = states_of([(0, 0), (1, 2), (2, 1)])
    states["attained_bytes"] = 10_000
    states["last_seen_ns"] = [9 * 10**9, 9 * 10**9, 9 * 10**9]
    table = FlowTable(np.zeros(3, FLOW_KEY_DTYPE), states, 10 * 10**9)
    seen = observe(table, 1000, 30.0)
    assert (seen.active, sorted(seen.long.tolist())) == (2, [0, 2])
    later = observe(FlowTable(table.keys, states, 100 * 10**9), 1000, 30.0)
    assert (later.finished.tolist(), later.leaving.tolist()) == ([0, 2], [0, 1, 2])


def test_flows_are_counted_by_rule():
    assert flows_by_rule(states_of([(0, 0), (1, 2), (3, 0), (3, 0)]), 3) == [1, 0, 2]


def test_a_data_path_that_cannot_is_refused_what_it_cannot():
    config = msgspec.structs.replace(load(AgentConfig, None, {}, {}), rules=[Rule()])
    with pytest.raises(UsageError, match=r"\[\[rules\]\].*fake"):
        require(config, FakeDatapath(1024))


def test_the_rules_command_lists_and_decides(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text(
        '[datapath]\npin_dir = "/nowhere/x"\n'
        '[[rules]]\nname = "backup"\ndestination = ["10.8.0.0/16"]\naction = "pin"\nlevel = 3\n'
        '[[rules]]\nname = "routing"\ndestination_port = [179]\nprotocol = "tcp"\naction = "exclude"\n'
    )
    run = CliRunner().invoke
    listed = run(command, ["rules", "--config", str(path)])
    assert listed.exit_code == 0
    assert "1  backup: to 10.8.0.0/16 -> always on level 3" in listed.output
    for flow, says in (
        ("tcp 10.0.0.1:4 10.8.3.3:179", "rule 1 'backup': always on level 3"),
        ("tcp [fd00::1]:4 [fd00::2]:179", "rule 2 'routing': left alone"),
        ("udp 10.0.0.1:4 10.9.3.3:179", "no rule: by thresholds and central's verdicts"),
    ):
        assert run(command, ["rules", "--config", str(path), "--flow", flow]).output.strip() == says
    for flow in ("nonsense", "tcp 10.0.0.1:4 [fd00::2]:179", "tcp 10.0.0.1:4 10.8.3.3:65536"):
        assert isinstance(run(command, ["rules", "--config", str(path), "--flow", flow]).exception, UsageError)
