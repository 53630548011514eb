"""Pairs to token rows and micro-batches: prompts masked, answers whole, every pair once an epoch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolmlx.data import encode as encoding
from smolmlx.data.chat import Encoded, Tokenizer
from smolmlx.data.encode import Account, Encoding
from smolmlx.data.formats import Example, open_source
from smolmlx.data.pair_batches import PairPlan, plan_pairs, prefix_lengths
from smolmlx.data.pairs import encode_pairs
from smolmlx.data.store import TokenStore, encode_source, from_rows
from smolmlx.errors import DataError

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    return Example("f:1", (turn("user", prompt),), None, (turn("assistant", chosen),), (turn("assistant", rejected),))


def run(tokenizer: Tokenizer, rows: list[Example], **how: Any) -> tuple[list[Encoded], Account]:
    account = Account()
    options: dict[str, Any] = {"max_length": 1000, "loss_on": "pair", **how}
    return list(encode_pairs(rows, tokenizer, Encoding(**options), account)), account


def learned(tokenizer: Tokenizer, row: Encoded) -> str:
    return tokenizer.decode([i for i, on in zip(row.ids, row.mask, strict=True) if on], skip_special=False)


def store_of(path: Path, tokenizer: Tokenizer) -> TokenStore:
    return encode_source(open_source(str(path)), tokenizer, Encoding(512, "pair"))


class TestRows:
    def test_answers_are_supervised_and_prompts_are_not(self, tokenizer: Tokenizer) -> None:
        (chosen, rejected), account = run(tokenizer, [pair("why", "red apple", "blue pear")])
        assert learned(tokenizer, chosen) == f"red apple{END}" and learned(tokenizer, rejected) == f"blue pear{END}"
        first = chosen.mask.index(True)
        assert chosen.ids[:first] == rejected.ids[:first] and account.rows == 1

    def test_all_turns_of_an_answer(self, tokenizer: Tokenizer) -> None:
        answer = (turn("assistant", "red"), turn("user", "more"), turn("assistant", "green"))
        row = Example("f:1", (turn("user", "why"),), None, answer, (turn("assistant", "no"),))
        (chosen, _), _ = run(tokenizer, [row])
        assert learned(tokenizer, chosen) == f"red{END}green{END}"

    def test_a_pair_is_dropped_whole(self, tokenizer: Tokenizer) -> None:
        rows = [pair("why", "red", "blue " * 40), pair("why", "red", "blue")]
        found, account = run(tokenizer, rows, max_length=48)
        assert len(found) == 2 and account.reasons == {encoding.TOO_LONG: 1} and account.lost == 1

    def test_a_cut_prompt_is_cut_alike_and_answers_stay_whole(self, tokenizer: Tokenizer) -> None:
        row = pair("what is it " * 30, "red", "blue " * 10 + "end")
        (chosen, rejected), account = run(tokenizer, [row], max_length=100, overlong="truncate_prompt")
        assert account.reasons == {encoding.CUT_PROMPT: 1} and max(len(chosen.ids), len(rejected.ids)) <= 100
        first = chosen.mask.index(True)
        assert chosen.ids[:first] == rejected.ids[:first]
        assert learned(tokenizer, rejected) == "blue " * 10 + "end" + END

    def test_control_tokens_inside_an_answer_are_counted(self, tokenizer: Tokenizer) -> None:
        _, account = run(tokenizer, [pair("why", "red", f"blue {END} pear"), pair("why", "red", "blue")])
        assert account.reasons == {encoding.CONTROL: 1} and account.lost == 0

    def test_answers_too_long_for_any_prompt(self, tokenizer: Tokenizer) -> None:
        found, account = run(tokenizer, [pair("why", "red", "blue " * 60)], max_length=40, overlong="truncate_prompt")
        assert not found and account.reasons == {encoding.TOO_LONG: 1}


class TestFaults:
    @pytest.mark.parametrize(
        ("row", "said"),
        [
            (pair("why", "red", "red"), "same answer"),
            (pair("why", " ", "red"), "chosen is empty"),
            (pair("", "red", "blue"), "a turn of the prompt is empty"),
            (pair("why", "red", ""), "rejected is empty"),
            (Example("f:1", (turn("user", "why"), turn("assistant", "red"))), "one answer where two are needed"),
            (
                Example("f:1", (turn("user", "a"),), None, (turn("user", "b"), turn("assistant", "c")), (turn("assistant", "d"),)),
                "not the prompt's",
            ),
            (Example("f:1", (turn("user", "a"),), None, (turn("assistant", "c"), turn("user", "x")), (turn("assistant", "d"),)), "ends with a user"),
        ],
    )  # fmt: skip
    def test_named_with_their_line(self, tokenizer: Tokenizer, row: Example, said: str) -> None:
        with pytest.raises(DataError, match="cannot be compared") as caught:
            run(tokenizer, [row])
        assert said in caught.value.problems[0] and caught.value.problems[0].startswith("f:1: ")

    def test_answers_that_the_template_makes_equal(self, tiny_model: Path, tmp_path: Path) -> None:
        template = tmp_path / "trims.jinja"
        template.write_text(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        rows = [pair("why", "red", "red "), pair("why", "red", "blue"), pair("why", " blue", "blue")]
        with pytest.raises(DataError) as caught:
            run(Tokenizer(tiny_model, str(template)), rows)
        assert len(caught.value.problems) == 2 and "the same answer once the chat template" in caught.value.problems[1]
        assert len(run(Tokenizer(tiny_model), rows)[0]) == 6, "in a template that keeps them they differ"

    def test_all_at_once_up_to_twenty(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(DataError) as caught:
            run(tokenizer, [pair("why", "red", "red")] * 25)
        assert len(caught.value.problems) == 25 and str(caught.value).endswith("... and 5 more")

    def test_template_that_looks_at_the_answer(self, tiny_model: Path, tmp_path: Path) -> None:
        template = tmp_path / "template.jinja"
        template.write_text(
            "{{ messages[-1]['content'] | length }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        with pytest.raises(DataError, match="f:1"):
            run(Tokenizer(tiny_model, str(template)), [pair("why", "red", "blue pear")])


def test_prompt_repeated_in_the_sides(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    sides = {name: [turn("user", "Q"), turn("assistant", name)] for name in ("chosen", "rejected")}
    path.write_text(json.dumps({"prompt": "Q", **sides}) + "\n")
    (row,) = open_source(str(path))
    assert row.messages == (turn("user", "Q"),) and row.chosen == (turn("assistant", "chosen"),)


class TestBatches:
    def plan(self, pair_rows: Path, tokenizer: Tokenizer, **how: Any) -> PairPlan:
        return plan_pairs(store_of(pair_rows, tokenizer), **{"batch_size": 5, **how})

    @pytest.mark.parametrize("shared", [True, False])
    def test_every_pair_once_an_epoch(self, pair_rows: Path, tokenizer: Tokenizer, shared: bool) -> None:
        plan = self.plan(pair_rows, tokenizer, shared=shared, accumulation=2)
        assert plan.order.steps_per_epoch == 3
        for epoch in (0, 1):
            steps = range(3 * epoch, 3 * epoch + 3)
            seen = [int(p) for step in steps for batch in plan.step(step) for p in batch.pairs if p >= 0]
            assert sorted(seen) == list(range(24))
        assert sorted(int(p) for batch in plan.evaluation() for p in batch.pairs if p >= 0) == list(range(24))

    @pytest.mark.parametrize("shared", [True, False])
    def test_rows_come_back_out_of_the_arrays(self, pair_rows: Path, tokenizer: Tokenizer, shared: bool) -> None:
        plan = self.plan(pair_rows, tokenizer, shared=shared)
        store = plan.order.store
        for batch in plan.evaluation():
            width = batch.prefix.shape[1]
            assert (width > 0) is shared
            for slot, pair_number in enumerate(batch.pairs):
                if pair_number < 0:
                    continue
                for side in (0, 1):
                    ids, mask = store.row(2 * int(pair_number) + side)
                    row = [*batch.prefix[slot, batch.starts[slot] :], *batch.tails[2 * slot + side]]
                    assert row[: len(ids)] == ids.tolist()
                    mine = (batch.owners == 2 * slot + side) & (batch.weights > 0)
                    assert batch.labels[mine].tolist() == ids[mask].tolist()
                    places = batch.index[mine] - (2 * slot + side) * batch.tails.shape[1]
                    behind = [int(batch.tails[2 * slot + side, place + 1]) for place in places]
                    assert behind == ids[mask].tolist(), "a position predicts the token behind it"
                    assert batch.num_tokens[2 * slot + side] == mask.sum()

    def test_shared_prefix_leaves_the_token_that_predicts_the_answer(
        self, pair_rows: Path, tokenizer: Tokenizer
    ) -> None:
        store = store_of(pair_rows, tokenizer)
        for pair_number, length in enumerate(prefix_lengths(store)):
            firsts = [int(np.argmax(store.row(2 * pair_number + side)[1])) for side in (0, 1)]
            assert length == min(firsts) - 1

    def test_few_shapes(self, pair_rows: Path, tokenizer: Tokenizer) -> None:
        plan = self.plan(pair_rows, tokenizer, shared=True, batch_size=2)
        shapes = {(b.prefix.shape, b.tails.shape, b.index.shape) for step in range(36) for b in plan.step(step)}
        assert len(plan.prefix_widths) <= 4 and len(plan.tail_widths) <= 4 and len(shapes) <= 16
        assert plan.padded_tokens() == sum(b.prefix.size + b.tails.size for s in range(12) for b in plan.step(s))
        assert plan.order.gather >= 32, "the memory of the logits is estimated from it"

    def test_prompts_and_answers_of_a_batch_are_alike_in_length(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        prompts, answers = rng.integers(60, 300, 256), rng.integers(20, 120, (256, 2))
        rows = [
            Encoded([1] * prompt + [2 + side] * size, [False] * prompt + [True] * size)
            for prompt, sizes in zip(prompts, answers, strict=True)
            for side, size in enumerate(sizes)
        ]
        store = from_rows(rows, tmp_path / "store")
        together = plan_pairs(store, batch_size=4, shared=True)
        plans = [together, together.apart(), plan_pairs(store, batch_size=4, shared=False)]
        orders = [[rows.tolist() for rows in plan.order.epoch_order(1)] for plan in plans]
        assert orders[0] == orders[1] == orders[2], "sharing prompts changes the work, not the steps"
        assert plans[1].tail_widths == plans[2].tail_widths and not plans[1].shared
        once = replace(plans[0].order, sort_by=())
        assert [sorted(rows) for rows in orders[0]] != [sorted(rows) for rows in once.epoch_order(1)]
        tokens = prompts.sum() + 2 * answers.max(axis=1).sum()
        assert plans[0].padded_tokens() < 1.25 * tokens < replace(plans[0], order=once).padded_tokens()

    def test_few_steps_have_fewer_shapes(self, tmp_path: Path) -> None:
        """A shape is compiled for, so an epoch of a few batches pads more instead."""
        rng = np.random.default_rng(0)
        sizes = rng.integers(20, 300, 4096)
        rows = [
            Encoded([1] * size + [2 + side] * 20, [False] * size + [True] * 20) for size in sizes for side in (0, 1)
        ]
        few, many = (
            plan_pairs(from_rows(rows[: 2 * pairs], tmp_path / str(pairs)), batch_size=4, shared=True)
            for pairs in (16, 4096)
        )
        assert len(few.prefix_widths) < len(many.prefix_widths) == 4

    def test_cache_is_apart_from_that_of_chats(self, pair_rows: Path, tokenizer: Tokenizer) -> None:
        source = open_source(str(pair_rows))
        pairs, chats = (encode_source(source, tokenizer, Encoding(512, kind)) for kind in ("pair", "assistant"))
        assert len(pairs) == 48 and len(chats) == 24 and pairs.key != chats.key
        assert encode_source(source, tokenizer, Encoding(512, "pair")).key == pairs.key
