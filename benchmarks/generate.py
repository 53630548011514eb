"""How fast answers come: smolmlx beside mlx-lm's and transformers' own batched generation.

    python benchmarks/generate.py                             # stories260k, every engine, batch 1, 8, 32
    python benchmarks/generate.py --model smollm2-135m        # that shape, random weights
    python benchmarks/generate.py --engines mlx --tokens 32

Greedy, every row to its full length, the same prompts for all: lengths from --prompt / 2 to --prompt tokens, and a second
round in which all begin with the same --shared tokens. Each engine has a process of its own. Prompt processing is inside the time. Then answers that keep to
a schema beside free ones: prompts of one token, and each free row is as long as the constrained one in its place. The goals are
0.9 times the free rate for a schema that forces little (a long text), and more than 1 for one that forces much. The two of a
line take turns, --repeat times after one to warm up; medians count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sft

from smolmlx.backend import Decoding, Generator, Loading, load
from smolmlx.data.chat import Tokenizer
from smolmlx.generation.row import Row
from smolmlx.models import BaseModel, make_model, open_model
from smolmlx.tasks.schemas import Text

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
SMOLLM2_135M = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100_000.0, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5, "initializer_range": 0.02,
}  # fmt: skip
FIXED = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
for _name in ("the_first_property", "the_second_property", "the_third_property", "the_fourth_property"):
    FIXED["properties"][_name] = {"enum": ["yes", "no"]}  # type: ignore[index]
    FIXED["required"].append(_name)  # type: ignore[attr-defined]
Answers = Callable[[], int]
"""Answers all prompts and returns how many tokens were generated."""


def open_base(name: str, folder: Path) -> tuple[BaseModel, Tokenizer]:
    """Return the model to measure; SmolLM2's shape gets random weights in `folder`."""
    if name == "stories260k":
        source = ASSETS / "models" / "stories260k"
        return open_model(source), Tokenizer(source)
    if name == "smollm2-135m":
        make_model(SMOLLM2_135M, folder, 0)
        return open_model(folder), Tokenizer(ASSETS / "tokenizers" / "smollm2-135m-instruct")
    base = open_model(Path(name))
    return base, Tokenizer(base.folder)


def make_prompts(count: int, longest: int, shared: int, vocabulary: int) -> list[list[int]]:
    """Return random prompts of different lengths that all begin with the same `shared` tokens."""
    dice = np.random.default_rng(0)
    head = dice.integers(10, vocabulary, shared).tolist()
    return [
        [*head, *dice.integers(10, vocabulary, longest - i * longest // (2 * count)).tolist()] for i in range(count)
    ]


def rates(ways: Sequence[Answers], repeat: int) -> list[float]:
    """Return the median tokens per second of each way; they take turns, so that a busy moment meets all of them."""
    found: list[list[float]] = [[] for _ in ways]
    for turn in range(repeat + 1):
        for answers, mine in zip(ways, found, strict=True):
            began = time.perf_counter()
            count = answers()
            if turn > 0:
                mine.append(count / (time.perf_counter() - began))
    return [statistics.median(mine) for mine in found]


def ours(generator: Generator, prompts: list[list[int]], how: Decoding) -> Answers:
    return lambda: sum(len(done.ids) for done in generator.generate(prompts, how))


def answer_rows(generator: Generator, prompts: list[list[int]], hows: Sequence[Decoding]) -> list[Row]:
    """Answer all prompts in one batch, each decoded in its own way; return the rows in the order of the prompts."""
    batcher = generator.batcher(len(prompts))
    rows = [batcher.make_row(i, prompt, how) for i, (prompt, how) in enumerate(zip(prompts, hows, strict=True))]
    return sorted(batcher.run(rows), key=lambda row: row.index)


def bound_and_free(
    generator: Generator, prompts: list[list[int]], bound: Decoding, free: Decoding
) -> tuple[Answers, Answers]:
    """Return answers that keep to a schema, and free ones of the same number of tokens, row by row."""
    lengths = [len(row.ids) for row in answer_rows(generator, prompts, [bound] * len(prompts))]
    hows = [replace(free, max_tokens=length) for length in lengths]
    return (
        lambda: sum(len(row.ids) for row in answer_rows(generator, prompts, [bound] * len(prompts))),
        lambda: sum(len(row.ids) for row in answer_rows(generator, prompts, hows)),
    )


def mlx_lm(model: Any, prompts: list[list[int]], tokens: int) -> Answers:
    """mlx-lm's continuous batching, without a stop token."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    def answers() -> int:
        stream = mx.default_stream(mx.default_device())
        made = BatchGenerator(model, max_tokens=tokens, completion_batch_size=len(prompts), stream=stream)
        made.insert([list(prompt) for prompt in prompts])
        count = 0
        while found := made.next_generated():
            count += len(found)
        made.close()
        return count

    return answers


def transformers(model: Any, prompts: list[list[int]], tokens: int) -> Answers:
    """transformers' `generate` on left-padded prompts, without a stop token."""
    import torch

    model.generation_config.max_length = None  # else it warns beside max_new_tokens

    def answers() -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return int((made.shape[1] - width) * made.shape[0])

    return answers


PEERS = {"mlx": ("mlx-lm", mlx_lm), "cuda": ("transformers", transformers)}


def measure(engine: str, base: BaseModel, tokenizer: Tokenizer, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record for each batch size and kind of work."""
    generator = load(engine).generator(base, None, tokenizer, Loading(asked.device, "float32"))
    vocabulary = min(tokenizer.vocab_size, int(base.config["vocab_size"]))
    never = (int(base.config["vocab_size"]) + 1,)
    peer, theirs = PEERS[engine]
    found = []
    for batch in asked.batch:
        for shared in (0, asked.shared):
            prompts = make_prompts(batch, asked.prompt, shared, vocabulary)
            free = Decoding(max_tokens=asked.tokens, stop_ids=never, batch_size=batch)
            ways = [ours(generator, prompts, free), theirs(generator.model, prompts, asked.tokens)]  # type: ignore[attr-defined]
            mine, other = rates(ways, asked.repeat)
            work = f"free, {shared} shared"
            found.append({"engine": engine, "work": work, "batch": batch, "smolmlx": mine, peer: other})
        prompts = make_prompts(batch, 1, 0, vocabulary)
        for name, goal, schema in (("long text", "0.9", Text), ("mostly forced", "above 1", FIXED)):
            bound = Decoding(max_tokens=asked.schema_tokens, batch_size=batch, schema=schema)
            free = Decoding(stop_ids=never, batch_size=batch)
            mine, other = rates(bound_and_free(generator, prompts, bound, free), asked.repeat)
            work = f"schema: {name}, goal {goal}"
            found.append({"engine": engine, "work": work, "batch": batch, "smolmlx": mine, "unconstrained": other})
    return found


def measure_apart(engine: str, folder: Path) -> list[dict[str, Any]]:
    """Measure one engine in a process of its own: the threads that one leaves behind hold up the other's."""
    found = folder / f"{engine}.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--engines", engine, "--json", str(found)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))["records"]
    return records


def show(records: list[dict[str, Any]]) -> None:
    print("| engine | work | batch | smolmlx, tokens/s | beside | tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for one in records:
        (other,) = set(one) - {"engine", "work", "batch", "smolmlx"}
        print(
            f"| {one['engine']} | {one['work']} | {one['batch']} | {one['smolmlx']:,.0f} | {other} | {one[other]:,.0f} "
            f"| {one['smolmlx'] / one[other]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="stories260k", help="stories260k, smollm2-135m, or a model folder")
    parser.add_argument("--engines", nargs="+", default=["mlx", "cuda"], choices=["mlx", "cuda"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--schema-tokens", type=int, default=256, help="most tokens of an answer that keeps to a schema"
    )
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--shared", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if len(asked.engines) == 1:
            base, tokenizer = open_base(asked.model, Path(folder))
            records = measure(asked.engines[0], base, tokenizer, asked)
        else:
            records = [record for engine in asked.engines for record in measure_apart(engine, Path(folder))]
    print(
        f"{asked.model}, {asked.tokens} tokens, {platform.processor() or platform.machine()}, {datetime.date.today()}\n"
    )
    show(records)
    if asked.json:
        tree = {
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S+00:00}",
            "command": sft.command("benchmarks/generate.py"),
            "commit": sft.commit(),
            "machine": sft.machine(),
            "records": records,
        }
        asked.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
