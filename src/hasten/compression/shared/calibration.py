"""What a method may look at while it compresses: text and task items of the training split, drawn by the plan's seed.

A method that measures activations keeps what the text it saw needs: calibrated on English alone, a bilingual model may
lose its Chinese. So what is drawn is a choice that the config spells out and the variant's manifest records, hash and
all: how much of it are task items as fine-tuning shows them (`tasks`), and how often each source, task and language
comes up (`mixture`, as in training).

    python pipelines/compress.py plan=default name=x parent=variants/baseline compression=depth \\
        calibration.tasks=0.5 '+calibration.mixture={zh: 2}'

A parent that speaks another tokenizer than the plan's (`compression=vocabulary`) is shown the same text in its own ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.artifacts import Checkpoint, Tokens
from hasten.compression.base import Calibration, Compressor
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.tokenizer.base import Tokenizer
    from hasten.tokenizer.translating import Translation
    from hasten.training.data import Batch, Example

COUNTED_TOKENS = 2**22
"""How many are read at once."""


@dataclass
class Calibrate:
    """How much is drawn, and of what.

    sequences, length: rows of so many tokens. tasks: the share of rows that hold task items, several to a row where
    they fit, instead of pre-training text. mixture: how often a source, task or language comes up, relative to the
    others; 0 leaves it out.
    """

    sequences: int = 32
    length: int = 128
    tasks: float = 0.0
    mixture: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise UserError(f"calibration.sequences must be at least 1, got {self.sequences}")
        if self.length < 2:
            raise UserError(f"calibration.length must be at least 2, got {self.length}")
        if not 0 <= self.tasks <= 1:
            raise UserError(f"calibration.tasks must be 0 to 1, got {self.tasks}")

    def rows_for(self, method: Compressor, plan: Path, parent: Checkpoint, seed: int) -> Calibration | None:
        """Calibration from a plan's folder (its tokens, tasks and tokenizer), if the method needs any."""
        if method.needs == "nothing":
            return None
        return counted(plan, parent) if method.needs == "counts" else draw(plan, self, seed, parent)


def counted(plan: Path, parent: Checkpoint) -> Calibration:
    """How often each id comes up in the training split's text and task items, all of them.

    Raises `UserError` if the parent speaks another tokenizer than the plan's.
    """
    import numpy as np
    import torch

    from hasten.tokenizer.translating import translation

    if translation(plan / "tokenizer", parent.path) is not None:
        raise UserError(
            f"a parent whose tokens can be counted has the plan's tokenizer, got {parent.path} with another"
        )
    tokens = Tokens(plan / "tokens").ids("train")
    total = np.zeros(int(parent.config["vocab_size"]), np.int64)
    for start in range(0, len(tokens), COUNTED_TOKENS):
        total += np.bincount(tokens[start : start + COUNTED_TOKENS], minlength=len(total))
    examples = items(plan, 2**31)
    total += np.bincount(np.array([id_ for one in examples for id_ in one.ids], np.int64), minlength=len(total))
    source = f"all {len(tokens)} tokens of text and {len(examples)} task items of the training split"
    nothing = torch.zeros(0, 0)
    return Calibration(nothing.long(), nothing.int(), nothing, source, torch.from_numpy(total))


def draw(plan: Path, options: Calibrate, seed: int, parent: Checkpoint | None = None) -> Calibration:
    """Rows of the training split, in the parent's ids. Raises `UserError` for names that no group has, and for rows
    that nothing fills.
    """
    import torch

    from hasten.tokenizer.translating import translation

    of_tasks = round(options.sequences * options.tasks)
    batches, sources = [], []
    tokens = Tokens(plan / "tokens")
    own = translation(plan / "tokenizer", parent.path) if parent else None
    examples = items(plan, options.length, own.target if own else None) if of_tasks else []
    shares = split(options.mixture, {(group.source, group.language) for group in tokens.groups("train")}, examples)
    with speaking_of_calibration():
        if of_text := options.sequences - of_tasks:
            rows = text(tokens, of_text, options.length, shares[0], seed)
            batches.append(translated(rows, own) if own else rows)
            sources.append(f"{of_text} x {options.length} tokens of text")
        if of_tasks:
            batches.append(questions(examples, of_tasks, options.length, shares[1], seed))
            sources.append(f"{of_tasks} x {options.length} tokens of task items")
    ids, documents, weights = (
        torch.cat([batch[name] for batch in batches]) for name in ("ids", "documents", "weights")
    )
    return Calibration(ids, documents, weights, f"{' and '.join(sources)}, of the training split")


def text(tokens: Tokens, rows: int, length: int, mixture: Mapping[str, float], seed: int) -> Batch:
    """Pre-training text, documents told apart."""
    from hasten.training.data import PackedTokens

    cut = PackedTokens(
        tokens, "train", steps=1, batch_size=rows, length=length, seed=seed, mixture=mixture, even_shares=False
    )
    return cut[0]


def questions(examples: list[Example], rows: int, length: int, mixture: Mapping[str, float], seed: int) -> Batch:
    """Items as fine-tuning packs them, padded to `length`; what counts are their completions."""
    import torch.nn.functional as F

    from hasten.training.data import PackedExamples

    packed = PackedExamples(
        examples, length=length, steps=1, batch_size=rows, seed=seed, prompt_weight=0.0, pad_id=0, mixture=mixture
    )
    batch = packed[0]
    room = (0, length - batch["ids"].shape[1])
    return {
        "ids": F.pad(batch["ids"], room),
        "documents": F.pad(batch["documents"], room, value=-1),
        "weights": F.pad(batch["weights"], room),
    }


def translated(batch: Batch, own: Translation) -> Batch:
    """Rows of text in other ids: what then does not fit is cut off, what is then missing is padding."""
    import torch

    ids, documents = torch.zeros_like(batch["ids"]), torch.full_like(batch["documents"], -1)
    weights = torch.zeros_like(batch["weights"])
    for row, (old, of) in enumerate(zip(batch["ids"], batch["documents"], strict=True)):
        new = [own(old[of == one].tolist(), cut=True) for one in of.unique().tolist()]
        place = 0
        for document, found in enumerate(filter(None, new)):
            found = found[: ids.shape[1] - place]
            end = place + len(found)
            ids[row, place:end], documents[row, place:end] = torch.tensor(found, dtype=ids.dtype), document
            weights[row, place + 1 : end] = 1
            place = end
    return {"ids": ids, "documents": documents, "weights": weights}


def items(plan: Path, length: int, tokenizer: Tokenizer | None = None) -> list[Example]:
    """Every training item of the plan's tasks, by the plan's tokenizer or another. Raises `UserError` if one is longer
    than a row.
    """
    from hasten.task.data import load_tasks
    from hasten.tokenizer.base import load_tokenizer
    from hasten.training.finetuning import example

    tokenizer = tokenizer or load_tokenizer(plan / "tokenizer")
    found = [(task.path.name, item) for task in load_tasks(plan / "tasks") for item in task.items("train")]
    examples = [example(item, tokenizer, 2**31, task) for task, item in found]
    if examples and (longest := max(examples, key=lambda one: len(one.ids))) and len(longest.ids) > length:
        raise UserError(
            f"calibration.length must fit every item, got {length} for an item of task {longest.task} with "
            f"{len(longest.ids)} tokens"
        )
    return examples


def split(
    mixture: Mapping[str, float], groups: set[tuple[str, str]], examples: list[Example]
) -> tuple[dict[str, float], dict[str, float]]:
    """The mixture's entries that concern text, and those that concern items; some concern both (a language)."""

    def names(pairs: set[tuple[str, str]]) -> set[str]:
        return {name for pair in pairs for name in (*pair, "/".join(pair))}

    in_text, in_tasks = names(groups), names({(one.task, one.language) for one in examples})
    if unknown := [name for name in mixture if name not in in_text | in_tasks]:
        known = ", ".join(sorted(in_text | in_tasks))
        raise UserError(f"calibration.mixture must name groups that there are ({known}), got {unknown[0]!r}")
    shares = [{name: value for name, value in mixture.items() if name in there} for there in (in_text, in_tasks)]
    return shares[0], shares[1]


@contextmanager
def speaking_of_calibration() -> Iterator[None]:
    """What training's data refuses, in the words of this config."""
    try:
        yield
    except UserError as error:
        said = str(error).replace("training.sequence_length", "calibration.length")
        raise UserError(said.replace("training.mixture", "calibration.mixture")) from None
