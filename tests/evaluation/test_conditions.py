import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation import contention, gpu
from hasten.evaluation.conditions import Conditions, Repetition, Watch
from hasten.evaluation.gpu import GpuReading
from hasten.scenario.timing import Sample
from tests.evaluation.trees import core, process, rapl, stat, write
from tests.evaluation.trials import wait_until

numbers = st.floats(0, 1e6)
anything = st.builds(
    Conditions,
    seconds=st.floats(0.001, 1e4),
    cores=st.none() | st.integers(1, 512),
    contention_cores=st.none() | numbers,
    steal_cores=st.none() | numbers,
    throttle_events=st.none() | st.integers(0, 1000),
    quota_throttled_seconds=st.none() | numbers,
    clock_mhz=st.none() | numbers,
    gpu_cotenants=st.none() | st.integers(0, 9),
    gpu_throttle=st.none() | st.lists(st.sampled_from(["heat", "power brake"]), unique=True).map(tuple),
    gpu_clock_mhz=st.none() | numbers,
    energy_joules=st.none() | numbers,
    energy_source=st.none() | st.text(),
    why=st.dictionaries(st.text(), st.text()),
)


@given(anything, st.integers(1, 9))
def test_a_repetition_survives_json(conditions, attempts):
    repetition = Repetition([Sample(0.1, 0.01, 0.2, 8, 11, 0.2)], conditions, attempts)
    assert Repetition.from_json(json.loads(json.dumps(repetition.to_json()))) == repetition


@given(anything)
def test_quiet_disturbance_and_words_agree(conditions):
    assert conditions.quiet == (not conditions.disturbances)
    assert conditions.disturbance >= 0
    if not conditions.quiet:
        assert conditions.disturbance > 1


def test_what_is_unknown_is_not_noise():
    assert Conditions(1.0).quiet
    assert Conditions(1.0).disturbance == 0


@pytest.mark.parametrize(
    ("conditions", "quiet"),
    [
        (Conditions(2.0, cores=2, contention_cores=0.1), True),
        (Conditions(2.0, cores=2, contention_cores=0.11), False),
        (Conditions(2.0, cores=2, steal_cores=0.11), False),
        # Two ticks in a short time are what reading whole ticks can make of nothing; three on one core are not.
        (Conditions(0.1, cores=1, contention_cores=0.2), True),
        (Conditions(0.1, cores=1, contention_cores=0.3), False),
        # The more cores, the more ticks are cut off.
        (Conditions(0.1, cores=4, contention_cores=0.4), True),
        (Conditions(0.1, cores=4, contention_cores=0.5), False),
        (Conditions(2.0, throttle_events=1), False),
        (Conditions(2.0, throttle_events=0), True),
        (Conditions(2.0, quota_throttled_seconds=0.02), True),
        (Conditions(2.0, quota_throttled_seconds=0.03), False),
        (Conditions(2.0, gpu_cotenants=1), False),
        (Conditions(2.0, gpu_throttle=("power brake",)), False),
        (Conditions(2.0, gpu_throttle=()), True),
        (Conditions(2.0, clock_mhz=800.0, gpu_clock_mhz=300.0), True),
    ],
)
def test_quiet_is_when_nothing_disturbed(conditions, quiet):
    assert conditions.quiet is quiet


def test_the_least_disturbed_attempt_can_be_told():
    attempts = [Conditions(1.0, contention_cores=cores) for cores in (0.9, 0.2, 0.5)]
    assert min(attempts, key=lambda one: one.disturbance).contention_cores == 0.2


@pytest.fixture
def clock(monkeypatch):
    """Ten seconds pass in every watch; this process is number 10 and its times are those of its files."""
    now = iter([100.0, 110.0])
    monkeypatch.setattr(contention, "since_boot", lambda: 0.0)
    monkeypatch.setattr(contention, "cpu_clock", lambda pid: None)
    monkeypatch.setattr(contention, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(os, "getpid", lambda: 10)


def files(*, busy: int, steal: int, ran: int, throttled: int, heat: int) -> dict[str, object]:
    return {
        "proc/stat": stat(core(busy, steal), core(10**9)),
        "proc/10/stat": process(10, 1, ran=ran),
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/cpu.stat": f"nr_throttled 1\nthrottled_usec {throttled}\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": heat,
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 2_500_000,
    }


def watched(tmp_path: Path, devices: tuple[str, ...] = ("cpu",)) -> Conditions:
    """Of core 0: busy 8 s (5 s of them own), stolen 1 s, held back 0.5 s, throttled twice, 40 J."""
    write(tmp_path, files(busy=0, steal=0, ran=0, throttled=0, heat=3))
    rapl(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    with Watch(devices, cores={0}, system=tmp_path) as watch:
        write(tmp_path, files(busy=800, steal=100, ran=500, throttled=500_000, heat=5))
        rapl(tmp_path, "intel-rapl:0", "package-0", 41_000_000)
    return watch.conditions


def test_a_watch_keeps_what_was_added_meanwhile(tmp_path, clock):
    conditions = watched(tmp_path)
    assert (conditions.seconds, conditions.cores) == (10.0, 1)
    assert conditions.contention_cores == pytest.approx(0.3)
    assert conditions.steal_cores == pytest.approx(0.1)
    assert conditions.throttle_events == 2
    assert conditions.quota_throttled_seconds == pytest.approx(0.5)
    assert conditions.clock_mhz == 2500.0
    assert (conditions.energy_joules, conditions.energy_source) == (40.0, "RAPL package-0")
    assert set(conditions.why) == {"gpu_cotenants", "gpu_throttle", "gpu_clock_mhz"}
    assert not conditions.quiet
    assert len(conditions.disturbances) == 3


class FakeGpus:
    def __init__(self, *readings: GpuReading) -> None:
        self.readings = iter(readings)

    def read(self, own: object) -> GpuReading:
        assert 10 in own  # type: ignore[operator]
        return next(self.readings)


def test_gpus_are_read_before_and_after(tmp_path, clock, monkeypatch):
    before, after = GpuReading(1, ("power brake",), 1000, 5_000), GpuReading(0, (), 1900, 65_000)
    monkeypatch.setattr(gpu.Gpus, "of", lambda devices: FakeGpus(before, after))
    conditions = watched(tmp_path, ("cuda:0",))
    assert conditions.gpu_cotenants == 1
    assert conditions.gpu_throttle == ("power brake",)
    assert conditions.gpu_clock_mhz == 1900
    assert (conditions.energy_joules, conditions.energy_source) == (100.0, "RAPL package-0 + NVML")
    assert conditions.why == {}


def test_a_gpu_without_an_energy_counter_makes_energy_null(tmp_path, clock, monkeypatch):
    """The processor's joules alone would pass for the whole."""
    reading = GpuReading(0, (), 1900, None, {"energy": "NVML: Not Supported"})
    monkeypatch.setattr(gpu.Gpus, "of", lambda devices: FakeGpus(reading, reading))
    conditions = watched(tmp_path, ("cuda:0",))
    assert (conditions.energy_joules, conditions.energy_source) == (None, None)
    assert conditions.why == {"energy_joules": "NVML: Not Supported"}


def test_a_machine_that_tells_nothing_gives_reasons_not_zeros(tmp_path):
    with Watch(cores={0}, system=tmp_path) as watch:
        time.sleep(0.01)
    conditions = watch.conditions
    assert conditions.seconds >= 0.01
    known = {name for name, value in conditions.to_json().items() if value is not None}
    assert known == {"seconds", "cores", "why"}
    assert set(conditions.why) == {name for name in conditions.to_json() if name not in known} - {"energy_source"}


def test_conditions_are_kept_when_what_was_watched_fails(tmp_path):
    watch = Watch(cores={0}, system=tmp_path)
    with pytest.raises(ValueError, match="x"), watch:
        raise ValueError("x")
    assert watch.conditions.seconds > 0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux' /proc")
def test_a_hog_of_somebody_else_is_seen():
    """It is started by a process that has ended, so it is not of this family."""
    hog = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    start = f"subprocess.Popen([sys.executable, '-c', {hog!r}], stdout=subprocess.DEVNULL)"
    script = f"import subprocess, sys\nprint({start}.pid)"
    started = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    pid = int(started.stdout)
    try:
        with Watch() as watch:
            begun = contention.cpu_clock(pid) or 0.0
            wait_until(lambda: (contention.cpu_clock(pid) or 0.0) - begun > 0.5)
        cores = watch.conditions.contention_cores
        assert cores is None or cores * watch.conditions.seconds > 0.4
    finally:
        os.kill(pid, 9)


def test_a_watch_costs_little():
    """It wraps passes of 0.6 s; 1 to 2 ms here, and the limit leaves room for a slow machine."""
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        with Watch():
            pass
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.03
