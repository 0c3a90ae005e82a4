import json

from click.testing import CliRunner

from simulator import bench


def test_bench_prints_json_with_the_headline(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda scale: measure(scale / 20))
    result = CliRunner().invoke(bench.simulator, ["--quick", "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.output)
    assert found["events_per_second"] > 0
    assert len(found["cases"]) == 14
    headline = next(case for case in found["cases"] if case["name"] == "star, 100 active")
    assert 80 < headline["mean_active"] < 120
    for case in found["cases"]:
        assert case["events"] > 0
        assert case["state_bytes"] < 5e6
