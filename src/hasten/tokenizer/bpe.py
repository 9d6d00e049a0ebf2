"""Byte-level byte-pair encoding, trained on the plan's own text.

Sennrich et al. 2016 (arXiv:1508.07909) over bytes, so that every text of every language can be
encoded and nothing is unknown. Pieces are cut as SmolLM cuts them (each digit alone, then GPT-2's
pattern), which llama.cpp knows as pre-tokenizer `smollm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hasten.config import environment
from hasten.corpus.text import uniform
from hasten.errors import UserError
from hasten.tokenizer.base import TokenizerRecipe, TrainingText, write_tokenizer

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass
class Bpe(TokenizerRecipe):
    """vocabulary: entries, bytes and special tokens included; a small corpus may yield fewer.

    sample_bytes: most text to learn from. balance_languages: an equal share of it for each language
    (a small corpus gives all it has), so that the largest language does not take the vocabulary.
    minimum_frequency: how often a pair must occur to become an entry.
    """

    vocabulary: int = 8192
    sample_bytes: int = 16_000_000
    balance_languages: bool = True
    minimum_frequency: int = 2

    def __post_init__(self) -> None:
        if self.vocabulary < SMALLEST_VOCABULARY:
            raise UserError(f"vocabulary must be at least {SMALLEST_VOCABULARY}, got {self.vocabulary}")
        if self.sample_bytes < 1:
            raise UserError(f"sample_bytes must be at least 1, got {self.sample_bytes}")
        if self.minimum_frequency < 1:
            raise UserError(f"minimum_frequency must be at least 1, got {self.minimum_frequency}")

    def build(self, text: TrainingText, folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            min_frequency=self.minimum_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        # The library waits for all its threads after each merge: on a busy machine several are far slower than one.
        with environment({"TOKENIZERS_PARALLELISM": "false"}):
            backend.train_from_iterator(self.sample(text), trainer)
        begin, end, padding = SPECIAL_TOKENS
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, backend.token_to_id(begin))]
        )
        tokens: dict[str, str | None] = {"bos": begin, "eos": end, "pad": padding}
        config = {"clean_up_tokenization_spaces": False, "add_prefix_space": False}
        write_tokenizer(folder, backend, tokens, config, {"method": "bpe", "options": asdict(self)})

    def sample(self, text: TrainingText) -> Iterator[str]:
        """About `sample_bytes` of documents, drawn evenly over the corpus by a hash of their text."""
        total = sum(text.bytes_per_language.values())
        count = len(text.bytes_per_language)
        rates = {
            language: self.sample_bytes / (size * count if self.balance_languages else total)
            for language, size in text.bytes_per_language.items()
            if size
        }
        for language, content in text.documents():
            if rates[language] >= 1 or uniform(content) < rates[language]:
                yield content
