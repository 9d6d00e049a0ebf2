"""The native engine's kernels, compiled for this machine by its own compiler and kept under `.work/engines`.

`-march=native` is the point: the kernels follow what the processor has (AVX-512 with VNNI and bfloat16), and fall back
to portable code, which the compiler vectorises as well as it can.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from hasten.engine.base import built
from hasten.errors import UserError
from hasten.hardware import cpu_flags

SOURCES = Path(__file__).parent / "cpp"
BASE = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fPIC", "-shared", "-pthread")


def flags() -> list[str]:
    """Ours, and after them what CXXFLAGS says."""
    return [*BASE, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def compiler() -> list[str] | None:
    """The C++ compiler's command: `$CXX`, or the first of the usual ones that is there."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    return [found] if found else None


def load(cache: Path) -> ctypes.CDLL:
    """The compiled kernels; built once per compiler, processor and source. Raises `UserError` if that fails."""
    return declared(library(cache, "server.cpp"))


def product(cache: Path) -> ctypes.CDLL:
    """As `load`, of one product alone, in OpenMP's threads: for engines that have a network of their own."""
    loaded = library(cache, "product.cpp", "-fopenmp")
    int32, pointer = ctypes.c_int32, ctypes.c_void_p
    loaded.hasten_kernels.restype, loaded.hasten_kernels.argtypes = ctypes.c_char_p, []
    loaded.hasten_multiply.restype = None
    matrix: list[type] = [*[int32] * 4, pointer, pointer]
    loaded.hasten_multiply.argtypes = [*matrix, pointer, int32, int32, pointer, int32]
    return loaded


def library(cache: Path, source: str, *options: str) -> ctypes.CDLL:
    command = compiler()
    if command is None:
        raise UserError("engine native needs a C++ compiler (g++ or clang++, or the one that CXX names), found none")
    own = [*flags(), *options]
    texts = (path.read_text() for path in sorted(SOURCES.iterdir()))
    parts = [version(tuple(command)), " ".join(own), source, " ".join(cpu_flags()), *texts]
    folder = cache / "native" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    built(folder, lambda temporary: compile_to(temporary / "hasten.so", [*command, *own], SOURCES / source))
    return ctypes.CDLL(str(folder / "hasten.so"))


def compile_to(path: Path, command: list[str], source: Path) -> None:
    done = subprocess.run([*command, "-o", str(path), str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise UserError(f"{command[0]} could not compile the kernels of engine native: {said}")


@lru_cache
def version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"CXX must name a C++ compiler that runs, got {shlex.join(command)}: {error}") from None
    return done.stdout


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions (`cpp/server.cpp`)."""
    int32, int64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    ints, doubles = ctypes.POINTER(int32), ctypes.POINTER(ctypes.c_double)
    types: dict[str, tuple[type | None, list[type]]] = {
        "kernels": (ctypes.c_char_p, []),
        "open": (pointer, [pointer, pointer]),
        "close": (None, [pointer]),
        "cache_bytes": (int64, [pointer]),
        "guesses": (None, [pointer, ctypes.POINTER(int64), ctypes.POINTER(int64)]),
        "submit": (int64, [pointer, ints, int32, int32, ints, int32, ctypes.c_float, ctypes.c_float, ctypes.c_uint64]),
        "poll": (int32, [pointer, int64, int32, int32, ints, doubles, ints]),
        "wait": (None, [pointer, int64, ctypes.c_double]),
        "cancel": (None, [pointer, int64]),
        "forget": (None, [pointer, int64]),
        "attend": (None, [pointer, int32, pointer, ints, int32, pointer, pointer, pointer, pointer]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(loaded, f"hasten_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded
