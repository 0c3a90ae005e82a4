"""`fabricpilot bench srla`: learned thresholds beside the exact optimiser's and the best the simulator can find.

    unseen   workloads that nobody trained on: first use, and the thresholds in force during the first ten reports
    scratch  training from an equal split on one workload, in wall and CPU time

Every value is a mean completion time over the optimum's on the same flows, none of which the search or the learner has
seen. The optimum is the better of the exact optimiser's thresholds and CMA-ES in the simulator started from them.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from central.srla.trial import Case

_LOADS, _LEVELS, _RATE_GBPS = (0.5, 0.8), (4, 8), 10.0
_REPORTS = 10
_WEB_SEARCH = "websearch_dctcp_bytes_trafficgenerator"
_QUICK = (_WEB_SEARCH, "facebook_hadoop_bytes_hpcc", "homa_w3_bytes_cdf")
_FULL_LOADS, _FULL_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9), (2, 4, 6, 8)
_SCRATCH = ((_WEB_SEARCH,), (0.8,), (4,))  # workloads, loads, K
_FULL_SCRATCH = (
    (
        _WEB_SEARCH,
        "datamining_vl2_bytes_trafficgenerator",
        "facebook_hadoop_bytes_hpcc",
        "facebook_cache_raw_trafficgenerator",
    ),
    (0.6, 0.8),
    (4, 8),
)


@click.command()
@click.option("--full", is_flag=True, help="Many workloads, loads and K. Long.")
@click.option("--seeds", default=1, show_default=True, help="Traffic, and training from scratch, so many times.")
@click.option("--flows", default=50_000, show_default=True, help="Flows that thresholds are judged by.")
@click.option("--evaluations", default=120, show_default=True, help="Simulations the search may use.")
@click.option("--workers", default=2, show_default=True, help="Processes of the training from scratch.")
@click.option("--only", type=click.Choice(["unseen", "scratch"]), help="One of the two parts.")
@json_option
def srla(full: bool, seeds: int, flows: int, evaluations: int, workers: int, only: str | None, as_json: bool) -> None:
    """Compare learned thresholds with the exact optimiser's and with the simulator's optimum."""
    from simulator.workloads.distribution import names
    from simulator.workloads.situations import HELD_OUT

    rows = []
    for name in () if only == "scratch" else names() if full else _QUICK:
        for load in _FULL_LOADS if full else _LOADS:
            for levels in _FULL_LEVELS if full else _LEVELS:
                for seed in range(1, seeds + 1):
                    row = {"cdf": name, "unseen": name in HELD_OUT, "load": load, "levels": levels, "seed": seed}
                    rows.append(row | _unseen(name, load, levels, flows, evaluations, seed))
                    if not as_json:
                        click.echo(_line(rows[-1]))
    result: dict[str, Any] = {}
    if rows:
        unseen = [row for row in rows if row["unseen"]]
        result = {"above_optimum": _means(unseen), "worst_above_optimum": _means(unseen, max), "rows": rows}
    if only != "unseen":
        result["scratch"] = []
        for name, load, levels in product(*(_FULL_SCRATCH if full else _SCRATCH)):
            for seed in range(1, seeds + 1):
                result["scratch"].append(_scratch(name, load, levels, flows, evaluations, seed, workers))
                if not as_json:
                    click.echo(_scratch_line(result["scratch"][-1]))
    if as_json:
        print_json(result)
        return
    for what in ("above_optimum", "worst_above_optimum") if rows else ():
        shares = ", ".join(f"{method} {share:+.2%}" for method, share in result[what].items())
        click.echo(f"{what.replace('_', ' ')}, workloads not trained on: {shares}")


def _unseen(name: str, load: float, levels: int, flows: int, evaluations: int, seed: int) -> dict[str, Any]:
    """What each method is worth above the optimum on one workload."""
    from central.srla import weights
    from central.srla.policy import SrlaPolicy
    from simulator.schemes import equal_split

    case = _case(name, load, levels, flows, seed)
    met = case.met
    policy = SrlaPolicy.load()
    base = policy.encoding.thresholds_at(met.base, np.zeros(len(met.base)))
    action = policy.agent.act(case.state[None], (np.isfinite(met.base) * np.float32(1))[None])[0]
    worth = {
        "exact": case.base_value,
        "srla": case.value(policy.encoding.thresholds_at(met.base, action), "fct"),
        "equal-split": case.value(equal_split(met.situation.sizes, levels), "fct"),
    }
    worth |= _reporting(case)
    if weights.AUTO.exists() and levels == 4:
        auto = SrlaPolicy.load(weights.AUTO)
        sample = met.situation.trace(2_000, np.random.default_rng([seed, 2]))
        worth["auto"] = case.value(auto.thresholds(met.summary(base, met.under(base, sample))), "fct")
    optimum = min(worth["exact"], _search(case, evaluations, seed))
    return {method: value / optimum - 1 for method, value in worth.items()}


def _case(name: str, load: float, levels: int, flows: int, seed: int) -> "Case":
    from central.srla import weights
    from central.srla.trial import Trial
    from simulator.workloads.situations import Range

    given = Range((name,), (load, load), (_RATE_GBPS,), (levels, levels), vary=False, bursty=0.0)
    encoding = weights.load()[1]
    return Trial.of(given, 1, flows, encoding, "fct", seed).cases[0]


def _search(case: "Case", evaluations: int, seed: int) -> float:
    """Mean completion time of the case's flows under the best thresholds that CMA-ES finds on other flows."""
    from central.srla.environment import objective_of
    from central.srla.policy import SrlaPolicy
    from central.thresholds.search import search

    met = case.met
    seen = met.situation.trace(len(case.trace), np.random.default_rng([seed, 1]))
    start = SrlaPolicy.load().encoding.thresholds_at(met.base, np.zeros(len(met.base)))
    found = search(
        lambda thresholds: objective_of(met.under(thresholds, seen), "fct"),
        start,
        met.situation.sizes.max_bytes,
        evaluations=evaluations,
        seed=seed,
    )
    return case.value(found.thresholds, "fct")


def _reporting(case: "Case") -> dict[str, float]:
    """The first reports of a group: mean and worst over them, exploration included.

    `reporting`: every proposal is used by all hosts. `guarded`: by the canary hosts alone, as the guard has it.
    """
    from central.srla.online import OnlineSrla
    from fabricpilot.config import GuardSection, PolicySection

    learner, met = OnlineSrla(PolicySection()), case.met
    used = learner.encoding.thresholds_at(met.base, np.zeros(len(met.base)))
    random, values = np.random.default_rng(3), []
    for _ in range(_REPORTS):
        summary = met.summary(used, met.under(used, met.situation.trace(5_000, random)))
        learner.learn(summary)
        used = learner.propose(summary).thresholds or used
        values.append(case.value(used, "fct"))
    found: dict[str, float] = {}
    for name, share in (("reporting", 1.0), ("guarded", GuardSection().canary_share)):
        felt = [share * value + (1 - share) * case.base_value for value in values]
        found |= {f"srla-{name}": float(np.mean(felt)), f"srla-{name}-worst": max(felt)}
    return found


def _scratch(
    name: str, load: float, levels: int, flows: int, evaluations: int, seed: int, workers: int
) -> dict[str, Any]:
    """Train from scratch and judge the weights that did best in its own trials."""
    from central.srla.training import Settings, SrlaTrainer
    from central.srla.trial import Trial
    from central.training.settings import read

    settings = read(Settings, Path(__file__).parent / "configs" / "scratch.toml")
    given = replace(settings.environment.range, cdfs=(name,), load=(load, load), levels=(levels, levels))
    settings = replace(settings, environment=replace(settings.environment, range=given))
    exact = _case(name, load, levels, flows, seed)
    optimum = min(exact.base_value, _search(exact, evaluations, seed))
    start, before_s = time.perf_counter(), _cpu_s()
    trainer = SrlaTrainer(settings, seed, workers)
    try:
        while trainer.done < trainer.total:
            trainer.advance()
        seconds = time.perf_counter() - start
        (untrained,) = Trial.of(given, 1, flows, settings.encoding, "fct", seed).cases
        trainer.use_best()
        own = Trial((untrained,), settings.encoding, "fct")
        (chosen,) = own.thresholds(trainer.agent)
    finally:
        trainer.close()  # the workers' CPU time counts once they have ended
    return {
        "cdf": name,
        "load": load,
        "levels": levels,
        "seed": seed,
        "workers": workers,
        "seconds": round(seconds, 1),
        "cpu_s": round(_cpu_s() - before_s, 1),
        "simulated_flows": 2 * settings.rounds * settings.environments * settings.environment.flows,
        "thresholds": list(chosen.bytes),
        "untrained_above_optimum": untrained.base_value / optimum - 1,
        "exact_above_optimum": exact.base_value / optimum - 1,
        "above_optimum": exact.value(chosen, "fct") / optimum - 1,
    }


def _cpu_s() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _scratch_line(row: dict[str, Any]) -> str:
    return (
        f"{row['cdf']} load {row['load']} K {row['levels']}, from scratch, seed {row['seed']}: "
        f"{row['untrained_above_optimum']:+.2%} untrained, {row['above_optimum']:+.2%} "
        f"after {row['seconds']:.0f} s ({row['cpu_s']:.0f} s of CPU)"
    )


def _means(rows: list[dict[str, Any]], over: Callable[[list[float]], float] = np.mean) -> dict[str, float]:
    """Each method's mean over the rows, or what `over` makes of them."""
    methods = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _KEYS]
    return {method: float(over([row[method] for row in rows if method in row])) for method in methods}


_KEYS = ("cdf", "unseen", "load", "levels", "seed")


def _line(row: dict[str, Any]) -> str:
    shares = ", ".join(f"{method} {share:+.2%}" for method, share in row.items() if method not in _KEYS)
    return f"{row['cdf']} load {row['load']} K {row['levels']}: {shares}"
