"""From rows to token rows: masks, over-long rows, and an account of everything that cannot be trained as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from smolmlx.data.chat import Encoded, HistoryRewritten, Rendered, Tokenizer, encode_rendered, find_spans
from smolmlx.data.formats import Example, Raw
from smolmlx.errors import DataError

TOO_LONG = "longer than max_length"
NO_TARGET = "no supervised token"
CUT_PROMPT = "prompt cut from the left"
SPLIT_ROWS = "answer continued in another row"
LAST_TURN = "trained on the last turn only"
EMPTY_TURN = "empty assistant turn, not trained"
CONTROL = "control token inside a message"  # the model reads it as the real one, such as the end of a turn
MAX_PROBLEMS = 20  # named at once; then the rest of the rows is not looked at
LOST = (TOO_LONG, NO_TARGET)
"""Reasons for which a row is not trained at all."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows become tokens; part of the cache key."""

    max_length: int
    loss_on: Literal["assistant", "completion", "all", "pair"] = "assistant"
    """pair: both answers of a preference row, each in a row of its own (see `pairs`)."""
    history: Literal["refuse", "last_turn"] = "refuse"
    overlong: Literal["drop", "truncate_prompt", "split"] = "drop"
    chunks: bool = False
    """Join all text into rows of exactly max_length tokens (pretraining)."""
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Account:
    """What happened to the rows, in numbers."""

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> where it was met first."""

    def note(self, reason: str, where: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    @property
    def lost(self) -> int:
        return sum(self.reasons[reason] for reason in LOST)


def encode_rows(
    examples: Iterable[Example], tokenizer: Tokenizer, how: Encoding, account: Account
) -> Iterator[Encoded]:
    """Yield token rows of at most `how.max_length` tokens; `account` is filled as they pass.

    Raises:
        DataError: rows whose template rewrites history (with `history: refuse`), or that cannot be rendered, the first
            twenty of them named.
    """
    if how.chunks:
        yield from _chunks(examples, tokenizer, how.max_length, account)
        return
    problems: list[str] = []
    for example in examples:
        account.rows += 1
        try:
            for encoded in _encode_one(example, tokenizer, how, account):
                if any(encoded.mask[1:]):
                    yield encoded
                else:
                    account.note(NO_TARGET, example.where)
        except DataError as error:
            problems.append(f"{example.where}: {error}.")
            if len(problems) == MAX_PROBLEMS:
                raise DataError(f"rows and chat template do not fit, the first {MAX_PROBLEMS}", problems) from error
    if problems:
        raise DataError("rows and chat template do not fit", problems)


def _encode_one(example: Example, tokenizer: Tokenizer, how: Encoding, account: Account) -> Iterator[Encoded]:
    try:
        encoded = encode_example(example, tokenizer, how, account)
    except NothingToLearn:
        account.note(NO_TARGET, example.where)
        return
    if len(encoded.ids) <= how.max_length:
        yield encoded
    elif how.overlong == "split":
        windows = list(split_row(encoded, how.max_length))
        if not any(encoded.mask[: how.max_length]):
            account.note(CUT_PROMPT if windows else NO_TARGET, example.where)
        if len(windows) > 1:
            account.note(SPLIT_ROWS, example.where)
        yield from windows
    else:
        shorter = _cut_prompt(example, tokenizer, how, encoded) if how.overlong == "truncate_prompt" else None
        account.note(CUT_PROMPT if shorter else TOO_LONG, example.where)
        if shorter:
            yield shorter


class NothingToLearn(DataError):
    """The row has no assistant turn, or none that says anything."""


def encode_example(example: Example, tokenizer: Tokenizer, how: Encoding, account: Account | None = None) -> Encoded:
    """Tokenize one row whole, whatever its length.

    Raises:
        DataError: the chat template and the row do not go together.
    """
    if example.text is not None:
        ids = encode_document(example.text, tokenizer)
        return Encoded(ids, [True] * len(ids), (len(ids),))
    messages = (*example.messages, *example.chosen)  # a preference row is supervised by its chosen answer
    if not any(message["role"] == "assistant" for message in messages):
        raise NothingToLearn("no assistant turn")
    last_only = how.loss_on == "completion"
    try:
        rendered = find_spans(tokenizer, messages, last_only=last_only, variables=how.template_args)
    except HistoryRewritten:
        if how.history == "refuse":
            raise
        last_only = True
        rendered = find_spans(tokenizer, messages, last_only=True, variables=how.template_args)
    spans = rendered.spans[-1:] if example.chosen else rendered.spans
    answers = [message for message in messages if message["role"] == "assistant"][-len(spans) :]
    kept = tuple(span for span, answer in zip(spans, answers, strict=True) if _says_something(answer))
    if not kept:  # trained, it would teach to answer with an end of turn
        raise NothingToLearn("no answer")
    rendered = Rendered(rendered.text, kept)
    if account is not None:
        found = (
            (LAST_TURN, last_only and how.loss_on != "completion"),
            (EMPTY_TURN, len(kept) < len(spans)),
            (CONTROL, any(tokenizer.holds_control_token(message.get("content") or "") for message in messages)),
        )
        for reason, holds in found:
            if holds:
                account.note(reason, example.where)
    encoded = encode_rendered(tokenizer, rendered)
    if how.loss_on == "all":
        return Encoded(encoded.ids, [True] * len(encoded.ids), encoded.turn_ends)
    return encoded


_ALSO_SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def _says_something(answer: Raw) -> bool:
    """Whether an assistant turn has text, or anything else (tool calls, reasoning), that can be learned."""
    content = answer.get("content")
    told = content.strip() if isinstance(content, str) else content
    return bool(told) or any(answer.get(key) for key in _ALSO_SAID)


def encode_document(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenize plain text: what the tokenizer puts in front (a BOS, once) and one end-of-document token behind."""
    ids = tokenizer.encode(text, special=True)
    bos = tokenizer.special("bos_token")
    if bos and len(ids) > 1 and ids[0] == ids[1] == tokenizer.token_id(bos):
        ids = ids[1:]
    end = document_end(tokenizer)
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    return ids


def document_end(tokenizer: Tokenizer) -> int | None:
    """The token between documents: <|endoftext|> where the vocabulary has it, since eos may be the end of a chat turn."""
    found = tokenizer.token_id("<|endoftext|>")
    return found if found is not None else (tokenizer.eos_ids[0] if tokenizer.eos_ids else None)


def split_row(encoded: Encoded, max_length: int) -> Iterator[Encoded]:
    """Cut an over-long row into windows so that every supervised token is supervised exactly once.

    Each window after the first repeats a quarter of `max_length` as context that is not trained.
    """
    context = max_length // 4
    done = 0
    while done < len(encoded.ids):
        start = max(0, done - context)
        end = min(start + max_length, len(encoded.ids))
        mask = [i >= done and supervised for i, supervised in enumerate(encoded.mask[start:end], start)]
        if any(mask):
            yield Encoded(encoded.ids[start:end], mask)
        done = end


def _cut_prompt(example: Example, tokenizer: Tokenizer, how: Encoding, encoded: Encoded) -> Encoded | None:
    """Shorten the prompt from the left until the row fits; None if it cannot."""
    if example.text is not None:
        return None
    for _ in range(4):  # cutting moves token boundaries a little, so a second pass may be needed
        shorter = shorten_prompt(example, tokenizer, len(encoded.ids) - how.max_length)
        if shorter is None:
            return None
        example, encoded = shorter, encode_example(shorter, tokenizer, how)
        if len(encoded.ids) <= how.max_length:
            return encoded
    return None


def shorten_prompt(example: Example, tokenizer: Tokenizer, excess: int) -> Example | None:
    """Take `excess` tokens off the left of the longest message that is not the assistant's; None where it has too few.

    Rules come first in a system message, so it is cut only where no other message is long enough.
    """
    messages = [dict(message) for message in example.messages]
    prompts = [m for m in messages if m["role"] != "assistant" and isinstance(m.get("content"), str)]
    for message in sorted(prompts, key=lambda m: (m["role"] in ("system", "developer"), -len(m["content"]))):
        offsets = tokenizer.fast.encode(message["content"], add_special_tokens=False).offsets
        if excess < len(offsets):
            message["content"] = message["content"][offsets[excess][0] :].lstrip()
            return replace(example, messages=tuple(messages))
    return None


def _chunks(examples: Iterable[Example], tokenizer: Tokenizer, length: int, account: Account) -> Iterator[Encoded]:
    """Join documents end to end and cut rows of `length` tokens; the last row is what is left."""
    buffer: list[int] = []
    for example in examples:
        account.rows += 1
        if example.text is None:
            raise DataError(
                f"{example.where}: stage pretrain wants text rows; this row holds messages. Use stage: sft."
            )
        buffer += encode_document(example.text, tokenizer)
        while len(buffer) >= length:
            yield Encoded(buffer[:length], [True] * length)
            del buffer[:length]
    if len(buffer) > 1:
        yield Encoded(buffer, [True] * len(buffer))
