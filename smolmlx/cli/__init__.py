"""The command line: one file per verb, imported only when its verb is used, so that `--help` stays fast.

A verb parses, calls the library, and prints through `console`; nothing is decided here.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from smolmlx import __version__
from smolmlx.cli.group import Group
from smolmlx.cli.usage import advise
from smolmlx.errors import SmolError

VERBS = {
    "train": "Train a recipe, stage by stage.",
    "plan": "Show what a recipe will do, without doing it.",
    "generate": "Answer prompts with a model.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve a model over HTTP, as OpenAI's API.",
    "eval": "Score a model on held-out rows, beside its controls.",
    "judge": "Have a language model mark answers, or choose between two.",
    "sweep": "Train a recipe under many settings and seeds.",
    "report": "Show runs in one HTML file, with charts and a model card.",
    "data": "Look at, check, prepare and split rows, and make them from documents.",
    "adapter": "Inspect, convert, merge and analyze adapters.",
    "export": "Write a tuned model for transformers, mlx-lm, llama.cpp or vLLM.",
    "bench": "Measure how fast this machine trains and answers.",
    "recipes": "List, show, copy and check recipes.",
    "doctor": "Check engines, devices and speed of this machine.",
}


class LazyGroup(Group):
    """A group whose commands live in `smolmlx.cli.<verb>`, as an object named `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = importlib.import_module(f"smolmlx.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="smolmlx")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Fine-tune small language models: one recipe, two engines (MLX and PyTorch), the same numbers.

    Start with `smolmlx doctor`, then `smolmlx train` (recipe `quickstart`).
    """


def main() -> None:
    """Run the command line; every error becomes one message on stderr and an exit code."""
    debug = "--debug" in sys.argv
    # A library below must not talk to anyone, nor draw its own bars over ours.
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    try:
        # Without standalone mode click returns the code of ctx.exit and of click.exceptions.Exit.
        code = cli.main(args=_debug_anywhere(sys.argv[1:]), prog_name="smolmlx", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        advise(error, sys.argv[1:]).show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except SmolError as error:
        if debug:
            raise
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        click.echo(
            f"Unexpected {type(error).__name__}: {error}\nThis is a bug in smolmlx. Run again with --debug and report the traceback.",
            err=True,
        )
        sys.exit(1)


def _debug_anywhere(arguments: list[str]) -> list[Any]:
    """Let --debug stand behind the verb too."""
    rest = [argument for argument in arguments if argument != "--debug"]
    return ["--debug", *rest] if len(rest) < len(arguments) else rest
