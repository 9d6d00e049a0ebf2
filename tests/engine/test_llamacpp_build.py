from __future__ import annotations

from importlib import metadata

import pytest

from hasten.engine.llamacpp import Llamacpp
from hasten.engine.llamacpp.build import instructions

xllamacpp = pytest.importorskip("xllamacpp")
SYSTEM = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | OPENMP = 1 | "


def test_a_build_of_ones_own_is_told_from_the_wheel_and_says_what_it_computes_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xllamacpp, "get_system_info", lambda: SYSTEM)
    for tag, more in (
        ("cp310-abi3-manylinux2014_x86_64", ""),
        ("cp310-abi3-macosx_11_0_arm64", ""),
        ("cp310-abi3-linux_x86_64", ", built here: AVX512_VNNI, AVX512, AVX2, AVX"),
        ("cp310-abi3-linux_aarch64", ", built here: AVX512_VNNI, AVX512, AVX2, AVX"),
    ):
        files = {"METADATA": "Name: xllamacpp\nVersion: 2026.1\n", "WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n"}
        monkeypatch.setattr(
            type(metadata.distribution("xllamacpp")), "read_text", lambda self, name, files=files: files[name]
        )
        assert Llamacpp.versions() == {"xllamacpp": f"2026.1{more}"}


def test_where_it_is_not_installed_it_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata.Distribution, "discover", lambda **_: iter([]))
    assert Llamacpp.versions() == {"xllamacpp": None}


def test_what_a_build_was_compiled_for_is_what_it_says() -> None:
    assert instructions(SYSTEM)[0] == "AVX512_VNNI"
    assert instructions("CPU : AVX512_VNNI = 0 | AVX2 = 1 | ") == ["AVX2"]
    assert instructions("CPU : SSE3 = 1 | ") == []
