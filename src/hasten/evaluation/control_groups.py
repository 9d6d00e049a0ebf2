"""Which control groups (cgroups(7)) hold this process, in version 1 and version 2: they limit processors and memory.

A limit of any group above counts as well. A container sees its own group as the root, whatever path
/proc/self/cgroup tells, so the root is always among them.
"""

from __future__ import annotations

from pathlib import Path


def trees(controller: str, system: Path = Path("/")) -> list[list[Path]]:
    """Where a controller (`cpu`, `memory`) may be told of: per possible tree, this process' group and all above it.

    Version 1 first, where a hierarchy names the controller; then version 2's one tree, which on machines with both lies
    in `unified`. Trees may not exist, or be the same under two names. Empty without control groups.
    """
    mounted = system / "sys/fs/cgroup"
    try:
        groups = parse((system / "proc/self/cgroup").read_text())
    except OSError:
        return []
    roots = [(mounted / ",".join(names), path) for names, path in groups if controller in names]
    roots += [(mounted / controller, path) for names, path in groups if controller in names]
    roots += [(root, path) for names, path in groups if not names for root in (mounted, mounted / "unified")]
    return [_upwards(root, path) for root, path in roots]


def parse(text: str) -> list[tuple[tuple[str, ...], str]]:
    """(controllers, path) of every line of /proc/PID/cgroup; version 2's line has no controllers."""
    groups = []
    for line in text.splitlines():
        _, colon, rest = line.partition(":")
        controllers, more, path = rest.partition(":")
        if colon and more:
            groups.append((tuple(name for name in controllers.split(",") if name), path))
    return groups


def _upwards(root: Path, path: str) -> list[Path]:
    """A group's folder and all above it. A path that leads out of the container (`/../..`) cannot be seen from here."""
    own = root / path.strip("/")
    if own == root or ".." in own.parts:
        return [root]
    return [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
