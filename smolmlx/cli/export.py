"""`smolmlx export`: a tuned model for transformers, mlx-lm, llama.cpp or vLLM, loaded there before it counts as done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smolmlx.cli import options

if TYPE_CHECKING:
    from smolmlx.adapters.exports import Export, Settings

Function = TypeVar("Function", bound=Callable[..., Any])

EPILOG = """\b
Examples:
  smolmlx export hf   runs/quickstart-... merged
  smolmlx export mlx  runs/quickstart-.../adapter for-mlx --quantize 4bit
  smolmlx export gguf merged tuned.gguf --type q8_0
"""


@click.group("export", epilog=EPILOG)
def command() -> None:
    """Write a tuned model for the program that will load it, and have that program load and check it.

    SOURCE is a finished run, an adapter folder, a model folder or a hub id.
    """


def _common(function: Function) -> Function:
    """Add what all targets share."""
    function = options.as_json(function)
    function = click.option("--private", is_flag=True, help="With --push: a private repository.")(function)
    function = click.option("--push", metavar="REPO", help="Upload to this hub repository, with a card.")(function)
    function = click.option(
        "--verify/--no-verify",
        default=True,
        help="Compare ids, logits and greedy tokens; exit 5 on drift.  [default: verify]",
    )(function)
    function = click.option("--untie", is_flag=True, help="Let head and embedding become two weights where needed.")(
        function
    )
    function = click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")(function)
    function = click.option("--model", metavar="M", help="The base, where the adapter's own note of it does not help.")(
        function
    )
    function = click.argument("out", type=click.Path())(function)
    return click.argument("source")(function)


_DTYPE = click.option(
    "--dtype", default="auto", show_default=True, metavar="auto|float32|float16|bfloat16", help="auto is the base's."
)


@command.command("hf")
@_common
@_DTYPE
def hf(**arguments: Any) -> None:
    """A merged folder for transformers (mlx-lm and vLLM read it too)."""
    _run("hf", **arguments)


@command.command("mlx")
@_common
@_DTYPE
@click.option("--quantize", type=click.Choice(["none", "4bit", "8bit"]), default="none", show_default=True)
def mlx(**arguments: Any) -> None:
    """A folder for mlx-lm, whole or quantized."""
    _run("mlx", **arguments)


@command.command("gguf")
@_common
@click.option(
    "--type",
    "kind",
    default="f16",
    show_default=True,
    metavar="T",
    help="f32, f16, bf16, q8_0; q4_k_m and its kind through llama.cpp.",
)
def gguf(**arguments: Any) -> None:
    """A GGUF for llama.cpp; OUT is a .gguf file or a folder."""
    _run("gguf", **arguments)


@command.command("vllm")
@_common
@_DTYPE
@click.option(
    "--quantize",
    type=click.Choice(["none", "awq"]),
    default="none",
    show_default=True,
    help="awq: 4 bits, by llm-compressor; NVIDIA only.",
)
@click.option("--calibration", metavar="ROWS", help="With awq: rows as in training, run through the model.")
def vllm(**arguments: Any) -> None:
    """A merged folder and a LoRA folder for vLLM, with the commands to serve them."""
    _run("vllm", **arguments)


def _run(
    target: str,
    source: str,
    out: str,
    model: str | None,
    revision: str | None,
    push: str | None,
    private: bool,
    as_json: bool,
    **how: Any,
) -> None:
    from smolmlx import console
    from smolmlx.adapters import exports, hub
    from smolmlx.errors import RecipeError

    if push:
        hub.refuse()
    elif private:
        raise RecipeError("--private has no effect without --push. Leave it out, or pass --push REPO.")
    found = exports.find_source(source, model, revision)
    settings: Settings = exports.Settings(**how)
    with console.status(f"exporting {target}") as say:
        done = exports.export(target, found, Path(out), settings, say)
        address = None
        if push:
            say(f"uploading to {push}")
            address = hub.push(done, found, push, private)
    if as_json:
        console.print_json({**asdict(done), "address": address})
        return
    _print(done)
    if address:
        console.result(address)


def _print(done: Export) -> None:
    from smolmlx import console

    for note in done.notes:
        console.note(note)
    console.result(f"{done.path}: {done.target}, {done.precision}")
    for a in done.agreements:
        console.result(
            f"  verified: {a.consumer} against {a.reference}: {a.nats:.2g} nats per token (limit {a.limit:g}),"
            f" {a.greedy:.1%} of {a.num_tokens} greedy tokens the same"
        )
    for text in done.unverified:
        console.result(f"  not verified: {text}")
    for line in done.commands:
        console.result(f"Next: {line}")
