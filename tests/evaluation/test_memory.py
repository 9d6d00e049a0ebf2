import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation import memory


@given(peak=st.none() | st.integers(0, 2**50), kv=st.none() | st.integers(0, 2**50))
def test_the_peak_without_the_cache_is_a_number_or_has_a_reason(peak, kv):
    rest, why = memory.apart_from_kv(peak, kv)
    assert (rest is None) == (why is not None)
    if rest is not None:
        assert rest >= 0
        assert rest + kv == peak


def test_a_cache_larger_than_the_peak_cannot_be_told_apart():
    rest, why = memory.apart_from_kv(100, 101)
    assert rest is None
    assert "not all of it was touched" in why


def gpus_that_hold(monkeypatch, held, why=None):
    fake = SimpleNamespace(memory_bytes=lambda own: (held, why))
    monkeypatch.setattr(memory.Gpus, "of", lambda devices: fake if devices else None)


def torch_that_allocated(monkeypatch, allocated, *, initialised=True):
    cuda = SimpleNamespace(is_initialized=lambda: initialised, max_memory_allocated=lambda device: allocated[device])
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_an_engine_on_the_processor_holds_no_gpu_memory():
    assert memory.gpu_bytes(["cpu"]) == memory.GpuMemory(None, why="no GPU is used")


def test_torch_tells_the_peak_of_what_it_gave_out(monkeypatch):
    gpus_that_hold(monkeypatch, 99)
    torch_that_allocated(monkeypatch, {"cuda:0": 5, "cuda:1": 7})
    reading = memory.gpu_bytes(["cuda:0", "cuda:1", "cpu"])
    assert reading.bytes == 12
    assert "max_memory_allocated" in reading.source


@pytest.mark.parametrize(("allocated", "initialised"), [(0, True), (5, False)])
def test_nvml_tells_what_is_held_where_torch_is_not_the_engine(monkeypatch, allocated, initialised):
    gpus_that_hold(monkeypatch, 99)
    torch_that_allocated(monkeypatch, {"cuda:0": allocated}, initialised=initialised)
    reading = memory.gpu_bytes(["cuda:0"])
    assert reading.bytes == 99
    assert "held after the last request" in reading.source


def test_gpu_memory_that_nobody_tells_is_null_with_the_reason(monkeypatch):
    gpus_that_hold(monkeypatch, None, "NVML: Not Supported")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert memory.gpu_bytes(["cuda:0"]) == memory.GpuMemory(None, None, "NVML: Not Supported")
