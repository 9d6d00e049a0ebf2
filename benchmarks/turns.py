"""Why speeds are compared in turns: two trials one after another, and side by side, on the machine as it is.

    python benchmarks/turns.py          # after `make repro`; about three minutes on two cores

First fresh processes in turn, the reference, the champion and so on: the medians of each, and the ratio of every
neighbouring pair. Then rounds as `confirm` plays them: the ratio of each, with the standard error of its own passes.
The spread (standard deviation of the logarithm) of both kinds of ratio is what to look at.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

import hydra

from hasten.artifacts import read_json
from hasten.evaluation.limits import Limits
from hasten.evaluation.speedup import round_log_ratio
from hasten.evaluation.trial import Job, run
from hasten.evaluation.turns import SideBySide, play
from hasten.stages import load_plan, trial_config

SCENARIO, LIMITS = "qa", Limits(600.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=8, help="of each trial, one after another")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--passes", type=int, default=12, help="turns there and back per round")
    options = parser.parse_args()
    plan = load_plan()
    chosen = read_json(Path("artifacts", plan["plan"], "finalists.json"))["scenarios"][SCENARIO]
    with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        jobs = {trial: alone(trial_config(plan, trial).job("test")) for trial in trials(chosen)}
    print(f"{' and '.join(jobs)}, medians of one process after another (ms):")
    found = [one_after_another(jobs) for _ in range(options.processes)]
    for trial in jobs:
        print(f"  {trial}: {' '.join(f'{1000 * medians[trial]:.1f}' for medians in found)}")
    show("ratios", [math.log(first / second) for first, second in (medians.values() for medians in found)])
    print("side by side:")
    ratios = []
    for number in range(options.rounds):
        logs, medians = side_by_side(jobs, options.passes, number)
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        ratios.append(statistics.mean(logs))
        levels = " and ".join(f"{1000 * median:.1f}" for median in medians)
        print(f"  {math.exp(ratios[-1]):.3f} +- {error:.1%} from its {len(logs)} passes; medians {levels} ms")
    show("ratios", ratios)


def trials(chosen: dict) -> list[str]:
    return [chosen["reference"], chosen["finalists"][0]]


def alone(job: Job) -> Job:
    """Speed and nothing else."""
    return replace(job, splits=(), continuation=None)


def one_after_another(jobs: dict[str, Job]) -> dict[str, float]:
    medians = {}
    for trial, job in jobs.items():
        samples = [sample for part in run(job, LIMITS).speed[SCENARIO] for sample in part.samples]
        medians[trial] = statistics.median(sample.latency_seconds for sample in samples)
    return medians


def side_by_side(jobs: dict[str, Job], passes: int, number: int) -> tuple[list[float], list[float]]:
    """(each pass' logarithm of the ratio, both medians) of one round."""

    def values(trial: str, samples: list) -> list[float]:
        return jobs[trial].scenarios[SCENARIO].headline_values(samples)

    first, second = jobs
    with SideBySide(jobs, SCENARIO, LIMITS) as table:
        played = [
            play(table, list(jobs), values, seed=number * passes + one, in_time=lambda: False) for one in range(passes)
        ]
    sides = [[one.values[trial] for one in played if one] for trial in (first, second)]
    logs = [round_log_ratio([mine], [theirs]) for mine, theirs in zip(*sides, strict=True)]
    return logs, [statistics.median(value for one in side for value in one) for side in sides]


def show(what: str, logs: list[float]) -> None:
    ratios = " ".join(f"{math.exp(log):.2f}" for log in logs)
    print(f"  {what}: {ratios}; spread {statistics.stdev(logs):.1%}", flush=True)


if __name__ == "__main__":
    main()
