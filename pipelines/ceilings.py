"""Measure how fast this machine reads and multiplies, and print it; what is known already is only printed.

python pipelines/ceilings.py threads=2 device=cpu again=true
"""

from hasten.config import fail


def main(arguments: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hasten.ceilings import ceilings
    from hasten.errors import UserError
    from hasten.hardware import cores, cpu_count

    options = {"threads": str(cpu_count()), "device": "cpu", "again": "false"}
    console = Console(highlight=False)
    try:
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name not in options or not value:
                raise UserError(f"options are {', '.join(f'{key}=...' for key in options)}, got {argument!r}")
            options[name] = value
        threads = int(options["threads"]) if options["threads"].isdecimal() else 0
        if not 1 <= threads <= 4096:
            raise UserError(f"threads must be 1 to 4096, got {options['threads']!r}")
        if options["again"] not in ("true", "false"):
            raise UserError(f"again must be true or false, got {options['again']!r}")
        again = options["again"] == "true"
        found = ceilings(threads, options["device"], cores=cores(threads), again=again)
    except (UserError, RuntimeError) as error:
        fail("ceilings", str(error))
    title = f"{found['device']}, {found['threads']} threads, {found['date']} ({found['validity']})"
    table = Table("working set (MiB)", "read (GB/s)", "median (GB/s)", "quiet turns", title=title, title_justify="left")
    for entry in found["read_bytes_per_second"]:
        rates = [f"{entry[name] / 1e9:.1f}" for name in ("bytes_per_second", "median_bytes_per_second")]
        table.add_row(f"{entry['working_set_bytes'] / 2**20:g}", *rates, f"{entry['quiet_turns']} of {entry['turns']}")
    console.print(table)
    for dtype, rate in found["matmul_flops_per_second"].items():
        known = f"{rate / 1e9:.0f} GFLOP/s" if rate else found["why"][f"matmul_flops_per_second.{dtype}"]
        console.print(f"matrix products in {dtype}: {known}", soft_wrap=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
