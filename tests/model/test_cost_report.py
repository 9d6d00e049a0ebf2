from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hasten import sources
from hasten.artifacts import Json, write_json
from hasten.ceilings import read_rate, record_path
from hasten.errors import UserError
from hasten.hardware import cpu_count, machine
from hasten.model import cost_report
from hasten.model.config_json import to_huggingface
from hasten.model.cost import Cost, cost_of
from hasten.model.cost_report import Floor, floor, floors, main, rate_of, si
from hasten.model.grid import Grid
from hasten.model.layout import Format
from tests.study import CEILINGS
from tests.tiny import lstm_shape, shape

ROOT = Path(__file__).parents[2]
RECORD: Json = {**CEILINGS, "schema": 1, "device": "cpu", "threads": cpu_count(), "attempts": 1, "versions": {}}
FAST: Json = {**RECORD, "matmul_flops_per_second": dict.fromkeys(("float32", "bfloat16", "int8"), 1e15)}
SLOW: Json = {**RECORD, "matmul_flops_per_second": {"float32": 1e6}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder on a machine whose ceilings are known."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    path = record_path(machine()["id"], cpu_count())
    path.parent.mkdir(parents=True)
    write_json(path, RECORD)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    said = capsys.readouterr()
    assert said.err == ""
    return " ".join(said.out.split())


def test_the_module_prints_a_models_cost_and_this_machines_roofline(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hasten.model.cost", "model=1b"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("1,235,814,400", "32.8 kB", "268 MB", "int4", "memory", "tokens/s", "kept in .work/ceilings/"):
        assert words in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == [".work", "conf"]


def test_overrides_change_the_shape_as_in_every_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = 262_668_288 + 8 * (60_817_408 + 2 * 2048) + 2048
    assert f"{parameters:,}" in printed(capsys, "model=1b", "model.layers=8")
    shown = printed(capsys, "model=tiny", "model.vocab_size=8192", "prompt_tokens=100", "group_size=64")
    assert "decoding token 100" in shown
    assert "64 weights share a scale" in shown
    assert "state of 512 tokens" in shown  # its context


def test_a_recurrent_network_has_a_state_that_does_not_grow(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "model=lstm", "model.vocab_size=8192", "model.hidden_size=256", "model.layers=1")
    assert "state of 512 tokens │ 1.02 kB" in shown


def test_a_checkpoint_that_would_be_imported_is_counted_by_its_config_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shape(sliding_window=8, tied_head=False)
    asked: list[Any] = []

    def watched(*arguments: str, wanted: sources.Wanted) -> Path:
        asked.append((*arguments, wanted))
        return resolve(*arguments, wanted=wanted)

    resolve = sources.resolve
    monkeypatch.setattr(sources, "resolve", watched)
    (folder / "theirs").mkdir()
    write_json(folder / "theirs/config.json", to_huggingface(config, bos_id=0, eos_id=1, pad_id=2))
    shown = printed(capsys, "model=huggingface", "model.path=theirs")
    assert f"{Cost(config).parameters:,}" in shown
    assert "state of 64 tokens │ 8.19 kB, the last reads 1.02 kB" in shown
    assert asked == [("theirs", "", "", sources.Wanted.config)]


def test_every_format_has_its_floors() -> None:
    cost = Cost(shape(vocab_size=5000))
    table, notes = floors(cost, 64, 32, FAST)
    assert notes[0].startswith("int8 and int4: 32 weights share a scale of 16 bits")
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["float32", "bfloat16", "int8", "int4"]
    disk = [cost.weight_bytes(held) for held in (Format.floats(4), Format.floats(2), Format.stored(Grid(8, 32)))]
    assert columns[1][:3] == [si(size, "B") for size in disk]
    read = cost.weight_bytes_per_token(Format.packed(Grid(4, 32))) + cost.kv_bytes_read(64)
    assert columns[3][3] == f"{round(read_rate(RECORD, read) / read):,}"
    assert columns[4] == ["memory"] * 4


def test_groups_that_llama_cpp_splits_are_counted_as_it_reads_them() -> None:
    cost = Cost(shape(hidden_size=64, feed_forward_size=128))
    narrow, wide = floors(cost, 64, 32, FAST), floors(cost, 64, 64, FAST)
    assert list(wide[0].columns[2].cells) == list(narrow[0].columns[2].cells)
    assert "(32 on disk), repeated every 32 as llama.cpp does, " in wide[1][0]
    assert "repeated" not in narrow[1][0]


def test_the_prefill_of_an_lstm_reads_its_encoder_too() -> None:
    cost = cost_of(lstm_shape())
    table, _ = floors(cost, 16, 32, FAST)
    read = cost.prefill_weight_bytes() + cost.kv_bytes(16)
    assert next(iter(table.columns[5].cells)) == si(read / read_rate(FAST, read), "s")
    assert read > cost.weight_bytes_per_token() + cost.kv_bytes(16)


def test_the_longer_of_reading_and_computing_binds() -> None:
    assert floor(2**20, 1, 1e6, RECORD) == Floor(2**20 / 1.8e11, "memory")
    assert floor(2**20, 10**6, 1e6, RECORD) == Floor(1.0, "compute")
    assert floor(2**20, 10**6, None, RECORD) == Floor(2**20 / 1.8e11, None)
    table, _ = floors(Cost(shape()), 64, 32, SLOW)
    assert list(table.columns[6].cells) == ["compute"] * 4


def test_where_a_format_has_no_rate_that_of_float32_stands_in_and_it_is_said() -> None:
    assert rate_of("bfloat16", RECORD) == (7e11, "")
    assert rate_of("int8", RECORD) == (2.1e11, "int8: no kernel; the rate of float32 stands in for it.")
    nothing: Json = {**RECORD, "matmul_flops_per_second": {}, "why": {}}
    rate, note = rate_of("int8", nothing)
    assert (rate, note) == (None, "int8: no ceiling is known for int8; what arithmetic takes is left out.")
    table, _ = floors(Cost(shape()), 64, 32, nothing)
    assert list(table.columns[4].cells) == ["?"] * 4


def test_a_grid_that_does_not_fit_the_model_leaves_its_row_empty_and_says_why() -> None:
    table, notes = floors(Cost(shape()), 64, 48, RECORD)
    assert list(table.columns[1].cells)[2:] == ["-", "-"]
    assert "int4: group_size must divide every matrix's input width, got 48 for 32." in notes


def test_it_says_so_when_the_ceilings_are_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost_report, "ceilings", lambda threads, device, cores: RECORD)
    _, origin = cost_report.ceilings_here("cpu")
    assert "measured now, kept in " in origin
    assert capsys.readouterr().err == "measuring how fast this machine reads and multiplies, about 20 s\n"

    def failing(threads: int, device: str, cores: object) -> Json:
        raise RuntimeError("the ceilings could not be measured: no such device")

    monkeypatch.setattr(cost_report, "ceilings", failing)
    with pytest.raises(UserError, match="no such device"):
        cost_report.ceilings_here("cuda:7")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=nope"], "nope"),
        (["model=1b", "model.depth=3"], "depth"),
        (["model=1b", "model.layers=0"], "model.layers must be at least 1, got 0"),
        (["model=1b", "model.layers=many"], "many"),
        (["model=tiny"], "model.vocab_size must be given here"),
        (["prompt_tokens=9000"], "prompt_tokens must fit model.context (8192), got 9000"),
        (["prompt_tokens=-1"], "prompt_tokens must be 0"),
        (["group_size=-1"], "group_size must be 0"),
        (["--help"], "options are model=NAME"),
        (["1b"], "got '1b'"),
        (["+threads=2"], "threads"),
        (["model=huggingface", "model.path=nowhere"], "nowhere"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("cost: ")
    assert words in said.err
    assert len(said.err.splitlines()) == 1


def test_without_configs_it_is_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["model=1b"])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1_235_814_400, "1.24 GB"), (0.32, "320 mB"), (4.2e-5, "42 µB")],
)
def test_quantities_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert si(value, "B") == text
