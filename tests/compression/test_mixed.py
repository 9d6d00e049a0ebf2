from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Variant
from hasten.compression.gptq import Gptq
from hasten.compression.make import make_variant
from hasten.compression.mixed import Mixed, Rounding, cheapest
from hasten.compression.rtn import Rtn
from hasten.compression.shared import sensitivity
from hasten.compression.shared.layerwise import groups
from hasten.compression.shared.quantiser import Scale, nearest_scale
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.grid import Grid, Grids, dequantise, grid_of, quantise, quantised_names
from hasten.model.huggingface import load_network
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, lstm, shape, write_variant

TEXT = text(12, 16, documents=2, padding=3)
FRAGILE = "model.layers.1.mlp.down_proj"
GROUP = 16
LOW, HIGH = 5.0, 9.0  # bits per weight of 4 and of 8 bits in groups of 16


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """In every group of one matrix, a weight that meets zeros is so large that 4 bits leave nothing of the others."""
    model = decoder(shape(tied_head=False))
    with torch.no_grad():
        model.get_parameter(f"{FRAGILE}.weight")[:, ::GROUP] = 9.0
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[::GROUP] = 0.0
    return write_variant(tmp_path_factory.mktemp("mixed") / "baseline", model)


def made(parent: Variant, **options: Any) -> Variant:
    name = "-".join(f"{key}{value}" for key, value in options.items())
    method = Mixed(**{"group_size": GROUP, **options})
    return make_variant(method, parent, TEXT, name="m", target=parent.path.with_name(name or "plain"), seed=0)[0]


def bits(variant: Variant) -> dict[str, int]:
    grid = grid_of(variant)
    assert isinstance(grid, Grids)
    return {name: grid.of(name).bits for name in quantised_names(variant.tensors())}


def taken(variant: Variant) -> float:
    """Bits per weight as stored, scales counted as 16 bits."""
    tensors, of = variant.tensors(), bits(variant)
    sizes = {name: int(tensors[f"{name}.weight_shape"].prod()) for name in of}
    scales = sum(16 * tensors[f"{name}.weight_scale"].numel() for name in of)
    return (sum(of[name] * size for name, size in sizes.items()) + scales) / sum(sizes.values())


def predictions(variant: Variant) -> torch.Tensor:
    """Log-probabilities where a token counts, by an ordinary pass in float64."""
    model = load_network(variant).double().eval()
    with torch.no_grad():
        hidden = model.hidden(TEXT.ids, documents=TEXT.documents)[:, :-1][TEXT.weights[:, 1:] > 0]
        return F.log_softmax(model.lm_head(hidden), -1)


def damage(parent: Variant, variant: Variant) -> float:
    return float(F.kl_div(predictions(variant), predictions(parent), reduction="batchmean", log_target=True))


@pytest.mark.parametrize("budget", [LOW, 5.3, 6.0, 7.5, HIGH, 16.0])
def test_the_budget_is_kept_and_used(parent: Variant, budget: float) -> None:
    variant = made(parent, bits_per_weight=budget)
    assert taken(variant) <= budget
    assert variant.manifest["notes"]["bits_per_weight"] == pytest.approx(taken(variant), abs=1e-6)
    of, tensors = bits(variant), variant.tensors()
    weights = sum(int(tensors[f"{name}.weight_shape"].prod()) for name in of)
    units = [unit.names for unit in groups(load_network(parent), head=True)]  # type: ignore[arg-type]
    assert {name for names in units for name in names} == of.keys()
    for names in units:  # one format for what is multiplied together; what stayed at 4 bits did not fit any more
        assert len({of[name] for name in names}) == 1
        more = sum(4 * int(tensors[f"{name}.weight_shape"].prod()) for name in names)
        assert of[names[0]] == 8 or taken(variant) + more / weights > budget


def test_what_misses_bits_most_gets_them(parent: Variant) -> None:
    variant = made(parent, bits_per_weight=5.5)
    found = variant.manifest["notes"]["divergence"]
    assert max(found, key=lambda name: found[name]["4"]) == FRAGILE
    assert bits(variant)[FRAGILE] == 8
    assert set(bits(variant).values()) == {4, 8}


def test_it_loses_less_than_one_grid_of_as_many_bytes(parent: Variant) -> None:
    uniform, _ = make_variant(
        Rtn(bits=4, group_size=GROUP), parent, None, name="u", target=parent.path.with_name("uniform"), seed=0
    )
    lost = [damage(parent, made(parent, bits_per_weight=budget)) for budget in (LOW, 5.5, 7.0, HIGH)]
    assert lost[0] == pytest.approx(damage(parent, uniform), rel=1e-9)
    assert lost == sorted(lost, reverse=True)
    assert lost[1] < 0.5 * lost[0]


def test_sensitivities_are_what_rounding_a_unit_alone_does_to_the_network(parent: Variant, tmp_path: Path) -> None:
    notes = made(parent).manifest["notes"]["divergence"]
    for number, unit in enumerate(groups(load_network(parent), head=True)):  # type: ignore[arg-type]
        if number % 3:
            continue
        for count in (4, 8):
            model, grid = load_network(parent), Grid(count, GROUP)
            with torch.no_grad():
                for name in unit.names:
                    weight = model.get_submodule(name).weight
                    scale = nearest_scale(weight, grid)
                    weight.copy_(dequantise(quantise(weight, scale, grid), scale))
            alone = write_variant(tmp_path / f"{number}-{count}", model)
            assert notes[unit.names[0]][str(count)] == pytest.approx(damage(parent, alone), rel=0.02, abs=1e-6)


@pytest.mark.parametrize(("budget", "count"), [(LOW, 4), (HIGH, 8)])
@pytest.mark.parametrize("how", [Scale.nearest, Scale.signed])
def test_where_all_get_the_same_the_integers_are_those_of_the_method_that_rounds(
    parent: Variant, budget: float, count: int, how: Scale
) -> None:
    options: dict[str, Any] = {"bits": count, "group_size": GROUP, "scale": how}
    for rounding, method, seen in ((Rounding.rtn, Rtn(**options), None), (Rounding.gptq, Gptq(**options), TEXT)):
        mixed = Mixed(bits_per_weight=budget, group_size=GROUP, scale=how, rounding=rounding)
        tensors, expected = mixed.compress(parent, TEXT, 0).tensors, method.compress(parent, seen, 0).tensors
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("changes", [{}, {"tied_head": False}, {**GEMMA, "layers": 3}], ids=["tied", "own", "gemma"])
def test_every_option_survives_compress_save_load_generate(
    tmp_path: Path, changes: dict[str, Any], head: bool, rounding: Rounding
) -> None:
    parent = write_variant(tmp_path / "baseline", decoder(shape(**changes)))
    variant = made(parent, head=head, rounding=rounding, candidates=[4, 8, 16], bits_per_weight=12.0, damping=0.1)
    assert ("lm_head" in variant.config["quantization_config"]["ignore"]) is ("lm_head" not in bits(variant))
    assert head or "lm_head" not in bits(variant)
    before, after = load_network(parent), load_network(variant)
    floating = [
        name for name in before.state_dict() if name.endswith("_proj.weight") and name[:-7] not in bits(variant)
    ]
    assert floating  # 16 bits were worth their bytes somewhere
    assert all(torch.equal(before.get_parameter(name), after.get_parameter(name)) for name in floating)
    assert after.config.tied_head is (before.config.tied_head and "lm_head" not in bits(variant))
    assert len(list(Eager(threads=1).load(variant, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from([4, 8, 16]), st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 20),
)
def test_the_choice_is_the_best_there_is(options: list[dict[int, tuple[int, float]]], spare: int) -> None:
    budget = sum(min(size for size, _ in option.values()) for option in options) + spare

    def total(names: tuple[int, ...] | list[int]) -> tuple[int, float]:
        chosen = [option[name] for option, name in zip(options, names, strict=True)]
        return sum(size for size, _ in chosen), sum(lost for _, lost in chosen)

    fitting = [total(names) for names in product(*options) if total(names)[0] <= budget]
    size, lost = total(cheapest(options, budget))
    assert lost == min(lost for _, lost in fitting)
    assert size == min(size for size, other in fitting if other == lost)


def test_the_same_text_makes_the_same_bytes(parent: Variant, tmp_path: Path) -> None:
    first = made(parent, bits_per_weight=6.5)
    again, _ = make_variant(
        Mixed(bits_per_weight=6.5, group_size=GROUP), parent, TEXT, name="m", target=tmp_path / "m", seed=0
    )
    assert first.hash == again.hash


def test_it_needs_text_and_a_float_decoder_and_a_budget_that_holds_something(
    parent: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^mixed needs calibration text, got none$"):
        Mixed().compress(parent, None, 0)
    with pytest.raises(UserError, match=r"mixed needs a float parent, got .* which is quantised; quantise last"):
        Mixed().compress(made(parent, bits_per_weight=8.9), TEXT, 0)
    with pytest.raises(UserError, match=r"mixed is for decoders \(llama, .*\), got model_type 'hasten_lstm'"):
        Mixed().compress(write_variant(tmp_path / "lstm", lstm()), TEXT, 0)
    monkeypatch.setattr(sensitivity, "divergences", None)  # what follows is refused before anything is measured
    words = r"compression\.bits_per_weight must be at least 4\.5 \(4 bits everywhere, and their scales\), got 4\.4"
    with pytest.raises(UserError, match=words):
        Mixed(bits_per_weight=4.4).compress(parent, TEXT, 0)
    with pytest.raises(UserError, match="group_size must divide every matrix's input width, got 24 for"):
        Mixed(group_size=24).compress(parent, TEXT, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": [4]}, r"compression\.candidates must be at least two in ascending order, got \[4\]"),
        ({"candidates": [8, 4]}, r"compression\.candidates must be at least two in ascending order, got \[8, 4\]"),
        ({"candidates": [3, 4]}, r"compression\.candidates must be one of \[4, 8, 16\], got 3"),
        ({"group_size": -1}, r"compression\.group_size must be 0 \(whole row\) or more, got -1"),
        ({"damping": 2.0}, r"compression\.damping must be 0 to 1, got 2\.0"),
    ],
)
def test_mixed_refuses_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mixed(**options)
