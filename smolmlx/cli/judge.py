"""`smolmlx judge`: have language models mark answers, or choose between two."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.errors import DataError, RecipeError, RunError, nearest

if TYPE_CHECKING:
    from smolmlx.evals.judge import Item, Record
    from smolmlx.evals.judging import Judge

EPILOG = """\b
Examples:
  smolmlx judge runs/a/eval/test-answers.jsonl --system sft --judge http://127.0.0.1:8000/v1
  smolmlx judge sft.jsonl --pairwise dpo.jsonl --judge https://api.example.org/v1 --model big --key-from MY_KEY
  smolmlx judge answers.jsonl --judge Qwen/Qwen2.5-1.5B-Instruct --resume
"""


@click.command("judge", epilog=EPILOG)
@click.argument("outputs", metavar="OUTPUTS.jsonl")
@click.option(
    "--judge",
    "judges",
    multiple=True,
    required=True,
    metavar="URL|MODEL",
    help="Address that ends in /v1, or a model here; twice for their agreement.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="Model at the address; once for all, or once for each. Default: the only one it serves.",
)
@click.option(
    "--key-from",
    default="OPENAI_API_KEY",
    show_default=True,
    metavar="VARIABLE",
    help="Environment variable that holds the key.",
)
@click.option("--pairwise", metavar="OTHER.jsonl", help="Choose between these answers and OUTPUTS, in both orders.")
@click.option("--system", metavar="NAME", help="Whose answers to take from rows that hold several (of OTHER too).")
@click.option("--other-system", metavar="NAME", help="Whose answers to take from OTHER, where not the same.")
@click.option("--limit", type=click.IntRange(min=1), help="Judge the first N rows.")
@click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True, help="Requests at once.")
@click.option(
    "--retries", type=click.IntRange(0, 20), default=5, show_default=True, help="Of one request, with growing pauses."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds for one request."
)
@click.option(
    "--price", nargs=2, type=click.FloatRange(min=0), metavar="IN OUT", help="Dollars per million tokens, for the cost."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of ledger.jsonl and judge.json. Default: OUTPUTS-judged.",
)
@click.option("--resume", is_flag=True, help="Go on with the ledger in --out; what it holds is not asked again.")
@options.engine
@options.as_json
def command(outputs: str, judges: tuple[str, ...], resume: bool, out: Path | None, as_json: bool, **given: Any) -> None:
    """Have judges mark answers 1 to 5 for faithfulness, correctness, relevance and completeness.

    OUTPUTS holds `input` (or `prompt`), `answer` (or `answers` by system) and, where there is one, `reference`: what
    `smolmlx eval --out` and `smolmlx generate --output` write. A judge that does not answer in the form asked for is
    counted and reported, never scored.
    """
    from smolmlx import console
    from smolmlx.evals import judging
    from smolmlx.evals.judge import questions
    from smolmlx.rundir import write_text

    _check_flags(judges, given)
    items = _read_items(outputs, given)
    folder = out or Path(outputs).with_name(f"{Path(outputs).stem}-judged")
    path = folder / "ledger.jsonl"
    if path.exists() and not resume:
        raise RecipeError(f"{path}: already there. Add --resume to go on with it, or choose another --out.")
    keys: set[str] = set()
    opened = _open_judges(judges, given)
    with judging.open_ledger(path) as ledger:
        for judge in opened:
            asked = questions(items, judge.name)
            keys |= {question.key for question in asked}
            with console.Counter(f"{judge.name} judges", len(asked)) as on_done:
                judging.run(judge, asked, ledger, on_done)
        records = [record for key, record in ledger.records.items() if key in keys]
        prices = [given["price"] if is_address(name) else None for name in judges]
        result = _result(records, [judge.name for judge in opened], items, prices)
        write_text(folder / "judge.json", json.dumps(result, indent=2) + "\n")
    if as_json:
        console.print_json({"out": str(folder), **result})
    else:
        _show(result, folder)
    failed = sum(found["failed"] for found in result["judges"])
    if failed:
        why = next(record.error for record in records if record.error not in ("", "nonsense"))
        raise RunError(f"{failed} of {len(keys)} questions got no reply ({why}). Ask them again with --resume.")
    if all(found["nonsense"] and not found["scored"] for found in result["judges"]):
        raise RunError(f"nothing is scored: no reply was in the form asked for. What was said is in {path}; pass another judge.")  # fmt: skip


def _result(
    records: Sequence[Record],
    names: Sequence[str],
    items: Sequence[Item],
    prices: Sequence[tuple[float, float] | None],
) -> dict[str, Any]:
    from smolmlx.evals.judge import PROMPT_VERSION, agreement, summarise

    found: dict[str, Any] = {"prompt_version": PROMPT_VERSION}
    found["judges"] = [summarise(records, name, items, price) for name, price in zip(names, prices, strict=True)]
    if len(names) > 1:
        found["agreement"] = [agreement(records, names[0], other) for other in names[1:]]
    return found


_AT_ADDRESSES = {"models": "--model", "key_from": "--key-from", "concurrency": "--concurrency", "retries": "--retries", "timeout": "--timeout", "price": "--price"}  # fmt: skip
_OF_LOCAL_MODELS = {"backend": "--backend", "device": "--device"}


def _check_flags(judges: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuse flags that would change nothing, a key that is not there and addresses that are none.

    Raises:
        RecipeError: with all of them.
    """
    from smolmlx.synth.server import has_host

    typed = options.typed(*given)
    problems = [f"--judge {name}: expected an address such as http://127.0.0.1:8000/v1." for name in judges if is_address(name) and not has_host(name)]  # fmt: skip
    if "other_system" in typed and given["pairwise"] is None:
        problems.append("--other-system: there are no other answers. Pass --pairwise OTHER.jsonl, or leave it out.")
    if not any(map(is_address, judges)):
        problems += [f"{_AT_ADDRESSES[name]}: for a judge at an address, and {', '.join(judges)} is none. Leave it out." for name in typed if name in _AT_ADDRESSES]  # fmt: skip
    elif "key_from" in typed and not os.environ.get(given["key_from"]):
        problems.append(f"--key-from {given['key_from']}: no such environment variable, or empty. Set it, or leave --key-from out.")  # fmt: skip
    if all(map(is_address, judges)):
        problems += [f"{_OF_LOCAL_MODELS[name]}: for a judge that is loaded here, and {', '.join(judges)} is at an address. Leave it out." for name in typed if name in _OF_LOCAL_MODELS]  # fmt: skip
    if problems:
        raise RecipeError("judge", problems)


def _open_judges(judges: Sequence[str], given: Mapping[str, Any]) -> list[Judge]:
    models = _models(judges, given["models"])
    opened = [open_judge(name, model, given) for name, model in zip(judges, models, strict=True)]
    names = [judge.name for judge in opened]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"--judge: {', '.join(twice)} given twice, which would agree with itself. Pass another judge."
        )
    return opened


def is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _models(judges: Sequence[str], models: tuple[str, ...]) -> list[str | None]:
    """Return the model to ask each judge for; None for a local one, and where it is left to the server."""
    addresses = sum(map(is_address, judges))
    if len(models) not in (0, 1, addresses):
        raise RecipeError(f"--model: {len(models)} models for {addresses} address{'es' * (addresses != 1)}. Pass it once, or once for each, in their order.")  # fmt: skip
    left = iter(models * addresses if len(models) == 1 else models)
    return [next(left, None) if is_address(name) else None for name in judges]


def open_judge(name: str, model: str | None, given: Mapping[str, Any], **more: Any) -> Judge:
    """Open a judge; `more` goes to one at an address."""
    from smolmlx.evals.judging import EndpointJudge, LocalJudge

    if is_address(name):
        key = os.environ.get(given["key_from"]) or "none"  # a server of one's own often wants no key
        return EndpointJudge(name, model, key=key, concurrency=given["concurrency"], retries=given["retries"], seconds=given["timeout"], **more)  # fmt: skip
    from smolmlx.backend import Loading
    from smolmlx.data.chat import Tokenizer
    from smolmlx.models import find_model

    base = find_model(name)
    choice = options.choose(given["backend"], given["device"])
    tokenizer = Tokenizer(base.folder)
    return LocalJudge(name, choice.backend.generator(base, None, tokenizer, Loading(choice.device)), tokenizer)


def _read_items(outputs: str, given: Mapping[str, Any]) -> list[Item]:
    items = _read_rows(outputs, given["system"])[: given["limit"]]
    if given["pairwise"] is None:
        return items
    same = given["other_system"] or given["system"]
    if Path(outputs).resolve() == Path(given["pairwise"]).resolve() and same == given["system"]:
        raise RecipeError(f"--pairwise {given['pairwise']}: the same answers twice. Pass --other-system, or another file.")  # fmt: skip
    others = {item.id: item for item in _read_rows(given["pairwise"], same)}
    missing = [f"{item.id}: not in {given['pairwise']}" for item in items if item.id not in others]
    differ = [f"{item.id}: another input in {given['pairwise']}" for item in items if item.id in others and others[item.id].input != item.input]  # fmt: skip
    if missing or differ:
        raise DataError("--pairwise: rows must have the same ids and inputs", [*missing, *differ])
    return [replace(item, other=others[item.id].answer) for item in items]


def _read_rows(name: str, system: str | None) -> list[Item]:
    """Return every row; raises DataError with all rows that lack an input or an answer, RecipeError for an unknown system."""
    from smolmlx.data.formats import read_rows
    from smolmlx.evals.judge import Item

    path = Path(name)
    if not path.is_file():
        raise DataError(f"{name}: no such file. Write one with `smolmlx eval --out` or `smolmlx generate --output`.")
    problems: list[str] = []
    found: dict[str, Item] = {}
    systems: dict[str, None] = {}
    for number, (where, raw) in enumerate(read_rows([path], problems), 1):
        key = str(raw.get("id", f"row-{number:04d}"))
        systems |= dict.fromkeys(raw["answers"] if isinstance(raw.get("answers"), dict) else ())
        asked, answer = _text(raw.get("input", raw.get("prompt"))), _answer(raw, system)
        if asked is None:
            problems.append(f"{where}: no text in 'input' or 'prompt' (columns: {', '.join(raw)})")
        elif isinstance(answer, Problem):
            problems.append(f"{where}: {answer.text}")
        elif key in found:
            problems.append(f"{where}: duplicate id '{key}'")
        else:
            found[key] = Item(key, asked, str(raw.get("reference") or ""), answer, group=str(raw.get("group") or ""))
    if system and systems and system not in systems:
        raise RecipeError(f"{name}: no system '{system}'.{nearest(system, systems)} There are: {', '.join(systems)}.")
    if problems or not found:
        raise DataError(name, problems or ["no rows"])
    return list(found.values())


class Problem:
    """Why a row has no answer."""

    def __init__(self, text: str) -> None:
        self.text = text


def _text(value: Any) -> str | None:
    """Return a text, or the messages of a prompt as one."""
    if isinstance(value, list):
        return "\n".join(str(turn.get("content", "")) for turn in value if isinstance(turn, dict))
    return value if isinstance(value, str) else None


def _answer(raw: Mapping[str, Any], system: str | None) -> str | Problem:
    answers = raw.get("answers")
    if isinstance(answers, dict):
        if system is None and len(answers) != 1:
            return Problem(f"answers of {', '.join(answers)}; choose with --system")
        name = system or next(iter(answers))
        return answers[name] if isinstance(answers.get(name), str) else Problem(f"no answer of '{name}' (there are: {', '.join(answers)})")  # fmt: skip
    value = raw.get("answer", raw.get("output"))
    return value if isinstance(value, str) else Problem(f"no text in 'answer', 'answers' or 'output' (columns: {', '.join(raw)})")  # fmt: skip


def _show(result: Mapping[str, Any], folder: Path) -> None:
    from smolmlx import console

    for found in result["judges"]:
        rows = [(name.replace("_", " "), f"{m['mean']:.2f} [{m['low']:.2f}, {m['high']:.2f}]") for name, m in found.get("means", {}).items()]  # fmt: skip
        if "wins" in found:
            rows += [(name, f"{found[name]}") for name in ("wins", "losses", "ties")]
        if found.get("equal_answers"):
            rows.append(("equal answers", f"{found['equal_answers']}, ties without being asked about"))
        if "orders_agree" in found:
            rows.append(("orders agree", f"{found['orders_agree']:.0%}"))
        if gap := found.get("win_minus_loss"):
            rows.append(("wins - losses", f"{gap['mean']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]"))
        rows.append(("scored", f"{found['scored']}" + (f" in {found['groups']} groups" if found.get("groups") else "")))
        rows += [(name, str(found[name])) for name in ("nonsense", "failed") if found[name]]
        cost = "" if found["cost"] is None else f", ${found['cost']:.4f}"
        rows.append(("tokens", f"{found['prompt_tokens']:,} + {found['completion_tokens']:,}{cost}"))
        if count := found["without_usage"]:
            rows.append(("cost", f"unknown: {count} {'reply' if count == 1 else 'replies'} came without usage"))
        console.table(rows, title=found["judge"])
    for pair in result.get("agreement", []):
        console.result(f"{' and '.join(pair['judges'])}: {_agreed(pair)}")
    console.result(f"\nEvery reply: {folder / 'ledger.jsonl'}")


def _agreed(pair: Mapping[str, Any]) -> str:
    if not pair["rows"]:
        return "nothing that both judged"
    if "within_1" not in pair:
        return f"{pair['equal']:.0%} of verdicts equal, over {pair['rows']} pairs"
    return f"{pair['equal']:.0%} of marks equal, {pair['within_1']:.0%} within 1, over {pair['rows']} answers"
