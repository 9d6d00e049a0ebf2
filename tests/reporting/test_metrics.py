"""The numbers for `dvc metrics show`."""

from __future__ import annotations

import json

from hasten.reporting.metrics import metrics
from tests.reporting.conftest import Study


def test_they_hold_the_verdict_in_short(study: Study) -> None:
    found = metrics(study.measurements, study.verdict)
    json.dumps(found, allow_nan=False)
    assert found["qa"]["champion"] == "int8@llamacpp" and found["qa"]["decision"] == "non-inferior"
    assert found["qa"]["speedup_low"] < found["qa"]["speedup"] < found["qa"]["speedup_high"]
    assert set(found["baseline_accuracy"]) == {"question_type", "reply_choice", "sentiment_en", "sentiment_zh"}
    assert found["trials"] == {"failed": 1, "ok": 9, "refused": 1}


def test_what_is_not_known_is_left_out(baseless: Study, kept: Study) -> None:
    assert metrics(baseless.measurements, baseless.verdict) == {"qa": {}, "trials": {"ok": 2}}
    undecided = metrics(kept.measurements, kept.verdict)["qa"]
    assert undecided["speedup"] == 1.0 and "speedup_low" not in undecided and undecided["needs_items"] > 0
