"""From preference rows to token rows: both answers of a pair, each behind the same prompt, or neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from smolmlx.data.chat import Encoded, Message, Rendered, Tokenizer, encode_rendered, find_spans
from smolmlx.data.encode import CONTROL, CUT_PROMPT, NO_TARGET, TOO_LONG, Account, Encoding, shorten_prompt
from smolmlx.data.formats import Example, is_empty
from smolmlx.errors import DataError

Sides = tuple[Encoded, Encoded]


def encode_pairs(
    examples: Iterable[Example], tokenizer: Tokenizer, how: Encoding, account: Account
) -> Iterator[Encoded]:
    """Yield the chosen and then the rejected row of every pair: row 2i and row 2i + 1 belong together.

    Supervised are the answers' tokens with their end-of-turn token. A pair of which either row is longer than
    `how.max_length` is dropped whole, or has its prompt cut on both sides alike; answers are never cut.

    Raises:
        DataError: rows that are no pairs, up to 20 of them named; or one that the chat template cannot render.
    """
    problems: list[str] = []
    for example in examples:
        account.rows += 1
        sides, fault = None, find_fault(example)
        if fault is None:
            try:
                sides = _fit(example, tokenizer, how, account)
            except DataError as error:
                raise DataError(f"{example.where}: {error}.") from error
            if sides is not None and sides[0].ids == sides[1].ids:  # e.g. by spaces that the template trims
                fault = (
                    "chosen and rejected are the same answer once the chat template has written them. Delete the row"
                )
        if fault is not None:
            problems.append(f"{example.where}: {fault}")
        if not problems:  # else the run will be refused; the rest is read for its problems alone
            yield from sides or ()
    if problems:
        raise DataError("pairs that cannot be compared (`smolmlx data prepare` drops such rows)", problems)


def find_fault(example: Example) -> str | None:
    """Return why a row is no pair of answers to one prompt, or None."""
    if not example.chosen or not example.rejected:
        return "one answer where two are needed: give columns prompt, chosen and rejected"
    if any(map(is_empty, example.messages)):
        return "a turn of the prompt is empty: nothing is asked"
    for name, side in (("chosen", example.chosen), ("rejected", example.rejected)):
        if side[0]["role"] not in ("assistant", "tool"):
            return f"{name} begins with a {side[0]['role']} turn that is not the prompt's: give the answer alone, or the prompt's turns and then the answer"
        if side[-1]["role"] != "assistant":
            return f"{name} ends with a {side[-1]['role']} turn; it should end with the answer"
        if any(map(is_empty, side)):
            return f"{name} is empty: nothing to prefer or to avoid"
    return "chosen and rejected are the same answer" if example.chosen == example.rejected else None


def _fit(example: Example, tokenizer: Tokenizer, how: Encoding, account: Account) -> Sides | None:
    """Return both sides within `how.max_length`, or None where the pair is dropped; `account` says so."""
    sides: Sides | None = _encode_both(example, tokenizer, how)
    assert sides is not None
    turns = (*example.messages, *example.chosen, *example.rejected)
    if any(tokenizer.holds_control_token(turn.get("content") or "") for turn in turns):
        account.note(CONTROL, example.where)
    excess = _excess(sides, how)
    if excess > 0:
        sides = _cut_prompt(example, tokenizer, how, excess) if how.overlong == "truncate_prompt" else None
        account.note(TOO_LONG if sides is None else CUT_PROMPT, example.where)
    if sides is not None and not all(any(side.mask[1:]) for side in sides):
        account.note(NO_TARGET, example.where)
        return None
    return sides


def _encode_both(example: Example, tokenizer: Tokenizer, how: Encoding) -> Sides:
    chosen, rejected = (_render(example.messages, side, tokenizer, how) for side in (example.chosen, example.rejected))
    if _prompt_of(chosen) != _prompt_of(rejected):
        raise DataError(
            "the chat template renders the prompt differently for the two answers, so they cannot be compared. Mend the "
            "template (it must not look at the answer while it writes the prompt), or set model.chat_template"
        )
    return encode_rendered(tokenizer, chosen), encode_rendered(tokenizer, rejected)


def _render(prompt: tuple[Message, ...], answer: tuple[Message, ...], tokenizer: Tokenizer, how: Encoding) -> Rendered:
    """Render a side; its spans are the assistant turns of the answer."""
    turns = sum(message["role"] == "assistant" for message in answer)
    one = turns == 1 or how.history == "last_turn"
    found = find_spans(tokenizer, (*prompt, *answer), last_only=one, variables=how.template_args)
    return Rendered(found.text, found.spans[-1:] if one else found.spans[-turns:])


def _prompt_of(rendered: Rendered) -> str:
    return rendered.text[: rendered.spans[0][0]]


def _excess(sides: Sides, how: Encoding) -> int:
    return max(len(side.ids) for side in sides) - how.max_length


def _cut_prompt(example: Example, tokenizer: Tokenizer, how: Encoding, excess: int) -> Sides | None:
    """Shorten the prompt of both sides from the left until the longer one fits; None if it cannot."""
    for _ in range(4):  # cutting moves token boundaries a little, so a second pass may be needed
        shorter = shorten_prompt(example, tokenizer, excess)
        if shorter is None:
            return None
        example, sides = shorter, _encode_both(shorter, tokenizer, how)
        excess = _excess(sides, how)
        if excess <= 0:
            return sides
    return None
