"""`smolmlx generate`: answer one prompt or a file of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.errors import DataError, RecipeError

if TYPE_CHECKING:
    from smolmlx.backend import Completion, Decoding, Generator
    from smolmlx.data.chat import Tokenizer

EPILOG = """\b
Examples:
  smolmlx generate --model tiny --adapter runs/quickstart-.../adapter --prompt "..."
  smolmlx generate --model my/model --input questions.jsonl --output answers.jsonl --temperature 0.7 --seed 1
  smolmlx generate --model tiny --prompt "..." --choice yes --choice no
  smolmlx generate --model tiny --adapter runs/quickstart-.../adapter --input prompts.jsonl --before-after
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
@click.option("--top-k", default=0, metavar="K", type=click.IntRange(min=0), help="Draw among the K likeliest tokens.")
@click.option(
    "--min-p",
    default=0.0,
    metavar="P",
    type=click.FloatRange(0, 1),
    help="Leave out tokens less likely than P times the likeliest.",
)
@click.option(
    "--repetition-penalty",
    default=1.0,
    metavar="R",
    type=click.FloatRange(min=0, min_open=True),
    help="Above 1: hold back tokens that the answer has already.",
)
@click.option(
    "--no-repeat-ngram",
    default=0,
    metavar="N",
    type=click.IntRange(min=0),
    help="No N tokens in a row come twice in an answer.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End an answer in front of this text; may be repeated.")
@click.option("--schema", metavar="FILE|MODULE:CLASS", help="Keep answers to a JSON schema, or a Pydantic model.")
@click.option("--regex", metavar="R", help="Keep answers to a regular expression (Rust's syntax).")
@click.option("--choice", "choices", multiple=True, metavar="A", help="Keep answers to one of these texts; repeat it.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--before-after", is_flag=True, help="Answer without --adapter too, and show both.")
@click.option("--stream", is_flag=True, help="Print the answer to --prompt while it is written.")
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
    schema: str | None,
    regex: str | None,
    choices: tuple[str, ...],
    before_after: bool,
    stream: bool,
    **decoding: Any,
) -> None:
    """Answer --prompt, or every row of --input, with MODEL and at most one adapter."""
    from smolmlx import console
    from smolmlx.backend import Decoding, Loading
    from smolmlx.data.chat import Tokenizer
    from smolmlx.generation.constraint import read_constraint
    from smolmlx.generation.prompts import check_lengths
    from smolmlx.models import find_model

    if (prompt is None) == (source is None):
        raise RecipeError("generate: pass either --prompt TEXT or --input rows.jsonl.")
    if stream and (prompt is None or as_json or output):
        raise RecipeError(
            "--stream: prints the one answer to --prompt; it has no use with --input, --output or --json."
        )
    if before_after and adapter is None:
        raise RecipeError("--before-after: compares answers with and without an adapter. Pass --adapter A.")
    if before_after and stream:
        raise RecipeError("--before-after: shows two answers side by side; it has no use with --stream.")
    options.refuse_idle_sampling(decoding["temperature"], "seed", "top_p", "top_k", "min_p")
    how = Decoding(**decoding, schema=read_constraint(schema, regex, choices))
    if raw and system:
        raise RecipeError(
            "--system: has no effect with --raw, which writes no chat. Put the text into the prompt itself."
        )
    variables = _variables(template_args, raw)
    base = find_model(model)
    if adapter and not Path(adapter).is_dir():
        raise RecipeError(f"--adapter {adapter}: no such folder.")
    tokenizer = Tokenizer(options.tokenizer_folder(base.folder, [adapter] if adapter else []))
    prompts = _read(prompt, source, system)
    tokens = [_encode(tokenizer, messages, raw, variables) for messages in prompts]
    context = base.context
    check_lengths(tokens, context, source or "--prompt", DataError if source else RecipeError)
    choice = options.choose(backend, device)
    with console.status("loading the model"):
        generator = choice.backend.generator(
            base, Path(adapter) if adapter else None, tokenizer, Loading(device, quantize=quantize)
        )
    if stream:
        list(generator.generate(tokens, how, lambda index, text: click.echo(text, nl=False)))
        click.echo()
        return
    after = _answer(generator, tokens, how, context)
    before = None
    if before_after:
        generator.use_adapter(None)
        before = _answer(generator, tokens, how, context)
    _write(prompts, after, before, output, as_json)


def _answer(generator: Generator, tokens: list[list[int]], how: Decoding, context: int | None) -> list[Completion]:
    """Answer all prompts, in order, and say how fast."""
    from smolmlx import console

    found: list[Completion] = []
    began = time.perf_counter()
    with console.Counter("answering", len(tokens)) as on_done:
        for completion in generator.generate(tokens, how):
            found.append(completion)
            on_done(len(found))
    console.note(_rate(found, time.perf_counter() - began, context))
    return sorted(found, key=lambda completion: completion.index)


def _rate(found: list[Completion], seconds: float, context: int | None) -> str:
    """Say what was generated and how fast."""
    tokens, forced = sum(len(one.ids) for one in found), sum(one.num_forced for one in found)
    cut = sum(not one.finished for one in found)
    parts = [f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"]
    parts += [f"{forced:,} of them forced by the schema"] if forced else []
    parts += [f"{cut} of {len(found)} answers ended by --max-tokens"] if cut else []
    past = sum(one.num_prompt + len(one.ids) > (context or math.inf) for one in found)
    parts += [f"{past} ran past the model's context of {context}: pass a smaller --max-tokens"] if past else []
    return "; ".join(parts)


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


def _write(
    prompts: list[tuple[Mapping[str, Any], ...]],
    found: list[Completion],
    before: list[Completion] | None,
    output: str | None,
    as_json: bool,
) -> None:
    from smolmlx import console
    from smolmlx.rundir import write_text

    rows: list[dict[str, Any]] = [
        {
            "prompt": [dict(m) for m in messages],
            "answer": one.text.strip(),
            "finished": one.finished,
            "prompt_tokens": one.num_prompt,
            "completion_tokens": len(one.ids),
        }
        for messages, one in zip(prompts, found, strict=True)
    ]
    if before is not None:
        for row, one in zip(rows, before, strict=True):
            row["before"] = one.text.strip()
    if output:
        write_text(Path(output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        console.note(f"{len(rows)} answers in {output}")
    if as_json:
        console.print_json({"answers": rows})
    elif not output:
        for row in rows:
            if before is None:
                console.result(row["answer"])
            else:
                asked = row["prompt"][-1]["content"]
                console.result(f"{asked}\n\n[before]\n{row['before']}\n\n[after]\n{row['answer']}\n")
