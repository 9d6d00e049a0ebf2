"""Two trials answered the same items: how much accuracy was lost, how surely, and where.

The pairing is what makes small losses visible: items that both get right (or wrong) cancel out, and only the
*flips* carry noise. Items of all tasks count equally; items of one cluster (a conversation) are resampled
together. The same comparison is made per language, because a loss in one hides behind gains in another, and per
task, to show where it lies. The flips themselves are listed: ten of them read are worth more than a p-value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.errors import UserError
from hasten.evaluation.difference import Difference, mcnemar, non_inferiority_p, paired_difference

if TYPE_CHECKING:
    import pandas as pd

KEY = ["task", "item_id"]


@dataclass(frozen=True)
class Part:
    """A candidate against the reference on some items: all, a language's or a task's.

    gained, lost: items that only the candidate, only the reference answers right. mcnemar_p: exact, two-sided, that
    both are equally likely.
    """

    difference: Difference
    gained: int
    lost: int
    mcnemar_p: float

    def describe(self) -> dict[str, Any]:
        """As `verdict.json` holds it, differences in points."""
        points = self.difference.points
        return {
            "points": points.value,
            "ci95": points.ci95,
            "n": points.n,
            "clusters": self.difference.clusters,
            "mcnemar_p": self.mcnemar_p,
            "flips": {"gained": self.gained, "lost": self.lost},
        }


@dataclass(frozen=True)
class Comparison:
    """A candidate against the reference on one split: pooled, per language and per task.

    p, language_p: one-sided, that the loss is at least the margin.
    """

    pooled: Part
    p: float
    languages: dict[str, Part]
    language_p: dict[str, float]
    tasks: dict[str, Part]

    @property
    def overall_p(self) -> float:
        """That every margin is kept: all tests must pass, so the largest p-value counts (Berger 1982)."""
        return max(self.p, *self.language_p.values())

    def describe(self, margin_points: float) -> dict[str, Any]:
        """The evidence as `verdict.json` holds it (differences in points)."""
        return {
            **self.pooled.describe(),
            "p": self.p,
            "margin_points": margin_points,
            "flips_per_task": {task: {"gained": part.gained, "lost": part.lost} for task, part in self.tasks.items()},
            "per_task": {task: part.describe() for task, part in self.tasks.items()},
            "per_language": {
                language: {**part.describe(), "p": self.language_p[language]}
                for language, part in self.languages.items()
            },
        }


def compare(
    candidate: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    margin_points: float,
    language_margin_points: float,
    seed: int = 0,
) -> Comparison:
    """Compare two trials' predictions (one split, columns as in `predictions/T.parquet`).

    Raises `UserError` unless both answered exactly the same items.
    """
    pairs = paired(candidate, reference)
    pooled = _part(pairs, seed)
    languages = {str(name): _part(part, seed) for name, part in pairs.groupby("language")}
    return Comparison(
        pooled=pooled,
        p=non_inferiority_p(pooled.difference, margin_points),
        languages=languages,
        language_p={
            name: non_inferiority_p(part.difference, language_margin_points) for name, part in languages.items()
        },
        tasks={str(name): _part(part, seed) for name, part in pairs.groupby("task")},
    )


def flips(candidate: pd.DataFrame, reference: pd.DataFrame) -> list[dict[str, str]]:
    """The items that only one of two trials answered right, sorted by task and item.

    Each has task, item_id, language, expected, output_reference, output_candidate and change ("gained" or "lost", from
    the candidate's side). Raises `UserError` unless both answered exactly the same items.
    """
    pairs = paired(candidate, reference)
    columns = [*KEY, "language", "expected", "output_reference", "output_candidate"]
    flipped = pairs[pairs["correct_candidate"] != pairs["correct_reference"]]
    changes = (flipped["correct_candidate"] > flipped["correct_reference"]).map({True: "gained", False: "lost"})
    return [
        {**{name: str(row[name]) for name in columns}, "change": change}
        for row, change in zip(flipped[columns].to_dict("records"), changes.tolist(), strict=True)
    ]


def paired(candidate: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Both trials' answers side by side (`correct_candidate`, `output_reference`, ...), sorted by task and item."""
    columns = [*KEY, "output", "correct"]
    sides = (candidate, reference)
    if any(side.duplicated(KEY).any() for side in sides):
        raise UserError("predictions must hold every item once per split, got duplicates of (task, item_id)")
    pairs = reference.merge(candidate[columns], on=KEY, suffixes=("_reference", "_candidate"))
    if not len(pairs) == len(candidate) == len(reference) > 0:
        raise UserError(
            f"both trials must have answered the same items, got {len(reference)} and {len(candidate)} of which "
            f"{len(pairs)} are shared; evaluate them again on the same tasks"
        )
    pairs = pairs.astype({"correct_candidate": float, "correct_reference": float})
    return pairs.sort_values(KEY, ignore_index=True)


def clusters(answers: pd.DataFrame) -> list[tuple[str, str]]:
    """What each row's answer is not independent of: conversations of different tasks are different."""
    return list(zip(answers["task"].astype(str), answers["cluster_id"].astype(str), strict=True))


def _part(pairs: pd.DataFrame, seed: int) -> Part:
    candidate, reference = pairs["correct_candidate"], pairs["correct_reference"]
    difference = paired_difference(candidate.tolist(), reference.tolist(), clusters(pairs), seed=seed)
    gained, lost = int((candidate > reference).sum()), int((candidate < reference).sum())
    return Part(difference, gained, lost, mcnemar(gained, lost))
