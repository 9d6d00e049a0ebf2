import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation import energy
from tests.evaluation.trees import rapl


@given(limit=st.integers(1, 2**60), data=st.data())
def test_a_counter_that_starts_again_loses_nothing(limit, data):
    before = data.draw(st.integers(0, limit))
    used = data.draw(st.integers(0, limit))
    assert energy.spent(before, (before + used) % (limit + 1), limit) == used


def test_packages_alone_are_counted_each_once(tmp_path):
    rapl(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    rapl(tmp_path, "intel-rapl:0:0", "core", 3_000_000)
    rapl(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    rapl(tmp_path, "intel-rapl:2", "psys", 99_000_000)
    rapl(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    before = energy.read(tmp_path)
    assert before == energy.Energy({"package-0": 5_000_000, "package-1": 7_000_000})
    rapl(tmp_path, "intel-rapl:0", "package-0", 6_500_000)
    rapl(tmp_path, "intel-rapl:1", "package-1", 7_250_000)
    assert energy.joules(before, energy.read(tmp_path), 1.0, tmp_path) == (1.75, "RAPL package-0 package-1", None)


def test_a_counter_that_started_again_is_continued(tmp_path):
    rapl(tmp_path, "intel-rapl:0", "package-0", 9_999_999_999, limit=10_000_000_000)
    before = energy.read(tmp_path)
    rapl(tmp_path, "intel-rapl:0", "package-0", 999_999, limit=10_000_000_000)
    joules, _, _ = energy.joules(before, energy.read(tmp_path), 1.0, tmp_path)
    assert joules == pytest.approx(1.000001)


def test_a_time_in_which_the_counter_could_start_again_twice_is_unknown(tmp_path):
    rapl(tmp_path, "intel-rapl:0", "package-0", 5, limit=65_000_000_000)
    reading = energy.read(tmp_path)
    joules, source, why = energy.joules(reading, reading, 70.0, tmp_path)
    assert (joules, source) == (None, None)
    assert "more than once in 70 s" in why


def test_without_a_counter_energy_is_null_with_the_reason(tmp_path):
    reading = energy.read(tmp_path)
    assert energy.joules(reading, reading, 1.0, tmp_path) == (None, None, energy.NO_RAPL)


def test_a_counter_that_may_not_be_read_is_null_with_the_reason(tmp_path):
    rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    before = energy.read(tmp_path)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    joules, _, why = energy.joules(before, energy.read(tmp_path), 1.0, tmp_path)
    assert joules is None
    assert "could not be read: No such file" in why


def test_a_domain_that_is_not_as_documented_is_left_out(tmp_path):
    rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    (tmp_path / "sys/class/powercap/intel-rapl:0/max_energy_range_uj").write_text("?")
    assert energy.domains(tmp_path) == ()
