from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.artifacts import Checkpoint
from hasten.compression.base import ancestor
from hasten.compression.depth import Depth
from hasten.compression.distill import Distill
from hasten.compression.make import make_variant
from hasten.compression.shared import distillation
from hasten.compression.shared.distillation import Distillation, matching
from hasten.compression.shared.recovery import Learned
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.training.data import Batch
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_checkpoint, write_variant

PAIRS = [(0, 0), (1, 2), (2, 3)]


def batch(learned: Learned = Learned.all, seed: int = 0) -> Batch:
    """Two documents to a row, padding at some ends."""
    rows = text(4, 12, documents=2, padding=3, seed=seed)
    rows.weights[:, 1::3] = 0
    return next(Distill(steps=1, batch_size=3, learned=learned).batches(rows, seed))


def textbook(
    student: Decoder, teacher: Decoder, batch: Batch, temperature: float, hidden_weight: float, hard_weight: float
) -> Tensor:
    """The paper's formula on whole logits, by torch's own functions, position by position in the order of the rows."""
    ids, weights, documents = batch["ids"], batch["weights"], batch["documents"]

    def run(model: Decoder) -> tuple[list[Tensor], Tensor]:
        states = [model.model.embed(ids)]
        view = model.model.view(ids, 0, None, False, documents)
        for block in model.model.layers:
            states.append(block(states[-1], view, None))
        return states[1:], model.lm_head(model.model.norm(states[-1]))

    (ours, z), (theirs, aim) = run(student), run(teacher)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(ids)):
        for place in range(ids.shape[1] - 1):
            q, p = (logits[row, place] / temperature for logits in (z, aim))
            loss = temperature**2 * F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
            loss = loss + hard_weight * F.cross_entropy(z[row, place], ids[row, place + 1])
            for mine, its in PAIRS:
                s, t = ours[mine][row, place], theirs[its][row, place].detach()
                loss = loss + hidden_weight / len(PAIRS) * (s - t).square().sum() / t.square().sum()
            total = total + weights[row, place + 1] * loss
    return total / weights[:, 1:].sum()


def gradients(model: Decoder, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([1.0, 2.5, 0.7]),
    hidden_weight=st.sampled_from([0.0, 0.8]),
    hard_weight=st.sampled_from([0.0, 0.3]),
    learned=st.sampled_from(list(Learned)),
    tied=st.booleans(),
    entries=st.sampled_from([1, 2**22]),
)
def test_loss_and_gradients_are_the_textbooks_in_float64(
    seed: int,
    temperature: float,
    hidden_weight: float,
    hard_weight: float,
    learned: Learned,
    tied: bool,
    entries: int,
) -> None:
    student = decoder(shape(layers=3, tied_head=tied), seed, spread=0.2).double()
    teacher = decoder(shape(layers=4), seed + 1, spread=0.2).double()
    one = batch(learned, seed)
    options = {"temperature": temperature, "hidden_weight": hidden_weight, "hard_weight": hard_weight}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "ENTRIES", entries)
        ours = Distillation(student, teacher, PAIRS, **options)(one)
        got = gradients(student, 3 * ours)
    expected = textbook(student, teacher, one, **options)
    wanted = gradients(student, 3 * expected)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    assert got.keys() == wanted.keys()
    for name, slope in wanted.items():
        assert torch.allclose(got[name], slope, rtol=1e-6, atol=1e-6 * float(slope.abs().max())), name


def test_in_float32_the_loss_is_that_of_float64_to_rounding() -> None:
    student, teacher, one = decoder(shape(layers=3), 0), decoder(shape(layers=4), 1), batch()
    options = {"temperature": 2.0, "hidden_weight": 1.0, "hard_weight": 0.5}
    low = Distillation(student, teacher, PAIRS, **options)(one)
    assert low.dtype is torch.float32
    expected = textbook(student.double(), teacher.double(), one, **options)
    assert low.item() == pytest.approx(expected.item(), rel=1e-5)


def test_under_bfloat16_autocast_the_loss_stays_float32_and_close() -> None:
    student, teacher, one = decoder(shape(layers=3), 0, 0.1), decoder(shape(layers=4), 1, 0.1), batch()
    lesson = Distillation(student, teacher, PAIRS, temperature=1.0, hidden_weight=1.0, hard_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        low = lesson(one)
    got, wanted = gradients(student, low), gradients(student, lesson(one))
    assert low.dtype is torch.float32
    assert low.item() == pytest.approx(lesson(one).item(), rel=0.02)
    name = "model.embed_tokens.weight"
    assert F.cosine_similarity(got[name].flatten(), wanted[name].flatten(), dim=0) > 0.99


def test_nobody_learns_from_an_equal() -> None:
    student, teacher = decoder(shape(layers=3)), decoder(shape(layers=3))
    pairs = [(0, 0), (1, 1), (2, 2)]
    lesson = Distillation(student, teacher, pairs, temperature=2.0, hidden_weight=1.0, hard_weight=0.0)
    value = lesson(batch())
    assert value.item() == 0
    assert all((slope == 0).all() for slope in gradients(student, value).values())
    with torch.autocast("cpu", torch.bfloat16):  # training's attention is another kernel there
        assert lesson(batch()).item() < 1e-2


def test_what_does_not_count_changes_nothing_and_a_teacher_gets_no_gradient() -> None:
    student, teacher, one = decoder(shape(layers=3), 0), decoder(shape(layers=4), 1), batch()
    lesson = Distillation(student, teacher, PAIRS, temperature=1.0, hidden_weight=1.0, hard_weight=1.0)
    before = gradients(student, lesson(one))
    changed = {**one, "ids": torch.where(one["documents"] < 0, 77, one["ids"])}
    assert not torch.equal(changed["ids"], one["ids"])
    after = gradients(student, lesson(changed))
    assert all(torch.equal(slope, after[name]) for name, slope in before.items())
    assert all(weight.grad is None for weight in teacher.parameters())
    assert not any(block._forward_hooks for model in (student, teacher) for block in model.model.layers)


def test_another_vocabulary_is_refused_and_another_width_where_states_are_compared() -> None:
    options = {"temperature": 1.0, "hard_weight": 0.0}
    with pytest.raises(UserError, match=r"teacher must have the parent's vocabulary of 100 tokens, got one of 90"):
        Distillation(decoder(), decoder(shape(vocab_size=90)), [], hidden_weight=0.0, **options)
    wide = decoder(shape(hidden_size=64))
    with pytest.raises(UserError, match=r"hidden_weight must be 0 for a teacher of another width, got 0\.5 for widths"):
        Distillation(decoder(), wide, [(0, 0)], hidden_weight=0.5, **options)
    assert Distillation(decoder(), wide, [], hidden_weight=0.0, **options)(batch()) > 0


def test_blocks_are_matched_through_every_pruning_in_between(tmp_path: Path) -> None:
    baseline = write_variant(tmp_path / "baseline", decoder(shape(layers=5)))
    parent: Checkpoint = baseline
    left = list(range(5))
    for name, method in (("a", Depth(1)), ("b", Distill(steps=1, accelerator="cpu", threads=1)), ("c", Depth(2))):
        parent, _ = make_variant(method, parent, text(), name=name, target=tmp_path / name, seed=0)
        for place in reversed(parent.manifest["notes"].get("dropped", [])):
            del left[place]
    assert len(left) == 2
    assert matching(parent, baseline) == list(enumerate(left))
    assert matching(parent, parent) == [(0, 0), (1, 1)]
    middle = matching(parent, ancestor(parent, "b", "teacher"))
    assert [(ours, theirs) for ours, theirs in middle if theirs > 3] == []


def test_blocks_nobody_accounts_for_are_matched_by_their_share_of_the_depth(tmp_path: Path) -> None:
    teacher = write_variant(tmp_path / "baseline", decoder(shape(layers=6)))
    student = write_checkpoint(
        tmp_path / "odd",
        decoder(shape(layers=3)),
        kind="variant",
        name="odd",
        method="own",
        lineage=["baseline", "odd"],
    )
    assert matching(student, teacher) == [(0, 1), (1, 3), (2, 5)]
