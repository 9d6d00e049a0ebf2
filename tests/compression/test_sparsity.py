"""`magnitude`, `wanda` and `sparsegpt`: what they share, and each against its formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.compression.magnitude import Magnitude
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.compensation import inverse_factor
from hasten.compression.shared.layerwise import Group, groups
from hasten.compression.shared.sparsity import Sparsifier, is_inner
from hasten.compression.shared.surgeon import Surgeon, operated
from hasten.compression.sparsegpt import Sparsegpt
from hasten.compression.wanda import Wanda
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, lstm, shape, write_checkpoint, write_variant

METHODS: dict[str, type[Sparsifier]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": Sparsegpt}
TEXT = text(12, 16, documents=2, padding=3)


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(name: str) -> tuple[Tensor, torch.nn.Linear]:
    """What the first block's queries are given, (tokens, in) float64, and their matrix, of a fresh network."""
    model = decoder(shape(**GEMMA))
    seen: list[Tensor] = []
    linear = model.model.layers[0].get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0][TEXT.documents >= 0]))
    with torch.no_grad():
        model.model(TEXT.ids, documents=TEXT.documents)
    handle.remove()
    return seen[0].double(), linear


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.25}, {"pattern": "2:4"}], ids=str)
def test_so_many_weights_become_zero_and_the_variant_runs(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    parent = write_variant(tmp_path / "baseline", decoder(shape(**GEMMA)))
    method = METHODS[name](**options)
    first, second = (
        make_variant(method, parent, TEXT, name="v", target=tmp_path / folder, seed=seed)[0]
        for seed, folder in enumerate(("a", "b"))
    )
    assert first.hash == second.hash
    assert first.manifest["notes"] == {"zeros": method.sparsity}
    before = parent.tensors()
    for tensor, value in first.tensors().items():
        if not is_inner(tensor):
            assert torch.equal(value, before[tensor])
            continue
        if name != "sparsegpt":
            assert torch.equal(value[value != 0], before[tensor][value != 0])
        if options.get("pattern"):
            assert ((value == 0).view(-1, 4).sum(1) == 2).all()
    assert len(list(Eager(threads=1).load(first, tmp_path).submit(Request(0, (5, 6), 4)))) == 4
    child, _ = make_variant(Rtn(bits=8), first, None, name="c", target=tmp_path / "c", seed=0)
    assert child.lineage == ["baseline", "v", "c"]


@settings(max_examples=50)
@given(seed=st.integers(0, 999), sparsity=st.sampled_from([0.1, 0.5, 0.8]), rows=st.sampled_from([1, 3]))
def test_the_smallest_go_and_as_many_of_each_row(seed: int, sparsity: float, rows: int) -> None:
    scores = random(rows, 20, seed=seed).abs()
    gone = Magnitude(sparsity).smallest(scores)
    assert (gone.sum(1) == int(20 * sparsity)).all()
    for row, out in zip(scores, gone, strict=True):
        assert not out.any() or row[out].max() <= row[~out].min()
    half = Magnitude(pattern="2:4").smallest(scores).view(-1, 4)
    fours = scores.view(-1, 4)
    assert (half.sum(1) == 2).all()
    assert (fours.masked_fill(~half, -1).amax(1) <= fours.masked_fill(half, 1e9).amin(1)).all()


def test_of_equal_weights_the_first_go() -> None:
    assert Magnitude().smallest(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


def test_magnitude_compares_a_whole_matrix(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "parent")
    made = Magnitude(0.3).compress(parent, None, 0).tensors
    for name, weight in parent.tensors().items():
        if is_inner(name):
            limit = weight.abs().flatten().sort().values[int(weight.numel() * 0.3)]
            assert torch.equal(made[name] == 0, weight.abs() < limit)


def test_magnitude_knows_the_gates_of_an_lstm(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "parent", lstm())
    made = Magnitude().compress(parent, None, 0)
    gates = [name for name in made.tensors if "hidden_proj" in name]
    assert len(gates) == 4
    assert all((made.tensors[name] == 0).float().mean() == 0.5 for name in gates)
    assert torch.equal(made.tensors["model.embed_tokens.weight"], parent.tensors()["model.embed_tokens.weight"])


def test_wandas_masks_are_those_of_the_formula(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "parent", decoder(shape(**GEMMA)))
    made = Wanda().compress(parent, TEXT, 0).tensors
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):  # nothing was treated before them
        x, linear = inputs(name)
        scores = linear.weight.detach().double().abs() * x.norm(dim=0)
        limit = scores.sort(dim=1).values[:, [16]]
        assert torch.equal(made[f"model.layers.0.{name}.weight"] == 0, scores < limit)


def surgery(weight: Tensor, gram: Tensor, method: Sparsegpt) -> Tensor:
    """The paper's equations as they stand: an inverse for every column."""
    weight, columns = weight.clone(), weight.shape[1]
    damped = gram + method.damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    step = 4 if method.pattern == "2:4" else method.block
    inverses = [damped[j:, j:].inverse() for j in range(columns)]
    for start in range(0, columns, step):
        end = min(start + step, columns)
        costs = torch.stack([weight[:, j] ** 2 / inverses[j][0, 0] for j in range(start, end)], 1)
        if step == 4:
            gone = costs <= costs.sort(dim=1).values[:, [1]]
        else:
            gone = costs < costs.flatten().sort().values[int(costs.numel() * method.sparsity)]
        for j in range(start, end):
            for row in range(len(weight)):
                if gone[row, j - start]:
                    weight[row, j:] -= weight[row, j] * inverses[j][0] / inverses[j][0, 0]
                    weight[row, j] = 0
    return weight


@pytest.mark.parametrize("pattern", ["none", "2:4"])
@pytest.mark.parametrize("columns", [16, 24, 28])
def test_sparsegpt_does_the_papers_surgery(pattern: str, columns: int) -> None:
    x, weight = random(50, columns) @ random(columns, columns, seed=1), random(6, columns, seed=2)
    method = Sparsegpt(pattern=pattern, block=12)
    gram = x.T @ x
    found = operated(weight, inverse_factor(gram, 0.01)[0], method)
    torch.testing.assert_close(found, surgery(weight, gram, method), rtol=1e-7, atol=1e-9)
    masked = weight.masked_fill(found == 0, 0)
    assert ((found - weight) @ x.T).square().sum() < 0.9 * ((masked - weight) @ x.T).square().sum()


def test_an_input_that_is_never_given_breaks_nothing() -> None:
    x = random(40, 16)
    x[:, 3] = 0
    found = operated(random(4, 16, seed=1), inverse_factor(x.T @ x, 0.01)[0], Sparsegpt())
    assert torch.isfinite(found).all()


def test_sparsegpt_treats_a_group_by_what_it_saw() -> None:
    x, linear = inputs("mlp.gate_proj")
    model = decoder(shape(**GEMMA))
    group = next(one for one in groups(model, head=False) if "gate_proj" in one.names[0])
    surgeon = Surgeon(Sparsegpt())
    for part in x.float().split(50):
        surgeon.see(part)
    expected = operated(linear.weight.detach().double(), inverse_factor(x.T @ x, 0.01)[0], Sparsegpt())
    with torch.no_grad():
        surgeon.treat(Group(group.names, group.linears, group.block))
    torch.testing.assert_close(group.linears[0].weight.detach(), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_checked(name: str) -> None:
    method = METHODS[name]
    for sparsity in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match=rf"compression\.sparsity must lie between 0 and 1, got {sparsity}"):
            method(sparsity)
    with pytest.raises(UserError, match=r"compression\.pattern must be one of \['none', '2:4'\], got '4:8'"):
        method(pattern="4:8")
    with pytest.raises(UserError, match=r"compression\.sparsity must be 0.5 where pattern is 2:4, got 0.6"):
        method(0.6, "2:4")


@pytest.mark.parametrize(("field", "value"), [("block", 6), ("block", 0), ("damping", 0.0), ("damping", 2.0)])
def test_sparsegpts_own_options_are_checked(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"compression\.{field} must be .*, got {value}"):
        Sparsegpt(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    parent = write_variant(tmp_path / "baseline")
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match=f"{name} needs a float parent"):
        METHODS[name]().compress(quantised, TEXT, 0)
    narrow = write_checkpoint(tmp_path / "narrow", decoder(shape(feed_forward_size=66)))
    with pytest.raises(UserError, match=r"pattern 2:4 needs widths that 4 divides, got 66 of .*down_proj"):
        METHODS[name](pattern="2:4").compress(narrow, TEXT, 0)
    if name != "magnitude":
        with pytest.raises(UserError, match=f"{name} needs calibration text, got none"):
            METHODS[name]().compress(parent, None, 0)
        with pytest.raises(UserError, match=f"{name} is for decoders"):
            METHODS[name]().compress(write_checkpoint(tmp_path / "lstm", lstm()), TEXT, 0)
