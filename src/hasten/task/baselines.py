"""What a model must beat: the majority answer, and TF-IDF with logistic regression.

Both learn from the training split and see exactly the prompts that the model sees. For items that
choose between texts, the second is the option most similar to the context by TF-IDF cosine.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hasten.artifacts import Json
from hasten.task.base import Item, Task

MOST_CLASSES = 50
SCORED_SPLITS = ("validation", "test")
_BY_CHARACTER = ("zh", "ja", "th", "lo", "my", "km")
"""Languages written without spaces between words."""


def baselines(task: Task, items: dict[str, list[Item]]) -> Json:
    """`{majority: {validation, test}, tfidf: {validation, test}}` as accuracies in [0, 1].

    A baseline that makes no sense is null, with the reason under `why`.
    """
    answers = Counter(item.expected for item in items["train"])
    scored = {split: items[split] for split in SCORED_SPLITS}
    if not answers or not all(scored.values()):
        return _none("a split has no items")
    majority = max(answers, key=lambda answer: (answers[answer], answer))
    result: Json = {"majority": {split: _accuracy(items, majority) for split, items in scored.items()}}
    if all(task.choices(item) for item in scored["validation"]):
        return {**result, "tfidf": {split: _most_similar(task, items) for split, items in scored.items()}}
    if not 1 < len(answers) <= MOST_CLASSES:
        why = f"the training split has {len(answers)} distinct completions, a classifier needs 2 to {MOST_CLASSES}"
        return {**result, "tfidf": None, "why": why}
    return {**result, "tfidf": _classifier(items["train"], scored)}


def _none(reason: str) -> Json:
    return {"majority": None, "tfidf": None, "why": reason}


def _accuracy(items: list[Item], answer: str) -> float:
    return sum(item.expected == answer for item in items) / len(items)


def _vectorizer(items: list[Item]) -> Any:
    """Words and word pairs, or one to three characters where words are not separated."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if any(item.language in _BY_CHARACTER for item in items):
        return TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    return TfidfVectorizer(analyzer="word", ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")


def _classifier(train: list[Item], scored: dict[str, list[Item]]) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    # liblinear: single-threaded, hence quick and the same everywhere.
    classifier = OneVsRestClassifier(LogisticRegression(C=10.0, solver="liblinear"))
    model = make_pipeline(_vectorizer(train), classifier)
    model.fit([item.prompt for item in train], [item.expected for item in train])
    return {
        split: float(model.score([item.prompt for item in items], [item.expected for item in items]))
        for split, items in scored.items()
    }


def _most_similar(task: Task, items: list[Item]) -> float:
    vectorizer = _vectorizer(items)
    choices = [choice for item in items if (choice := task.choices(item))]
    vectorizer.fit([text for context, options in choices for text in (context, *options.values())])
    right = 0
    for item, (context, options) in zip(items, choices, strict=True):
        similarity = (vectorizer.transform(options.values()) @ vectorizer.transform([context]).T).toarray()[:, 0]
        right += list(options)[int(similarity.argmax())] == item.expected
    return right / len(items)
