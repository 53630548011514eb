"""The class of all groups of verbs."""

from __future__ import annotations

import click

from smolmlx.errors import nearest

_ELSEWHERE = {
    **{verb: f"data {verb}" for verb in ("inspect", "validate", "split", "mix", "prepare", "dedupe")},
    **{verb: f"adapter {verb}" for verb in ("convert", "merge", "analyze")},
}
"""Verbs of a group, typed without it."""


class Group(click.Group):
    """A group that lists its commands, and names the nearest, for a misspelt one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            typed = " ".join([*ctx.command_path.split()[1:], args[0]])
            word = args[0].lower()
            meant = _ELSEWHERE.get(word) if ctx.parent is None else None
            # 0.5: of two letters, one may be wrong
            hint = f" Did you mean '{meant}'?" if meant else nearest(word, names, cutoff=0.5)
            raise click.UsageError(f"no such command '{typed}'.{hint} Commands: {', '.join(names)}.")
        return super().resolve_command(ctx, args)
