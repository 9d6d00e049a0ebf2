from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.tracking.journal import entries, note


@settings(max_examples=60)
@given(said=st.lists(st.text(max_size=20), min_size=1, max_size=6), keep=st.floats(0, 1))
def test_a_journal_cut_anywhere_loses_the_line_it_was_cut_in_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, said: list[str], keep: float
) -> None:
    journal = tmp_path_factory.mktemp("journal") / "runs" / "key.jsonl"
    assert list(entries(journal)) == []
    for content in said:
        note(journal, {"text": content})
    whole = journal.read_bytes()
    cut = whole[: round(keep * len(whole))]
    journal.write_bytes(cut)
    ends = itertools.accumulate(1 + len(line) for line in whole.split(b"\n")[1:])
    note(journal, {"text": "after"})
    kept = said[: sum(end <= len(cut) for end in ends)]
    assert [entry["text"] for entry in entries(journal)] == [*kept, "after"]
