"""Which of a job's processes this is, from the environment alone: known before torch or Lightning are imported.

Processes that train together each run the whole entry point; the first one (rank 0) speaks for all. Who started them
says who they are, and it is asked in the order in which Lightning asks:

| started by | rank | how many |
|-|-|-|
| `torchrun` | `RANK` | `WORLD_SIZE` |
| Slurm's `srun`, one task for each process | `SLURM_PROCID` | `SLURM_NTASKS` |
| Lightning, which runs the entry point again | `NODE_RANK`, `LOCAL_RANK` | `WORLD_SIZE` |
| a person | 0 | 1 |

`torchrun` also works within a job of Slurm, and then it decides. Slurm's variables alone do not make several processes:
there have to be several tasks, and an interactive shell (a job named `bash` or `interactive`) is one process, whatever
was reserved. Lightning's first process has no variable before it has started the others: it is rank 0. From a second
node on, Lightning does not say how many processes a node has: the rank is then above 0, and that is all it says.
"""

from __future__ import annotations

import os

from hasten.errors import UserError

INTERACTIVE = ("bash", "interactive")


def rank() -> int:
    """This process' number, 0 for the one that speaks. Raises `UserError` for a variable that is no number."""
    if "RANK" in os.environ:
        return number("RANK")
    if under_slurm():
        return number("SLURM_PROCID")
    return number("NODE_RANK" if "NODE_RANK" in os.environ else "GROUP_RANK") + number("LOCAL_RANK")


def world_size() -> int:
    """How many processes there are. Raises `UserError` for a variable that is no number."""
    if "RANK" not in os.environ and under_slurm():
        return number("SLURM_NTASKS")
    return max(1, number("WORLD_SIZE"))


def under_slurm() -> bool:
    """Whether `srun` started several tasks, this one among them."""
    return number("SLURM_NTASKS") > 1 and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def number(variable: str) -> int:
    """The number in an environment variable, 0 where it is not set."""
    value = os.environ.get(variable) or "0"
    if not value.isdecimal():
        raise UserError(f"the environment's {variable} must be a number, got {value!r}")
    return int(value)


def started_by_the_first() -> bool:
    """Whether the first process, or another on its node, started this one: Lightning does, where nobody else did."""
    return "RANK" not in os.environ and not under_slurm() and number("LOCAL_RANK") > 0


def exit_code(code: int) -> int:
    """With what this process ends when all of them agreed to end with `code`.

    Those that the first one started end with 0: Lightning kills it for any other code of theirs, and then it could not
    finish its run. Who started the first one sees its code.
    """
    return 0 if started_by_the_first() else code
