from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hasten.artifacts import Tokens, load_checkpoint
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from hasten.model.shape import Shape
from hasten.training import placement
from hasten.training.loop import Fitted
from hasten.training.options import Strategy
from hasten.training.pretraining import held_out, openings, pretrain, refuse_unfit
from tests.tiny import Curves, decoder, lstm, lstm_shape, shape, training, write_ceilings, write_tokenizer, write_tokens

ROOT = Path(__file__).parents[2]
TENSOR = {"strategy": Strategy.tensor_parallel, "processes": 2}
ENDLESS = [
    *("training.steps=1000000", "training.batch_size=2", "training.sequence_length=16", "training.threads=1"),
    *("training.log_every_steps=1", "training.precision=float32", "model.layers=1", "model.hidden_size=16"),
    *("model.heads=2", "model.kv_heads=1", "model.feed_forward_size=16"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    write_tokens(folder / "tokens")
    write_tokenizer(folder / "tokenizer")
    return folder


def trained(
    data: Path, target: Path, metrics: Curves | None = None, vocab_size: int = 0, context: int = 64, **changes: Any
) -> Fitted:
    return pretrain(
        Tokens(data / "tokens"),
        data / "tokenizer",
        shape(vocab_size=vocab_size, context=context),
        training(**changes),
        seed=3,
        scratch=target.with_name("scratch"),
        target=target,
        metrics=metrics or Curves(),
    )


def test_a_base_model_learns_its_text_and_is_saved_with_its_tokenizer(data: Path, tmp_path: Path) -> None:
    curves = Curves()
    result = trained(data, tmp_path / "base", curves, steps=40, validate_every_steps=10)
    loss = curves.curve("validation_loss")
    assert list(loss) == [10, 20, 30, 40]
    assert loss[40] < 0.6 * loss[10] < math.log(100)
    checkpoint = load_checkpoint(tmp_path / "base")
    model = load_network(checkpoint).eval()
    assert model.config.vocab_size == 100  # the tokenizer's
    with torch.no_grad():
        assert held_out(model, Tokens(data / "tokens"), training()) == pytest.approx(result.validation)
    facts = {key: checkpoint.manifest[key] for key in ("stage", "steps", "tokens", "grid", "validation")}
    validation = result.validation
    assert facts == {"stage": "pretrain", "steps": 40, "tokens": 2560, "grid": None, "validation": validation}
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (data / "tokenizer" / "tokenizer.json").read_bytes()
    assert checkpoint.config["eos_token_id"] == 1


def test_the_same_seed_gives_the_same_artifact_bytes(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained(data, tmp_path / name / "base")
    assert load_checkpoint(tmp_path / "a/base").hash == load_checkpoint(tmp_path / "b/base").hash


def test_epochs_become_steps_over_the_whole_text(data: Path, tmp_path: Path) -> None:
    result = trained(data, tmp_path / "base", steps=0, epochs=2, batch_size=64, accumulate=2, validate_every_steps=99)
    assert result.steps == math.ceil(2 * 4000 / (64 * 16))
    assert result.tokens == result.steps * 64 * 16


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size must be 0 or at least the tokenizer's 100, got 99"):
        trained(data, tmp_path / "base", vocab_size=99)
    assert not (tmp_path / "base").exists()


def test_text_shorter_than_a_sequence_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sequence_length must fit the train split, got 5000"):
        trained(data, tmp_path / "base", context=8192, sequence_length=5000)


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        (shape(), {"sequence_length": 65}, r"sequence_length must be at most model.context \(64\), got 65"),
        (shape(), {"packing": True}, "training.packing must be false in pre-training"),
        (shape(), {"mixture": {"fr": 2.0}}, "training.mixture must name groups that there are .*, got 'fr'"),
        (lstm_shape(), {}, "documents_apart must be false for an LSTM"),
        (
            lstm_shape(),
            {"documents_apart": False, "activation_checkpointing": True},
            "activation_checkpointing must be",
        ),
        (lstm_shape(), {"documents_apart": False, **TENSOR}, "strategy must be single, ddp or fsdp for an LSTM"),
        (shape(heads=3, kv_heads=1, hidden_size=48), TENSOR, r"tensor_parallel must divide model.heads \(3\), got 2"),
    ],
)
def test_options_that_do_not_go_with_the_shape_are_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, config: Shape, changes: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(placement, "cpu_count", lambda: 2)
    with pytest.raises(UserError, match=sentence):
        refuse_unfit(config, Tokens(data / "tokens"), training(**changes))


def uniform() -> Decoder:
    """Every token equally likely."""
    model = decoder(shape(tied_head=False)).requires_grad_(False)
    model.lm_head.weight.zero_()
    return model


def test_bits_per_byte_of_a_uniform_model_are_its_tokens_bits_over_each_languages_bytes(data: Path) -> None:
    figures = held_out(uniform(), Tokens(data / "tokens"), training())
    assert figures["validation_loss"] == pytest.approx(math.log(100))
    assert figures["bits_per_byte_en"] == pytest.approx(math.log2(100) / 2)  # 2 bytes a token
    assert figures["bits_per_byte_zh"] == pytest.approx(math.log2(100) / 3)


def test_each_languages_figure_comes_from_its_own_documents_each_by_itself(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", validation=160)  # 8 documents of 20 tokens, 4 of them English
    ids = torch.from_numpy(np.asarray(tokens.ids("validation")).astype(np.int64))
    model = decoder(spread=0.1)
    for code, language in enumerate(("en", "zh")):
        losses = []
        for start in range(80 * code, 80 * code + 80, 16):  # rows of 16; a document ends where 20 divides
            cuts = [start, *(place for place in range(start + 1, start + 16) if place % 20 == 0), start + 16]
            for first, end in pairwise(cuts):
                with torch.inference_mode():
                    logits = model(ids[None, first:end])[0, :-1]
                losses.append(F.cross_entropy(logits, ids[first + 1 : end], reduction="none"))
        expected = float(torch.cat(losses).mean()) / math.log(2) / (2 + code)
        with torch.no_grad():
            assert held_out(model, tokens, training())[f"bits_per_byte_{language}"] == pytest.approx(expected, rel=1e-5)


def test_an_lstm_is_scored_across_documents(data: Path) -> None:
    figures = held_out(lstm().requires_grad_(False), Tokens(data / "tokens"), training(documents_apart=False))
    assert 0 < figures["validation_loss"] < 50


@pytest.mark.parametrize(("validation", "tokens"), [(5, 65536), (400, 3), (17, 65536)])
def test_little_held_out_text_or_a_small_limit_still_gives_a_figure(
    tmp_path: Path, validation: int, tokens: int
) -> None:
    text = write_tokens(tmp_path / "tokens", validation=validation)
    figures = held_out(uniform(), text, training(validation_tokens=tokens))
    assert figures["validation_loss"] == pytest.approx(math.log(100))


def test_validation_scores_no_more_than_its_limit_of_every_group(data: Path) -> None:
    rows = []
    model = decoder().requires_grad_(False)
    model.model.register_forward_hook(lambda module, args, output: rows.append(args[0].shape))
    held_out(model, Tokens(data / "tokens"), training(validation_tokens=100))
    assert [tuple(shape) for shape in rows] == [(3, 16), (3, 16)]  # 48 of 50 tokens of each language


def test_samples_begin_as_documents_do_of_every_group_in_turn(data: Path) -> None:
    tokens = Tokens(data / "tokens")
    found = openings(tokens, 3, length=5)
    english, chinese = tokens.groups("validation")
    places = (0, chinese.start_token, 20)  # the second English document begins at 20
    assert english.start_token == 0
    assert found == [tokens.ids("validation")[place : place + 5].tolist() for place in places]


def test_a_stage_ended_by_sigterm_exits_with_143_and_has_saved_but_exported_nothing(data: Path, tmp_path: Path) -> None:
    """The real entry point: its own signal handler, Lightning's, the run's record and MLflow together."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/p").symlink_to(data)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    write_ceilings(tmp_path, threads=1)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines/pretrain.py"), "plan=p", *ENDLESS],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "step 20/" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        assert process.wait(60) == 143, rest
    finally:
        process.kill()
    assert "Traceback" not in rest
    saved = list((tmp_path / ".work/fits").glob("pretrain-*/step-*.ckpt"))
    assert len(saved) == 1
    assert torch.load(saved[0], weights_only=False)["global_step"] >= 20
    assert not (tmp_path / "artifacts/p/checkpoints").exists()
    assert not (tmp_path / "artifacts/p/runs").exists()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("hasten").experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("pretrain", "KILLED")]
