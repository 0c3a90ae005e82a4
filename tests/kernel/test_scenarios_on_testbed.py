"""A scenario of the catalogue's kind on real hosts: every group has its port, its flows and its thresholds."""

import json
from pathlib import Path

import pytest

from testbed.daemons import read_history
from testbed.scenarios.catalogue import DATA_MINING, WEB_SEARCH, Hour, PortGroup, Scenario
from testbed.scenarios.contenders import CONTENDERS
from testbed.scenarios.real import measure_on_hosts
from testbed.scenarios.small import small, trace_of
from testbed.schemes import scaled

TWO = Scenario(
    "two",
    "web search and data mining, a group each",
    (PortGroup("web", 4, (Hour(WEB_SEARCH, 0.6),)), PortGroup("mining", 4, (Hour(DATA_MINING, 0.5),))),
)


class Quiet:
    """Nobody watches the progress."""

    def begin(self, step: str, total: float) -> None:
        pass

    def advance(self, done: float, note: str = "") -> None:
        pass


def begun_with(out: Path, host: str) -> tuple[int, ...]:
    """The thresholds that a host's agent had first."""
    return read_history((out / "logs" / f"agent-{host}.log").read_text().splitlines())[0].thresholds.bytes


@pytest.mark.parametrize("name", ["optimiser", pytest.param("pias-matched", marks=pytest.mark.slow)])
def test_two_groups_with_thresholds_of_their_own(name: str, tmp_path: Path) -> None:
    here, contender = small(TWO, 2.0), CONTENDERS[name]
    document = measure_on_hosts(here, [contender], [1], 4, tmp_path, Quiet(), tmp_path / "runs")
    json.dumps(document, allow_nan=False)
    found = document["schemes"][name]
    assert found["lost"] == 0
    assert found["flows"] == found["hours"][0]["flows"] == len(trace_of(here, 1))
    assert {"mean_us", "p99_us", "mean_slowdown", "buckets"} <= set(found)
    assert 0 < found["mean_us"] <= found["p99_us"]
    assert list((tmp_path / "runs").glob("*")) == []
    # Hosts 0 and 1 belong to the two groups.
    ranked = [contender.ranking(group, 4).thresholds for group in here.scenario.groups]
    for host, (thresholds, scale) in enumerate(zip(ranked, here.scales, strict=True)):
        assert begun_with(tmp_path / f"{name}-1", f"s{host}") == scaled(thresholds, scale).bytes
    decides = contender.policy is not None
    assert (tmp_path / f"{name}-1" / "logs" / "central.log").exists() == decides
    if not decides:
        assert found["decisions"] == 0
        assert found["thresholds"][0][0] != found["thresholds"][0][1]
