import sys
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation import gpu
from hasten.evaluation.gpu import HINT, Gpus, slowdowns, visible_entry

OWN, STRANGER = 100, 200


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """Some GPUs: dictionaries of name, uuid, pids {pid: bytes}, throttle, clock, energy. A missing key is refused."""

    NVML_CLOCK_SM = 1
    NVMLError = NVMLError

    def __init__(self, *cards: dict) -> None:
        super().__init__("pynvml")
        self.cards = cards

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetCount(self):  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return self.cards[index]

    def _get(self, card, key):
        if key not in card:
            raise NVMLError("Not Supported")
        return card[key]

    def nvmlDeviceGetName(self, card):  # noqa: N802
        return card.get("name", "H100")

    def nvmlDeviceGetUUID(self, card):  # noqa: N802
        return self._get(card, "uuid")

    def nvmlDeviceGetComputeRunningProcesses(self, card):  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self._get(card, "pids").items()]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card):  # noqa: N802
        return self._get(card, "throttle")

    def nvmlDeviceGetClockInfo(self, card, kind):  # noqa: N802
        assert kind == self.NVML_CLOCK_SM
        return self._get(card, "clock")

    def nvmlDeviceGetTotalEnergyConsumption(self, card):  # noqa: N802
        return self._get(card, "energy")


def card(**changes) -> dict:
    return {"uuid": "GPU-1", "pids": {OWN: 5}, "throttle": 0, "clock": 1980, "energy": 1000} | changes


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    gpu._gpus.cache_clear()
    yield
    gpu._gpus.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    def install(*cards):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*cards))

    return install


def test_an_engine_on_the_processor_has_no_gpus(machine):
    machine(card())
    assert Gpus.of(["cpu"]) is None


def test_everything_that_nvml_tells_is_read(machine):
    machine(card(pids={OWN: 5, STRANGER: 7}, throttle=0x40 | 0x4))
    reading = Gpus.of(["cuda:0"]).read({OWN})
    assert (reading.others, reading.throttle, reading.clock_mhz, reading.millijoules) == (
        1,
        ("heat (hardware)",),
        1980.0,
        1000,
    )
    assert reading.why == {}


def test_several_gpus_add_up(machine):
    machine(card(pids={OWN: 5, STRANGER: 7}), card(pids={OWN: 6, STRANGER: 1}, throttle=0x80, clock=1200, energy=500))
    gpus = Gpus.of(["cuda:0", "cuda:1"])
    reading = gpus.read({OWN})
    assert (reading.others, reading.throttle, reading.clock_mhz, reading.millijoules) == (
        1,
        ("power brake",),
        1200,
        1500,
    )
    assert gpus.memory_bytes({OWN}) == (11, None)


def test_a_process_that_nvml_does_not_list_cannot_tell_its_company(machine):
    """In a container the ids are the host's."""
    machine(card(pids={STRANGER: 7}))
    reading = Gpus.of(["cuda"]).read({OWN})
    assert reading.others is None
    assert "not among those listed" in reading.why["gpu_cotenants"]
    assert reading.clock_mhz == 1980.0


@pytest.mark.parametrize("key", ["pids", "throttle", "clock", "energy"])
def test_what_a_gpu_does_not_support_is_null_with_the_reason(machine, key):
    unsupported = card()
    del unsupported[key]
    machine(unsupported)
    reading = Gpus.of(["cuda:0"]).read({OWN})
    figures = {
        "pids": ("gpu_cotenants", reading.others),
        "throttle": ("gpu_throttle", reading.throttle),
        "clock": ("gpu_clock_mhz", reading.clock_mhz),
        "energy": ("energy", reading.millijoules),
    }
    name, value = figures[key]
    assert value is None
    assert reading.why == {name: "NVML: Not Supported"}


def test_without_the_package_the_hint_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus = Gpus.of(["cuda:0"])
    reading = gpus.read({OWN})
    assert (reading.others, reading.throttle, reading.clock_mhz, reading.millijoules) == (None, None, None, None)
    assert set(reading.why.values()) == {HINT}
    assert 'pip install "hasten[gpu]"' in HINT
    assert gpus.memory_bytes({OWN}) == (None, HINT)


def test_memory_that_a_driver_hides_is_unknown(machine):
    machine(card(pids={OWN: None}))
    held, why = Gpus.of(["cuda:0"]).memory_bytes({OWN})
    assert held is None
    assert "does not tell a process' memory" in why


@pytest.mark.parametrize(
    ("visible", "device", "energy"),
    [
        (None, "cuda:1", 2),
        ("2,0", "cuda:0", 3),
        ("2,0", "cuda:1", 1),
        ("GPU-bb", "cuda:0", 2),
        (" GPU-cc , 1", "cuda", 3),
    ],
)
def test_visible_devices_are_followed(machine, monkeypatch, visible, device, energy):
    machine(*(card(uuid=f"GPU-{name}", energy=number) for number, name in enumerate(("aa1", "bb2", "cc3"), start=1)))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Gpus.of([device]).read({OWN}).millijoules == energy


@pytest.mark.parametrize(
    ("visible", "device", "complaint"),
    [
        ("0", "cuda:1", "there is no cuda:1"),
        ("-1,0", "cuda:0", "there is no cuda:0"),
        ("", "cuda:0", "there is no cuda:0"),
        ("GPU-", "cuda:0", "2 GPUs match"),
        ("GPU-dd", "cuda:0", "0 GPUs match"),
        ("MIG-77", "cuda:0", "part of a GPU"),
        (None, "cuda:x", "names no CUDA device"),
    ],
)
def test_a_device_that_cannot_be_told_is_unknown(machine, monkeypatch, visible, device, complaint):
    machine(card(uuid="GPU-aa"), card(uuid="GPU-bb"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reading = Gpus.of([device]).read({OWN})
    assert reading.millijoules is None
    assert complaint in reading.why["energy"]


def test_different_gpus_need_an_order_to_be_told_apart(machine, monkeypatch):
    machine(card(name="H100"), card(name="T4", energy=7))
    assert "CUDA_DEVICE_ORDER" in Gpus.of(["cuda:1"]).read({OWN}).why["energy"]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert Gpus.of(["cuda:1"]).read({OWN}).millijoules == 7


@given(st.lists(st.integers(0, 2**12), max_size=4))
def test_only_heat_and_hardware_slow_it_down(masks):
    named = slowdowns(masks)
    assert bool(named) == any(mask & (0x8 | 0x20 | 0x40 | 0x80) for mask in masks)
    assert len(named) == len(set(named))


@given(
    visible=st.none() | st.text("0123456789,GPU-MIG abc", max_size=30), index=st.integers(0, 9), count=st.integers(0, 8)
)
def test_any_list_of_devices_is_read_or_refused(visible, index, count):
    try:
        entry = visible_entry(visible, index, count)
    except LookupError:
        return
    assert entry.startswith(("GPU-", "MIG-")) or int(entry) < count
