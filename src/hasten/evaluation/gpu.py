"""What NVIDIA's management library (NVML) tells of the GPUs a trial uses: company, clocks, energy, memory.

Needs the package `nvidia-ml-py` (`pip install "hasten[gpu]"`); without it, or without a driver, every
figure is null with that reason. Nothing here imports torch.

Devices are named as torch names them (`cuda:1`): an index into CUDA_VISIBLE_DEVICES, whose entries are
indices or (the beginnings of) UUIDs. CUDA numbers GPUs fastest first, NVML by their place on the bus;
the two agree where all GPUs are alike or CUDA_DEVICE_ORDER=PCI_BUS_ID.
Source: https://docs.nvidia.com/deploy/nvml-api
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

SLOWDOWNS = {0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Reasons for a lower clock that count as a disturbance (nvmlClocksThrottleReason*).

Not among them: idle (0x1), clocks set by the user (0x2, 0x10, 0x100) and the power cap (0x4), at which a loaded GPU
runs as a rule."""
HINT = 'NVML is not installed (pip install "hasten[gpu]")'


@dataclass(frozen=True)
class GpuReading:
    """What could be read at one moment, summed over the devices; None otherwise, with the reason in `why`.

    others: processes with a context on them that are not ours. throttle: reasons in force. clock_mhz: the slowest
    device's. millijoules: of the whole devices since the driver was loaded.
    """

    others: int | None = None
    throttle: tuple[str, ...] | None = None
    clock_mhz: float | None = None
    millijoules: int | None = None
    why: dict[str, str] = field(default_factory=dict)


class Gpus:
    """The GPUs behind some torch device names. why: the reason if NVML cannot tell of them."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self.why: str | None = None
        self._handles: list[Any] = []
        try:
            import pynvml
        except ImportError:
            self.why = HINT
            return
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [_handle(pynvml, index) for index in map(_index, self.devices)]
        except (pynvml.NVMLError, LookupError) as error:
            self.why = f"NVML: {error.args[0] if isinstance(error, LookupError) else error}"

    @staticmethod
    def of(devices: Sequence[str]) -> Gpus | None:
        """The GPUs among an engine's devices; None if it uses none. Found once per process."""
        return _gpus(tuple(device for device in devices if device.startswith("cuda")), _environment())

    def read(self, own: Collection[int]) -> GpuReading:
        """Everything, now. own: ids of our processes."""
        if self.why is not None:
            return GpuReading(why=dict.fromkeys(("gpu_cotenants", "gpu_throttle", "gpu_clock_mhz", "energy"), self.why))
        why: dict[str, str] = {}
        others = self._ask("gpu_cotenants", lambda handle: self._others(handle, own), why)
        throttle = self._ask("gpu_throttle", self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, why)
        clocks = self._ask(
            "gpu_clock_mhz", lambda handle: self._nvml.nvmlDeviceGetClockInfo(handle, self._nvml.NVML_CLOCK_SM), why
        )
        energy = self._ask("energy", self._nvml.nvmlDeviceGetTotalEnergyConsumption, why)
        return GpuReading(
            others=None if others is None else len(set().union(*others)),
            throttle=None if throttle is None else slowdowns(throttle),
            clock_mhz=None if clocks is None else float(min(clocks)),
            millijoules=None if energy is None else sum(energy),
            why=why,
        )

    def memory_bytes(self, own: Collection[int]) -> tuple[int | None, str | None]:
        """(memory that our processes hold on these GPUs now, None), or (None, why not)."""
        if self.why is not None:
            return None, self.why
        why: dict[str, str] = {}
        held = self._ask("memory", lambda handle: self._held(handle, own), why)
        return (None, why["memory"]) if held is None else (sum(held), None)

    def _ask(self, what: str, question: Callable[[Any], Any], why: dict[str, str]) -> list[Any] | None:
        """The answer of every device, or None and a reason if one of them does not answer."""
        try:
            return [question(handle) for handle in self._handles]
        except (self._nvml.NVMLError, LookupError) as error:
            why[what] = f"NVML: {error.args[0] if isinstance(error, LookupError) else error}"
            return None

    def _others(self, handle: Any, own: Collection[int]) -> set[int]:
        listed = {process.pid for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        if listed.isdisjoint(own):
            raise LookupError(_STRANGERS)
        return listed.difference(own)

    def _held(self, handle: Any, own: Collection[int]) -> int:
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        held = [process.usedGpuMemory for process in processes if process.pid in own]
        if not held:
            raise LookupError(_STRANGERS)
        if None in held:
            raise LookupError("this driver does not tell a process' memory")
        return sum(held)


_STRANGERS = "this process is not among those listed on the GPU (a container lists others' ids, or none)"


def slowdowns(masks: Sequence[int]) -> tuple[str, ...]:
    """The names of the disturbing reasons in any of the bit masks."""
    return tuple(name for bit, name in SLOWDOWNS.items() if any(mask & bit for mask in masks))


def _environment() -> tuple[str | None, str | None]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")


@lru_cache(maxsize=16)
def _gpus(devices: tuple[str, ...], environment: tuple[str | None, str | None]) -> Gpus | None:
    return Gpus(devices) if devices else None


def _index(device: str) -> int:
    """`cuda` is `cuda:0`."""
    _, _, number = device.partition(":")
    if number and not number.isdigit():
        raise LookupError(f"{device} names no CUDA device")
    return int(number or 0)


def _handle(nvml: Any, index: int) -> Any:
    """NVML's handle of a torch device index. Raises `LookupError` if it cannot be told which GPU that is."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    visible, order = _environment()
    entry = visible_entry(visible, index, len(handles))
    if entry.isdigit():
        names = {nvml.nvmlDeviceGetName(handle) for handle in handles}
        if len(names) > 1 and order != "PCI_BUS_ID":
            raise LookupError("GPUs differ, so CUDA may number them otherwise: set CUDA_DEVICE_ORDER=PCI_BUS_ID")
        return handles[int(entry)]
    if entry.startswith("MIG"):
        raise LookupError(f"{entry} is a part of a GPU (MIG), whose counters are the whole GPU's")
    matching = [handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(entry)]
    if len(matching) != 1:
        raise LookupError(f"CUDA_VISIBLE_DEVICES names {entry}, which {len(matching)} GPUs match")
    return matching[0]


def visible_entry(visible: str | None, index: int, count: int) -> str:
    """What a torch device index stands for: a GPU's number, or the beginning of its UUID.

    visible: CUDA_VISIBLE_DEVICES, whose first invalid entry ends the list, as CUDA reads it. count: GPUs there are.
    Raises `LookupError` if there is no such device.
    """
    entries: list[str] = []
    for entry in [str(number) for number in range(count)] if visible is None else visible.split(","):
        name = entry.strip()
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdigit() and int(name) < count)):
            break
        entries.append(name)
    if index >= len(entries):
        raise LookupError(f"there is no cuda:{index}, only {len(entries)} visible to this process")
    return entries[index]
