"""The network against the equations of its docstring, written out in plain Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import load_checkpoint
from hasten.errors import UserError
from hasten.model.huggingface import load_network
from hasten.model.lstm import Carried, Lstm
from hasten.model.shape import build
from tests.tiny import lstm, lstm_shape, write_checkpoint

IDS = [5, 17, 60, 3, 99, 42, 8, 8]
Vector = list[float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def times(matrix: list[Vector], x: Vector) -> Vector:
    return [sum(m * value for m, value in zip(row, x, strict=True)) for row in matrix]


class Plain:
    """One row at a time, one token at a time, one number at a time."""

    def __init__(self, model: Lstm) -> None:
        self.weights = {name: value.double().tolist() for name, value in model.state_dict().items()}
        self.layers, self.hidden = model.config.layers, model.config.hidden_size

    def step(self, coder: str, token: int, memory: list[tuple[Vector, Vector]]) -> list[tuple[Vector, Vector]]:
        x: Vector = self.weights["model.embed_tokens.weight"][token]
        after = []
        for layer, (h, c) in enumerate(memory):
            name = f"model.{coder}.layers.{layer}"
            from_x = times(self.weights[f"{name}.input_proj.weight"], x)
            from_h = times(self.weights[f"{name}.hidden_proj.weight"], h)
            z = [a + b + d for a, b, d in zip(from_x, from_h, self.weights[f"{name}.input_proj.bias"], strict=True)]
            i, f, g, o = (z[gate * self.hidden : (gate + 1) * self.hidden] for gate in range(4))
            c = [sigmoid(f[k]) * c[k] + sigmoid(i[k]) * math.tanh(g[k]) for k in range(self.hidden)]
            x = h = [sigmoid(o[k]) * math.tanh(c[k]) for k in range(self.hidden)]
            after.append((h, c))
        return after

    def logits(self, ids: list[int], prompt: int) -> list[Vector]:
        """After ids[prompt - 1], ids[prompt], ...: the encoder has read ids[:prompt]."""
        memory = [([0.0] * self.hidden, [0.0] * self.hidden) for _ in range(self.layers)]
        for token in ids[:prompt]:
            memory = self.step("encoder", token, memory)
        found = []
        for token in ids[prompt - 1 :]:
            memory = self.step("decoder", token, memory)
            found.append(times(self.weights["lm_head.weight"], memory[-1][0]))
        return found


SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 8},
    {"hidden_size": 6, "layers": 3, "embedding_size": 10, "tied_head": False},
    {"hidden_size": 5, "layers": 1},
]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_logits_are_those_of_the_equations(changes: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    model = lstm(lstm_shape(**changes)).to(dtype)
    plain = Plain(model)
    rows = torch.tensor([IDS, IDS[::-1], IDS[3:] + IDS[:3]])
    prompts = torch.tensor([1, 5, 8])
    with torch.inference_mode():
        logits = model.lm_head(model.hidden(rows, prompts)).double()
    for row, ids, prompt in zip(logits, rows.tolist(), prompts.tolist(), strict=True):
        expected = torch.tensor(plain.logits(ids, prompt), dtype=torch.float64)
        assert torch.allclose(row[prompt - 1 :], expected, rtol=0, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 3),
    width=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_rows_of_different_prompts_are_computed_as_each_alone(
    layers: int, width: int, lengths: list[int], seed: int
) -> None:
    model = lstm(lstm_shape(layers=layers, hidden_size=width), seed)
    ids = torch.randint(100, (len(lengths), 9), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        together = model.hidden(ids, torch.tensor(lengths))
        for row, prompt in enumerate(lengths):
            alone = model.hidden(ids[row : row + 1], torch.tensor([prompt]))
            assert torch.allclose(together[row, prompt - 1 :], alone[0, prompt - 1 :], atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 2, 7])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_carried_state_gives_what_reading_everything_again_does(prompt: int, layers: int) -> None:
    model = lstm(lstm_shape(layers=layers))
    ids = torch.tensor([IDS, IDS[::-1]])
    state = model.new_state(2, 0, torch.float32)
    with torch.inference_mode():
        whole = model.lm_head(model.hidden(ids, torch.tensor([prompt, prompt])))
        steps = [model(ids[:, :prompt], state), *(model(ids[:, [t]], state) for t in range(prompt, 8))]
        assert state.length == 8
        assert torch.allclose(torch.cat(steps, dim=1), whole[:, prompt - 1 :], atol=1e-5)
        state.clear()
        assert not state.encoded
        several = [model(ids[:, :prompt], state), model(ids[:, prompt:], state)]  # what follows the prompt in one piece
        assert [one.shape for one in several] == [(2, 1, 100)] * 2
        assert torch.allclose(several[1][:, 0], whole[:, -1], atol=1e-5)


def test_without_a_state_the_encoder_reads_one_token() -> None:
    model, ids = lstm(), torch.tensor([IDS])
    with torch.inference_mode():
        assert torch.equal(model(ids), model.lm_head(model.hidden(ids, torch.tensor([1]))))
        assert model(ids).shape == (1, 8, 100)


def test_the_prompt_is_read_by_the_encoder_and_by_no_other() -> None:
    """What the sketch gets wrong: the decoder sees the prompt through the memory it starts from, and one token."""
    model, ids = lstm(), torch.tensor([IDS])
    changed = ids.clone()
    changed[0, :4] = 70
    with torch.no_grad():
        before = model.hidden(ids, torch.tensor([6]))[:, 5:]
        assert not torch.allclose(model.hidden(changed, torch.tensor([6]))[:, 5:], before, atol=1e-3)
        for weight in model.model.encoder.parameters():
            weight.zero_()  # it hands over zeros, whatever it reads
        deaf = model.hidden(ids, torch.tensor([6]))[:, 5:]
        assert torch.equal(model.hidden(changed, torch.tensor([6]))[:, 5:], deaf)
        assert not torch.equal(deaf, before)


def test_what_is_written_enters_as_the_token_that_was_chosen() -> None:
    model = lstm()
    states = [model.new_state(1, 0, torch.float32) for _ in range(2)]
    with torch.inference_mode():
        for state in states:
            model(torch.tensor([IDS]), state)
        assert torch.equal(states[0].values, states[1].values)
        one, other = (model(torch.tensor([[token]]), state) for token, state in zip((7, 8), states, strict=True))
    assert not torch.allclose(one, other, atol=1e-3)


def test_what_is_handed_over_is_h_and_c_of_every_layer_and_does_not_grow() -> None:
    config = lstm_shape(layers=3)
    model = lstm(config)
    state = model.new_state(2, 10_000, torch.float32)
    assert isinstance(state, Carried)
    assert state.values.shape == (3, 2, 2, 32)
    before = state.bytes
    with torch.inference_mode():
        model(torch.randint(100, (2, 50)), state)
        kept = state.values
        assert (state.length, state.bytes, before) == (50, before, 3 * 2 * 2 * 32 * 4)
        assert kept.data_ptr() == state.values.data_ptr()
    assert state.values.abs().sum(dim=(2, 3)).min() > 0


def test_a_state_in_bfloat16_is_as_good_as_its_digits() -> None:
    model, ids = lstm(spread=0.2), torch.tensor([IDS])
    full, half = (model.new_state(1, 0, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.bytes == full.bytes // 2
    with torch.inference_mode():
        for state in (full, half):
            model(ids, state)
        step = torch.tensor([[9]])
        assert torch.allclose(model(step, full), model(step, half), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_float32_and_rows_stay_apart(dtype: torch.dtype) -> None:
    model, ids, prompts = lstm(spread=0.2), torch.tensor([IDS, IDS]), torch.tensor([2, 7])
    with torch.inference_mode():
        full = model.hidden(ids, prompts)
        low = model.to(dtype).hidden(ids, prompts).float()
    for row, prompt in enumerate(prompts.tolist()):
        assert torch.allclose(low[row, prompt - 1 :], full[row, prompt - 1 :], atol=0.03)


def test_gradients_are_those_of_each_row_alone() -> None:
    """Padding teaches nothing: neither the steps before a prompt nor those after the end."""
    model, ids, prompts = lstm().double(), torch.tensor([IDS, IDS[::-1]]), torch.tensor([3, 6])

    def gradients(rows: list[int]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        said = model.hidden(ids[rows], prompts[rows])
        for row, prompt in zip(said, prompts[rows].tolist(), strict=True):
            row[prompt - 1 :].square().sum().backward(retain_graph=True)
        return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}

    together, first, second = gradients([0, 1]), gradients([0]), gradients([1])
    assert together.keys() == {name for name, _ in model.model.named_parameters()}
    for name, gradient in together.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, first[name] + second[name], atol=1e-10)


def test_fresh_weights_are_decided_by_the_seed_and_remember_at_first() -> None:
    models = [build(lstm_shape()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.initialise(seed)
    a, b, c = (model.state_dict() for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    bias = a["model.encoder.layers.0.input_proj.bias"].view(4, 32)
    assert bias.tolist() == [[0.0] * 32, [1.0] * 32, [0.0] * 32, [0.0] * 32]
    assert a["model.embed_tokens.weight"].std() == pytest.approx(0.1, rel=0.1)
    assert a["model.decoder.layers.1.hidden_proj.weight"].std() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_survives_the_disk_and_its_matrices_are_named_for_compression(tmp_path: Path, tied: bool) -> None:
    model = lstm(lstm_shape(tied_head=tied))
    checkpoint = write_checkpoint(tmp_path / "base", model)
    names = set(checkpoint.tensors())
    assert ("lm_head.weight" in names) is not tied
    assert {name.split(".")[-2] for name in names if name.endswith("weight")} - {"embed_tokens", "lm_head"} == {
        "input_proj",
        "hidden_proj",
    }
    loaded = load_network(load_checkpoint(tmp_path / "base")).eval()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():  # sums may be taken in another order where weights lie elsewhere in memory
        assert torch.allclose(loaded(torch.tensor([IDS])), model(torch.tensor([IDS])), atol=1e-5)


def test_tensors_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    model = lstm()
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    del tensors["model.encoder.layers.1.input_proj.bias"]
    with pytest.raises(UserError, match=r"do not fit config\.json: model\.encoder\.layers\.1\.input_proj\.bias"):
        load_network(write_checkpoint(tmp_path / "base", model, tensors=tensors))
