"""`smolmlx doctor`: what works on this machine, and what to type where it does not."""

from __future__ import annotations

import click

from smolmlx.cli import options


@click.command("doctor")
@options.as_json
def command(as_json: bool) -> None:
    """Check every engine: PASS or FAIL, device, versions, speed, reason and fix. Exit 3 when none works."""
    from smolmlx import console, doctor

    with console.status("checking engines"):
        found = doctor.check()
    if as_json:
        console.print_json(doctor.to_json(found))
    else:
        for engine in found:
            mark = "PASS" if engine.passed else "FAIL"
            console.result(f"{mark}  {engine.name}  {engine.summary}")
            for line in engine.details:
                console.result(f"      {line}")
            if engine.fix:
                console.result(f"      fix: {engine.fix}")
        console.result(f"\n{doctor.verdict()}")
    if not any(engine.passed for engine in found):
        raise click.exceptions.Exit(3)
