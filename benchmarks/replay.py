"""Does a confirmed speed-up repeat, and what does a busy machine do to it?

    python benchmarks/replay.py                         # after `make repro`; about half an hour on two cores
    python benchmarks/replay.py --trial int4-llamacpp --repeats 10 --hog-repeats 2 --seconds 60

Confirms one trial against the plan's reference again and again, exactly as the stage `confirm` does (without the
questions), and prints every ratio with its interval. Then against itself under two names (the ratio must be 1), and
then with a process that computes all the time on one core: the label must be `noisy`, and the verdict refuses to
conclude from it. Exits with 1 if

- the ratio over all repeats together lies in fewer than 9 of 10 printed intervals,
- 1 lies outside the interval of the trial against itself more than once in 10,
- a measurement beside the hog is not labelled, unless its ratio is within 5% of the quiet one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hydra
from scipy.stats import gmean

from hasten.artifacts import read_json
from hasten.config import compose
from hasten.evaluation.confirmation import confirm
from hasten.evaluation.limits import Limits
from hasten.evaluation.speedup import speedup
from hasten.evaluation.statistics import Estimate
from hasten.evaluation.trial import Job, Outcome
from hasten.stages import Confirm, load_plan, trial_config

SCENARIO = "qa"


def main() -> None:
    options = arguments()
    plan = load_plan()
    with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        settings = compose(Confirm, [f"plan={plan['plan']}", *plan["set"]["confirm"].split()])
        chosen = read_json(settings.folder / "finalists.json")["scenarios"][SCENARIO]
        reference = chosen["reference"]
        trial = options.trial or chosen["finalists"][0]
        jobs = {name: trial_config(plan, name).job("test") for name in (reference, trial)}
    settings.time_budget_seconds = options.seconds or settings.time_budget_seconds
    jobs["itself"] = replace(jobs[reference], trial="itself")

    quiet = repeat(settings, jobs, reference, trial, options.repeats, f"{trial} against {reference}")
    known = [estimate for estimate, label in quiet if label != "noisy"]
    together = float(gmean([estimate.value for estimate in known]))
    held = sum(estimate.low <= together <= estimate.high for estimate in known)
    first = sum(known[0].low <= estimate.value <= known[0].high for estimate in known[1:])
    print(f"all together {together:.3f}; it lies in {held} of {len(known)} intervals")
    print(f"{first} of the {len(known) - 1} later ratios lie in the first interval (of replays as long, 83% would)")
    same = repeat(settings, jobs, reference, "itself", max(options.repeats // 3, 1), f"{reference} against itself")
    equal = sum(estimate.low <= 1 <= estimate.high for estimate, _ in same)
    print(f"1 lies in {equal} of {len(same)} intervals")
    with hog():
        busy = repeat(settings, jobs, reference, trial, options.hog_repeats, "beside a busy process")
    wrong = [estimate for estimate, label in busy if label != "noisy" and abs(estimate.value / together - 1) > 0.05]
    print(f"neither refused, nor labelled, nor within 5%: {len(wrong)} of {options.hog_repeats}")
    sys.exit(bool(held < 0.9 * len(known) or len(same) - equal > max(1, len(same) // 10) or wrong))


def repeat(
    settings: Confirm, jobs: dict[str, Job], reference: str, trial: str, times: int, title: str
) -> list[tuple[Estimate, str]]:
    """Each confirmation's speed-up and label, printed as they come; those that came to no conclusion are left out."""
    print(f"{title}:")
    found = []
    for number in range(times):
        pair = {name: replace(jobs[name], seed=1000 * number) for name in (reference, trial)}
        entry = {"reference": reference, "finalists": [trial]}
        record, _ = confirm(
            {"plan": settings.plan, "scenarios": {SCENARIO: entry}},
            pair,
            rounds=settings.rounds,
            passes=settings.passes,
            precision=settings.precision_percent / 100,
            budget_seconds=settings.time_budget_seconds,
            limits=Limits(settings.timeout_seconds, None),
            runner=lambda job, limits: Outcome("ok"),  # the answers are not what is repeated
        )
        result = record["scenarios"][SCENARIO]
        mine, theirs = (result["trials"][name]["rounds"] for name in (reference, trial))
        lower = result["trials"][trial]["lower_is_better"]
        ratio = speedup(mine, theirs, first_stage=result["rounds_first_stage"], lower_is_better=lower)
        label = result["trials"][trial]["validity"]
        if not isinstance(ratio, Estimate):
            errors = [entry["error"] for entry in result["trials"].values() if entry["error"]]
            print(f"  no conclusion: {ratio.why}; {label} {errors}", flush=True)
            continue
        again = sum(one["attempts"] - 1 for passes in result["conditions"] for one in passes)
        print(
            f"  {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  {label}, {len(mine)} rounds, "
            f"{again} passes played again",
            flush=True,
        )
        found.append((ratio, label))
    return found


@contextmanager
def hog() -> Iterator[None]:
    """A process that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trial", help="a trial of the plan in force; the first finalist if it is not given")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--hog-repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="time budget of a confirmation; the plan's if it is not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
