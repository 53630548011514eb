"""`smolmlx generate`: answer one prompt or a file of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.errors import DataError, RecipeError

if TYPE_CHECKING:
    from smolmlx.data.chat import Tokenizer

EPILOG = """\b
Examples:
  smolmlx generate --model tiny --adapter runs/quickstart-.../adapter --prompt "..."
  smolmlx generate --model my/model --input questions.jsonl --output answers.jsonl --temperature 0.7 --seed 1
"""


@click.command("generate", epilog=EPILOG)
@click.option("--model", required=True, metavar="M", help="Hub id, folder or `tiny`.")
@click.option("--adapter", metavar="A", type=click.Path(), help="Adapter folder (PEFT layout).")
@click.option("--prompt", metavar="TEXT", help="One user message.")
@click.option(
    "--input", "source", metavar="ROWS", help="Rows of any known format; an assistant turn at their end is left out."
)
@click.option("--output", metavar="OUT", type=click.Path(dir_okay=False), help="Write answers as JSONL.")
@click.option("--system", metavar="TEXT", help="System message for rows that have none.")
@click.option(
    "--template-arg",
    "template_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Extra variable of the chat template, e.g. enable_thinking=false.",
)
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without a chat template.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(min=0, max=1, min_open=True))
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="A sampled row depends on (seed, row) alone.",
)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1))
@options.quantize
@options.engine
@options.as_json
def command(
    model: str,
    adapter: str | None,
    prompt: str | None,
    source: str | None,
    output: str | None,
    system: str | None,
    template_args: tuple[str, ...],
    raw: bool,
    backend: str,
    device: str | None,
    quantize: str,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Answer --prompt, or every row of --input, with MODEL and at most one adapter."""
    from smolmlx import console
    from smolmlx.backend import Decoding, Loading
    from smolmlx.data.chat import Tokenizer
    from smolmlx.models import find_model

    if (prompt is None) == (source is None):
        raise RecipeError("generate: pass either --prompt TEXT or --input rows.jsonl.")
    variables = _variables(template_args, raw)
    base = find_model(model)
    if adapter and not Path(adapter).is_dir():
        raise RecipeError(f"--adapter {adapter}: no such folder.")
    tokenizer = Tokenizer(options.tokenizer_folder(base.folder, [adapter] if adapter else []))
    prompts = _read(prompt, source, system)
    tokens = [_encode(tokenizer, messages, raw, variables) for messages in prompts]
    choice = options.choose(backend, device)
    with console.status("loading the model"):
        generator = choice.backend.generator(
            base, Path(adapter) if adapter else None, tokenizer, Loading(device, quantize=quantize)
        )
    answers = [""] * len(prompts)
    with console.Counter("answering", len(prompts)) as on_done:
        for done, completion in enumerate(generator.generate(tokens, Decoding(**decoding)), 1):
            answers[completion.index] = tokenizer.decode(completion.ids)
            on_done(done)
    _write(prompts, answers, output, as_json)


def _read(prompt: str | None, source: str | None, system: str | None) -> list[tuple[Mapping[str, Any], ...]]:
    from smolmlx.data.formats import open_source

    if prompt is not None:
        head = ({"role": "system", "content": system},) if system else ()
        return [(*head, {"role": "user", "content": prompt})]
    found = []
    for example in open_source(str(source), system=system, split="test"):
        messages = list(example.messages) or [{"role": "user", "content": example.text}]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{example.where}: no message to answer.")
        found.append(tuple(messages))
    return found


def _variables(given: tuple[str, ...], raw: bool) -> dict[str, Any]:
    """Read KEY=VALUE pairs; a value is YAML, so `false` is no word."""
    from smolmlx.recipe import parse_override

    if raw and given:
        raise RecipeError("--template-arg: has no effect with --raw, which uses no chat template.")
    return dict(parse_override(pair, "--template-arg", "enable_thinking=false") for pair in given)


def _encode(
    tokenizer: Tokenizer, messages: tuple[Mapping[str, Any], ...], raw: bool, variables: Mapping[str, Any]
) -> list[int]:
    if raw:
        return tokenizer.encode(str(messages[-1]["content"]), special=True)
    return tokenizer.encode(tokenizer.prompt(messages, **variables))


def _write(prompts: list[tuple[Mapping[str, Any], ...]], answers: list[str], output: str | None, as_json: bool) -> None:
    from smolmlx import console
    from smolmlx.rundir import write_text

    rows = [
        {"prompt": [dict(m) for m in messages], "answer": text.strip()}
        for messages, text in zip(prompts, answers, strict=True)
    ]
    if output:
        write_text(Path(output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        console.note(f"{len(rows)} answers in {output}")
    if as_json:
        console.print_json({"answers": rows})
    elif not output:
        for row in rows:
            console.result(str(row["answer"]))
