"""`smolmlx export`: a tuned model for transformers, mlx-lm, llama.cpp or vLLM, loaded there before it counts as done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smolmlx.cli import options
from smolmlx.cli.group import Group

if TYPE_CHECKING:
    from smolmlx.adapters.exports import Export, Settings

Function = TypeVar("Function", bound=Callable[..., Any])

EPILOG = """\b
Examples:
  smolmlx export hf   runs/quickstart-... merged
  smolmlx export mlx  runs/quickstart-.../adapter for-mlx --quantize 4bit
  smolmlx export gguf merged tuned.gguf --type q8_0
"""
HF_EPILOG = """\b
Examples:
  smolmlx export hf runs/quickstart-... merged
  smolmlx export hf runs/quickstart-.../adapter merged --dtype bfloat16
  smolmlx export hf runs/quickstart-... merged --push me/tuned --private
"""
MLX_EPILOG = """\b
Examples:
  smolmlx export mlx runs/quickstart-... for-mlx
  smolmlx export mlx runs/quickstart-... for-mlx --quantize 4bit
"""
GGUF_EPILOG = """\b
Examples:
  smolmlx export gguf runs/quickstart-... tuned.gguf --type q8_0
  smolmlx export gguf runs/quickstart-... tuned --type q4_k_m     # tuned/model-q4_k_m.gguf, and a card
"""
VLLM_EPILOG = """\b
Examples:
  smolmlx export vllm runs/quickstart-... served
  smolmlx export vllm runs/quickstart-... served --model my/model --revision v1
"""
FROM = {
    "llama-cli": "llama.cpp: its releases on GitHub, or: brew install llama.cpp",
    "mlx_lm.generate": "mlx-lm: pip install mlx-lm",
    "vllm": "vLLM: pip install vllm",
}
"""Where a program comes from that may not be on the PATH."""


@click.group("export", cls=Group, epilog=EPILOG)
def command() -> None:
    """Write a tuned model for the program that will load it, and have that program load and check it.

    SOURCE is a finished run, an adapter folder, a model folder or a hub id.
    """


def _common(function: Function) -> Function:
    """Add what all targets share."""
    function = options.as_json(function)
    function = click.option("--private", is_flag=True, help="With --push: a private repository.")(function)
    function = click.option("--push", metavar="REPO", help="Upload it with its card to this hub repository.")(function)
    function = click.option(
        "--verify/--no-verify",
        default=True,
        help="Compare ids, logits (mean KL divergence in nats per token) and greedy tokens; exit 5 on drift."
        "  [default: verify]",
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


@command.command("hf", epilog=HF_EPILOG)
@_common
@_DTYPE
def hf(**arguments: Any) -> None:
    """A merged folder for transformers (mlx-lm and vLLM read it too)."""
    _run("hf", **arguments)


@command.command("mlx", epilog=MLX_EPILOG)
@_common
@_DTYPE
@click.option(
    "--quantize",
    type=click.Choice(["none", "4bit", "8bit"]),
    default="none",
    show_default=True,
    help="MLX's own quantization, by mlx-lm, in groups of 64.",
)
def mlx(**arguments: Any) -> None:
    """A folder for mlx-lm, whole or quantized."""
    _run("mlx", **arguments)


@command.command("gguf", epilog=GGUF_EPILOG)
@_common
@click.option(
    "--type",
    "kind",
    default="f16",
    show_default=True,
    metavar="T",
    help="f32, f16, bf16, q8_0; by llama.cpp: q2_k, q3_k_m, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k.",
)
def gguf(**arguments: Any) -> None:
    """A GGUF for llama.cpp; OUT is a .gguf file, or a folder for model-TYPE.gguf and a card."""
    _run("gguf", **arguments)


@command.command("vllm", epilog=VLLM_EPILOG)
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
        hub.refuse(push)
    elif private:
        raise RecipeError("--private has no effect without --push. Leave it out, or pass --push REPO.")
    found = exports.find_source(source, model, revision)
    settings: Settings = exports.Settings(**how)
    with console.status(f"exporting {target}") as say:
        done = exports.export(target, found, Path(out), settings, say)
    if not as_json:
        _print(done)
    address = None
    try:
        if push:
            with console.status(f"uploading to {push}"):
                address = hub.push(done, found, push, private)
    finally:  # an upload that failed leaves an export
        if as_json:
            console.print_json({**asdict(done), "address": address})
    if address and not as_json:
        console.result(address)


def _print(done: Export) -> None:
    from smolmlx import console
    from smolmlx.adapters.verification import describe

    for note in done.notes:
        console.note(note)
    console.result(f"{done.path}: {done.target}, {done.precision}")
    for found in done.agreements:
        console.result(f"  {describe(found)}")
    for text in done.unverified:
        console.result(f"  not verified: {text}")
    for line in done.commands:
        console.result(f"Next: {line}")
    for program in sorted({line.split()[0] for line in done.commands} & set(FROM)):
        if shutil.which(program) is None:
            console.note(f"{program} is not on the PATH here. It comes with {FROM[program]}")
