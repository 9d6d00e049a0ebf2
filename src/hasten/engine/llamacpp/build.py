"""Which build of llama.cpp runs: the wheel, for any x86-64 with AVX2, or one that was compiled for this machine.

llama.cpp has no kernels to choose from when it runs: what it was compiled for is what it uses, and it says so itself
(`get_system_info`). Both builds have the same version, so a build of the user's own carries its instructions in it,
and trials run again when it changes. docs/engines.md says how to make one.
"""

from __future__ import annotations

from importlib import metadata

INSTRUCTIONS = ("AMX_INT8", "AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "AVX", "SVE", "NEON")
"""What products are computed with, best first; later ones are there as well."""


def instructions(system: str) -> list[str]:
    """Those that a build has, by what it says of itself (`xllamacpp.get_system_info()`)."""
    return [name for name in INSTRUCTIONS if f"{name} = 1" in system]


def ready_made() -> bool:
    """Whether the installed wheel was made for others too: a wheel built here is named after this system alone."""
    described = metadata.distribution("xllamacpp").read_text("WHEEL") or ""
    return not any(line.startswith("Tag: ") and "-linux_" in line for line in described.splitlines())


def own_build() -> str:
    """What a version is followed by: nothing for the wheel, else what its build computes with."""
    if ready_made():
        return ""
    import xllamacpp

    return f", built here: {', '.join(instructions(str(xllamacpp.get_system_info())))}"
