from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation import throttling
from hasten.evaluation.throttling import clock_mhz, increase, parse_cpuinfo, quota_seconds, read
from tests.evaluation.trees import write

V2 = "nr_periods 12\nnr_throttled 3\nthrottled_usec {}\n"
V1 = "nr_periods 12\nnr_throttled 3\nthrottled_time {}\n"


@given(st.integers(0, 10**15))
def test_both_versions_count_the_same_in_their_own_units(microseconds):
    assert quota_seconds("usage_usec 5\n" + V2.format(microseconds)) == pytest.approx(microseconds / 1e6)
    assert quota_seconds(V1.format(microseconds * 1000)) == pytest.approx(microseconds / 1e6)


@given(st.text())
def test_any_text_of_a_counter_is_read_or_refused(text):
    assert quota_seconds(text) is None or "throttled" in text
    assert isinstance(parse_cpuinfo(text), dict)


def test_version_2_counts_every_group_that_can_hold_it_back(tmp_path):
    files = {
        "proc/self/cgroup": "0::/user.slice/job.scope\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 9\nuser_usec 5\n",
        "sys/fs/cgroup/user.slice/cpu.stat": V2.format(1_500_000),
        "sys/fs/cgroup/user.slice/job.scope/cpu.stat": V2.format(500_000),
    }
    assert read(frozenset({0}), write(tmp_path, files)).quota == (2.0, None)


def test_a_container_that_cannot_see_its_own_path_is_counted_at_its_root(tmp_path):
    files = {"proc/self/cgroup": "0::/../../elsewhere\n", "sys/fs/cgroup/cpu.stat": V2.format(250_000)}
    assert read(frozenset({0}), write(tmp_path, files)).quota == (0.25, None)


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_version_1_is_found_by_its_controller(tmp_path, mount):
    files = {
        "proc/self/cgroup": "9:memory:/x\n3:cpu,cpuacct:/docker/1f\n1:cpuset:/\n0::/docker/1f\n",
        f"sys/fs/cgroup/{mount}/docker/1f/cpu.stat": V1.format(3_000_000_000),
    }
    assert read(frozenset({0}), write(tmp_path, files)).quota == (3.0, None)


def test_without_a_quota_counter_it_is_unknown(tmp_path):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.stat": "usage_usec 9\n"}
    assert read(frozenset({0}), write(tmp_path, files)).quota == (None, throttling.NO_QUOTA)
    assert read(frozenset({0}), tmp_path / "none").quota == (None, throttling.NO_QUOTA)


def processor(root: Path, number: int, package: int, core: int, core_count: int, package_count: int) -> None:
    base = f"sys/devices/system/cpu/cpu{number}"
    write(
        root,
        {
            f"{base}/topology/physical_package_id": f"{package}\n",
            f"{base}/topology/core_id": f"{core}\n",
            f"{base}/thermal_throttle/core_throttle_count": f"{core_count}\n",
            f"{base}/thermal_throttle/package_throttle_count": f"{package_count}\n",
        },
    )


def test_hyperthreads_and_packages_are_counted_once(tmp_path):
    for number, package, core, core_count in ((0, 0, 0, 5), (1, 0, 1, 2), (2, 0, 0, 5), (3, 1, 0, 70)):
        processor(tmp_path, number, package, core, core_count, package_count=100 * (package + 1))
    assert read(frozenset({0, 1, 2}), tmp_path).thermal == (5 + 2 + 100, None)
    assert read(frozenset({0, 1, 2, 3}), tmp_path).thermal == (5 + 2 + 100 + 70 + 200, None)


def test_without_thermal_counters_they_are_unknown(tmp_path):
    assert read(frozenset({0}), tmp_path).thermal == (None, throttling.NO_THERMAL)


def test_a_counter_that_may_not_be_read_is_unknown(tmp_path, monkeypatch):
    processor(tmp_path, 0, 0, 0, 1, 1)
    assert read(frozenset({0}), tmp_path).thermal == (2, None)
    (tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count").unlink()
    value, why = read(frozenset({0}), tmp_path).thermal
    assert value is None
    assert "core_throttle_count could not be read" in why


def test_only_what_was_added_counts():
    assert increase((3.0, None), (4.5, None)) == (1.5, None)
    assert increase((None, "no file"), (None, "no file")) == (None, "no file")
    assert increase((None, "no file"), (1.0, None)) == (None, "no file")
    value, why = increase((3.0, None), (1.0, None))
    assert value is None
    assert "reset" in why


def test_the_clock_is_the_mean_of_the_watched_cores(tmp_path):
    for core, kilohertz in enumerate((1_000_000, 3_000_000, 9_000_000)):
        write(tmp_path, {f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": f"{kilohertz}\n"})
    assert clock_mhz({0, 1}, tmp_path) == (2000.0, None)


def test_without_cpufreq_the_clock_comes_from_cpuinfo(tmp_path):
    text = "processor\t: 0\ncpu MHz\t\t: 2000.5\n\nprocessor\t: 1\ncpu MHz\t\t: 3000.5\n\nprocessor\t: 2\nmodel\t: 1\n"
    assert parse_cpuinfo(text) == {0: 2000.5, 1: 3000.5}
    write(tmp_path, {"proc/cpuinfo": text})
    assert clock_mhz({1, 2}, tmp_path) == (3000.5, None)
    assert clock_mhz({2}, tmp_path) == (None, throttling.NO_CLOCK)


@given(st.dictionaries(st.integers(0, 500), st.floats(1, 9999), max_size=20))
def test_clocks_of_any_machine_are_parsed(clocks):
    text = "".join(f"processor\t: {core}\nflags\t: a b\ncpu MHz\t\t: {mhz:.3f}\n\n" for core, mhz in clocks.items())
    assert parse_cpuinfo(text) == pytest.approx(clocks, abs=1e-3)
