"""The champion as an MLflow model: text in, the greedy completion out, through the engine that won.

Loaded by MLflow as code (`mlflow.pyfunc.load_model("models:/hasten-default-qa@champion")`), never from a
pickle. Input: a data frame with a `prompt` column, a list of strings, or one string.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from hasten.tracking.registry import MAX_TOKENS


class Champion(PythonModel):
    """A variant on its engine."""

    def load_context(self, context: PythonModelContext) -> None:
        from hasten.artifacts import Variant
        from hasten.engine.described import engine_of
        from hasten.tokenizer.base import load_tokenizer

        variant = Variant(Path(context.artifacts["variant"]))
        engine = engine_of(json.loads(Path(context.artifacts["engine"]).read_text()))
        self.tokenizer = load_tokenizer(variant.path)
        self.session = engine.load(variant, Path(".work", "engines"))
        self.context = engine.max_context

    def predict(self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        from hasten.engine.base import Request

        prompts = model_input["prompt"] if hasattr(model_input, "columns") else model_input
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        longest = int((params or {}).get("max_tokens", MAX_TOKENS))
        answers = []
        for number, prompt in enumerate(prompts):
            ids = self.tokenizer.prompt_ids(prompt)
            room = max(1, min(longest, self.context - len(ids)))
            request = Request(number, ids, room, frozenset([self.tokenizer.eos_id]))
            answers.append(self.tokenizer.decode([token.id for token in self.session.submit(request)]))
        return answers


mlflow.models.set_model(Champion())
