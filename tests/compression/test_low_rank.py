from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.artifacts import Variant
from hasten.compression.awq import Awq
from hasten.compression.base import Calibration, Compressor
from hasten.compression.depth import Depth
from hasten.compression.distill import Distill
from hasten.compression.gptq import Gptq
from hasten.compression.gqa import Gqa
from hasten.compression.lora_heal import LoraHeal
from hasten.compression.low_rank import Allocation, LowRank, Which, allotted, weights
from hasten.compression.make import make_variant
from hasten.compression.mixed import Mixed
from hasten.compression.qat import Qat
from hasten.compression.rtn import Rtn
from hasten.compression.shared.truncation import Seen, cut
from hasten.compression.smoothquant import Smoothquant
from hasten.compression.wanda import Wanda
from hasten.compression.width import Width
from hasten.compression.window import Window
from hasten.config import discover
from hasten.engine.base import Engine, Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.cost import cost_of
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from hasten.model.low_rank_config import LowRankConfig, matrix_sizes
from hasten.training.options import Precision
from tests.compression.texts import text
from tests.engine.engines import opened
from tests.engine.llama import far_from_best
from tests.tiny import GEMMA, decoder, shape, write_variant

TEXT = text(12, 16, documents=2, padding=3)
ONE_THREAD: dict[str, Any] = {"steps": 2, "batch_size": 4, "precision": Precision.float32, "accelerator": "cpu",
                              "threads": 1}  # fmt: skip


def made(method: Compressor, parent: Variant, name: str, calibration: Calibration | None = TEXT) -> Variant:
    return make_variant(method, parent, calibration, name=name, target=parent.path.with_name(name), seed=0)[0]


def shape_of(variant: Variant) -> LowRankConfig:
    config = load_network(variant).config
    assert isinstance(config, LowRankConfig)
    return config


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    parent = write_variant(tmp_path_factory.mktemp("low_rank") / "baseline", decoder(shape(qkv_bias=True)))
    return made(LowRank(keep=0.6, allocation=Allocation.uniform, multiple_of=4), parent, "thin")


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(12, 20, 50), (20, 12, 50), (12, 20, 7)])
def test_a_cut_loses_what_eckart_and_young_say_is_the_least(rows: int, columns: int, tokens: int) -> None:
    weight, x = random(rows, columns), random(tokens, columns, seed=1) * torch.logspace(0, -2, columns)
    least = torch.linalg.svdvals(x @ weight.T).square()  # of the outputs themselves
    seen = Seen(x.T @ x)
    for rank in range(1, min(rows, columns) + 1):
        outer, inner, lost = cut(weight, seen, rank)
        assert outer.shape == (rows, rank) and inner.shape == (rank, columns)
        error = float((x @ (weight - outer @ inner).T).square().sum())
        assert error == pytest.approx(float(least[rank:].sum()), rel=1e-6, abs=1e-9)
        assert lost == pytest.approx(error / float(least.sum()), rel=1e-6, abs=1e-12)


def test_a_network_of_low_rank_loses_nothing(tmp_path: Path) -> None:
    model = decoder(shape(**GEMMA))
    with torch.no_grad():
        for name in matrix_sizes(model.config):
            value = model.get_parameter(f"{name}.weight")
            value.copy_(random(value.shape[0], 4) @ random(4, value.shape[1], seed=1) * 0.1)
    variant = made(LowRank(keep=0.6, multiple_of=4), write_variant(tmp_path / "baseline", model), "thin")
    assert max(variant.manifest["notes"]["errors"].values()) < 1e-6
    with torch.inference_mode():
        torch.testing.assert_close(load_network(variant).eval()(TEXT.ids), model(TEXT.ids), rtol=1e-3, atol=1e-3)


def test_uniform_leaves_each_matrix_its_share(thin: Variant) -> None:
    config, notes = shape_of(thin), thin.manifest["notes"]
    assert config.ranks.keys() == matrix_sizes(config).keys() == notes["errors"].keys()
    sizes = matrix_sizes(config)
    for name, rank in config.ranks.items():
        assert rank % 4 == 0
        assert weights(sizes[name], rank) <= 0.6 * weights(sizes[name]) < weights(sizes[name], rank + 4)
    assert notes["kept"] == pytest.approx(
        sum(weights(sizes[n], r) for n, r in config.ranks.items()) / sum(map(weights, sizes.values())), abs=1e-6
    )
    assert thin.manifest["options"]["allocation"] == "uniform"


@pytest.mark.parametrize("which", Which)
def test_which_says_what_is_factored(tmp_path: Path, which: Which) -> None:
    variant = made(LowRank(0.8, which, multiple_of=2), write_variant(tmp_path / "baseline"), "thin")
    ranks = shape_of(variant).ranks
    assert ranks and all(f"{which.value}." in name for name in ranks)
    names = variant.tensors().keys()
    assert all(f"{name}.in_proj.weight" in names and f"{name}.weight" not in names for name in ranks)


def test_looking_at_activations_misses_less_of_them(tmp_path: Path) -> None:
    """The text uses few words, so that its activations fill few directions."""
    parent = write_variant(tmp_path / "baseline", decoder(shape(layers=1, hidden_size=64, feed_forward_size=128)))
    narrow = Calibration(TEXT.ids % 5 + 3, TEXT.documents, TEXT.weights)
    assert LowRank(activations=False).needs == "nothing" and LowRank().needs == "calibration"
    blind = made(LowRank(0.4, Which.mlp, activations=False, multiple_of=4), parent, "blind", None)
    seeing = made(LowRank(0.4, Which.mlp, multiple_of=4), parent, "seeing", narrow)
    with torch.inference_mode():
        right, *others = (load_network(one).eval()(narrow.ids) for one in (parent, blind, seeing))
        missed = [float((one - right).square().mean()) for one in others]
    assert missed[1] < 0.5 * missed[0]
    weight = parent.tensors()["model.layers.0.mlp.up_proj.weight"].double()
    rank = shape_of(blind).ranks["model.layers.0.mlp.up_proj"]
    values = torch.linalg.svdvals(weight).square()
    expected = float(values[rank:].sum() / values.sum())
    assert blind.manifest["notes"]["errors"]["model.layers.0.mlp.up_proj"] == pytest.approx(expected, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=4),
    st.floats(0.2, 0.95),
    st.integers(0, 99),
)
def test_no_single_step_elsewhere_would_lose_less(shapes: list[tuple[int, int]], keep: float, seed: int) -> None:
    sizes = {str(number): size for number, size in enumerate(shapes)}
    energies = {
        name: random(min(size), seed=seed + int(name)).square().sort(descending=True).values
        for name, size in sizes.items()
    }
    ranks = allotted(energies, sizes, keep, 1)
    if not ranks:
        return
    assert sum(weights(sizes[name], ranks.get(name)) for name in sizes) <= keep * sum(map(weights, sizes.values()))
    gains = {name: values / values.sum() / sum(sizes[name]) for name, values in energies.items()}
    assert all(weights(sizes[name], rank) < weights(sizes[name]) for name, rank in ranks.items())
    most = {name: (weights(size) - 1) // sum(size) for name, size in sizes.items()}
    for taken, rank in ranks.items():
        for other, more in ranks.items():
            if rank > 1 and more < most[other] and sum(sizes[other]) <= sum(sizes[taken]):
                assert gains[taken][rank - 1] >= gains[other][more] - 1e-12


def test_a_matrix_that_needs_everything_stays_whole() -> None:
    sizes = {"flat": (16, 16), "steep": (16, 16)}
    energies = {"flat": torch.ones(16).double(), "steep": torch.tensor([1.0] + [1e-6] * 15).double()}
    assert allotted(energies, sizes, 0.6, 1) == {"steep": 1}


def test_it_runs_and_has_the_bytes_that_are_counted(thin: Variant, tmp_path: Path) -> None:
    session = Eager(threads=1).load(thin, tmp_path)
    assert len(list(session.submit(Request(0, (5, 6), 4)))) == 4
    assert session.weight_bytes_per_token == sum(value.nbytes for value in thin.tensors().values())


@pytest.mark.parametrize(
    "method",
    [
        Rtn(group_size=4),
        Gptq(group_size=4),
        Mixed(10.0, group_size=4),
        Wanda(),
        Qat(group_size=4, **ONE_THREAD),
        Distill(**ONE_THREAD),
    ],
    ids=lambda method: method.name,
)
def test_what_comes_after_it(thin: Variant, method: Compressor, tmp_path: Path) -> None:
    child = make_variant(method, thin, TEXT, name="child", target=thin.path.with_name(method.name), seed=0)[0]
    assert shape_of(child).ranks == shape_of(thin).ranks
    if child.manifest["grid"]:
        assert "model.layers.0.self_attn.q_proj.out_proj.weight_packed" in child.tensors()
    if isinstance(method, Gptq):
        assert child.manifest["notes"]["errors"].keys() >= {"model.layers.1.mlp.down_proj.out_proj", "lm_head"}
    before, after = (load_network(one).eval() for one in (thin, child))
    assert len(list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6), 4)))) == 4
    assert isinstance(before, Decoder)
    name = "model.layers.0.mlp.up_proj.in_proj.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))


@pytest.mark.parametrize(
    "method",
    [LowRank(), Gqa(1), Width(), Depth(), Awq(), Smoothquant(), Window(16), LoraHeal()],
    ids=lambda method: method.name,
)
def test_what_wants_whole_matrices_refuses_its_child(thin: Variant, method: Compressor) -> None:
    with pytest.raises(UserError, match=f"{method.name} needs whole matrices, got .*thin with factored ones"):
        method.compress(thin, TEXT, 0)


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_that_write_their_graphs_write_two_products(tmp_path: Path, engine: str, bits: int) -> None:
    """With biases, and with norms between queries and keys and their attention."""
    for number, changes in enumerate(({"qkv_bias": True}, GEMMA)):
        config = shape(hidden_size=64, feed_forward_size=128, **changes)
        parent = write_variant(tmp_path / str(number) / "baseline", decoder(config, spread=0.15))
        variant = made(LowRank(keep=0.7, multiple_of=16), parent, "thin")
        if bits:
            variant = made(Rtn(bits=bits, group_size=16), variant, "int8", None)
        model = load_network(variant).eval()
        asked = tuple(TEXT.ids[0].tolist())
        with opened(engine, variant, tmp_path / "cache", max_context=64) as session:
            found = [token.id for token in session.submit(Request(0, asked, 8))]
        assert far_from_best(model, asked, found) < 1e-2
        if not bits:
            read = 4 * cost_of(shape_of(variant)).parameters_per_token
            assert session.weight_bytes_per_token == pytest.approx(read, rel=0.02)  # one leaves norms out
            assert read < 0.8 * 4 * cost_of(config).parameters_per_token


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for keep in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"compression\.keep must lie between 0 and 1, got"):
            LowRank(keep)
    with pytest.raises(UserError, match=r"compression\.multiple_of must be at least 1, got 0"):
        LowRank(multiple_of=0)
    parent = write_variant(tmp_path / "baseline")
    with pytest.raises(UserError, match=r"multiple_of must be at most .* got 32 for model\.layers\.0\.self_attn"):
        LowRank(allocation=Allocation.uniform).compress(parent, TEXT, 0)
    with pytest.raises(UserError, match=r"must leave each matrix a rank of 8 .* got 0\.1"):
        LowRank(0.1, multiple_of=8).compress(parent, TEXT, 0)
    with pytest.raises(UserError, match="low_rank needs calibration text"):
        LowRank().compress(parent, None, 0)
    with pytest.raises(UserError, match="low_rank needs a float parent"):
        LowRank().compress(made(Rtn(), parent, "int4"), TEXT, 0)


@pytest.mark.parametrize("name", sorted(discover("engine").keys() - {"eager", "onnxruntime", "openvino"}))
def test_engines_whose_layers_are_whole_refuse_it(thin: Variant, name: str) -> None:
    engine = discover("engine")[name]()
    assert isinstance(engine, Engine)
    assert "got 'hasten_low_rank'" in str(engine.reads(thin).reason)
