"""Two trials answered the same items: how much accuracy was lost, how surely, and where.

The pairing is what makes small losses visible: items that both get right (or wrong) cancel out, and only the
*flips* carry noise. Items of all tasks count equally; items of one cluster (a conversation) are resampled
together. The same comparison is made per language, because a loss in one hides behind gains in another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.errors import UserError
from hasten.evaluation.statistics import Difference, mcnemar, non_inferiority_p, paired_difference

if TYPE_CHECKING:
    import pandas as pd

KEY = ["task", "item_id"]


@dataclass(frozen=True)
class Comparison:
    """A candidate against the reference on one split.

    gained, lost: items that only the candidate, only the reference answers right. tasks: the same per task.
    """

    difference: Difference
    p: float
    mcnemar_p: float
    gained: int
    lost: int
    languages: dict[str, Difference]
    language_p: dict[str, float]
    tasks: dict[str, dict[str, int]]

    @property
    def overall_p(self) -> float:
        """That every margin is kept: all tests must pass, so the largest p-value counts (Berger 1982)."""
        return max(self.p, *self.language_p.values())

    def describe(self, margin_points: float) -> dict[str, Any]:
        """The evidence as `verdict.json` holds it (differences in points)."""
        points = self.difference.points
        return {
            "points": points.value,
            "ci95": points.ci95,
            "p": self.p,
            "margin_points": margin_points,
            "n": points.n,
            "clusters": self.difference.clusters,
            "mcnemar_p": self.mcnemar_p,
            "flips": {"gained": self.gained, "lost": self.lost},
            "flips_per_task": self.tasks,
            "per_language": {
                language: {
                    "points": part.points.value,
                    "ci95": part.points.ci95,
                    "p": self.language_p[language],
                    "n": part.points.n,
                }
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
    change = pairs["correct_candidate"] - pairs["correct_reference"]
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    languages = {str(name): _difference(part, seed) for name, part in pairs.groupby("language")}
    difference = _difference(pairs, seed)
    return Comparison(
        difference=difference,
        p=non_inferiority_p(difference, margin_points),
        mcnemar_p=mcnemar(gained, lost),
        gained=gained,
        lost=lost,
        languages=languages,
        language_p={name: non_inferiority_p(part, language_margin_points) for name, part in languages.items()},
        tasks={
            str(task): {"gained": int((part > 0).sum()), "lost": int((part < 0).sum())}
            for task, part in change.groupby(pairs["task"])
        },
    )


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


def _difference(pairs: pd.DataFrame, seed: int) -> Difference:
    return paired_difference(
        pairs["correct_candidate"].tolist(),
        pairs["correct_reference"].tolist(),
        list(zip(pairs["task"], pairs["cluster_id"], strict=True)),
        seed=seed,
    )
