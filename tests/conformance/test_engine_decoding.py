"""How every engine decodes: constraints, sampling options against numpy, stop texts, shared beginnings, adapters."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, Field

from lab import Lab, sentence
from smolmlx import backend
from smolmlx.backend import Completion, Decoding, OneOf, Regex
from smolmlx.errors import RecipeError
from smolmlx.generation.sampling import Draws, choose, gather
from smolmlx.tasks.schemas import ANSWERS

NEVER = (319,)


class Point(BaseModel):
    """A small schema with text, a number, a choice and a list."""

    name: str = Field(max_length=12)
    size: int = Field(ge=0, le=99)
    kind: bool | None
    tags: list[str] = Field(min_length=1, max_length=2)


@pytest.fixture
def prompts(lab: Lab) -> list[list[int]]:
    """Seven prompts of different lengths and last words."""
    tokenizer = lab.plan().tokenizer
    return [tokenizer.encode(sentence(3 * i)) for i in range(7)]


@pytest.fixture
def generator(lab: Lab) -> backend.Generator:
    return lab.generator(lab.plan())


def run(generator: backend.Generator, prompts: list[list[int]], **how: object) -> list[Completion]:
    found = list(generator.generate(prompts, Decoding(**{"max_tokens": 12, **how})))  # type: ignore[arg-type]
    return sorted(found, key=lambda completion: completion.index)


class TestSchema:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_every_answer_is_valid(
        self, generator: backend.Generator, prompts: list[list[int]], temperature: float
    ) -> None:
        found = run(generator, prompts * 3, schema=Point, max_tokens=60, temperature=temperature, batch_size=4)
        for completion in found:
            assert completion.finished and len(completion.ids) <= 60
            Point.model_validate_json(completion.text)
            assert completion.num_forced > 0
        assert temperature == 0 or len({c.text for c in found}) > 10

    @pytest.mark.parametrize("task", ANSWERS)
    def test_answers_of_every_task_are_whole_however_few_tokens_there_are(
        self, lab: Lab, generator: backend.Generator, prompts: list[list[int]], task: str
    ) -> None:
        """Hundreds of draws over all tasks on one of the real engines; the numpy one has a thousand in tests/core."""
        schema = ANSWERS[task]
        many = prompts * (5 if lab.name == "mlx" else 1)
        found = run(generator, many, schema=schema, max_tokens=90, temperature=1.0, batch_size=len(many))
        assert len(found) == len(many)
        for completion in found:
            assert completion.finished
            schema.model_validate_json(completion.text)

    def test_does_not_depend_on_the_batch(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        how = {"schema": Point, "max_tokens": 60, "temperature": 1.0, "seed": 3}
        together = [c.ids for c in run(generator, prompts, **how)]
        assert [c.ids for c in run(generator, prompts, **how, batch_size=2)] == together
        assert [c.ids for c in run(generator, prompts[:3], **how)] == together[:3]

    def test_forced_tokens_are_read_by_the_model(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        """What is chosen behind forced tokens is the likelier of two, given all that stands before."""
        options = ("red stone apple", "red stone river")
        tokenizer = generator.tokenizer  # type: ignore[attr-defined]
        for completion in run(generator, prompts, schema=OneOf(options), max_tokens=30):
            ids = completion.ids
            ways = {option: tokenizer.encode(option) for option in options}
            fork = next(i for i, (a, b) in enumerate(zip(*ways.values(), strict=False)) if a != b)
            assert completion.num_forced >= len(ids) - 2 and completion.text in options
            if list(ids[:fork]) == ways[options[0]][:fork]:
                logits = generator.logits([*prompts[completion.index], *ids[:fork]])[-1]
                heads = {int(way[fork]) for way in ways.values()}
                if ids[fork] in heads:
                    assert logits[ids[fork]] == max(logits[head] for head in heads)

    def test_regex_and_choice(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        for completion in run(generator, prompts, schema=Regex(r"^[a-f]{2,5}-[0-9]+$"), temperature=1.0):
            assert re.fullmatch(r"[a-f]{2,5}-[0-9]+", completion.text), "whole even where max_tokens cut it"
        texts = [
            c.text for c in run(generator, prompts, schema=OneOf(("red", "green", 'two\n"words')), temperature=1.0)
        ]
        assert set(texts) <= {"red", "green", 'two\n"words'}

    def test_a_single_choice_needs_no_step(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        for completion in run(generator, prompts, schema=OneOf(("stone",))):
            assert completion.text == "stone" and completion.num_forced == len(completion.ids) and completion.finished

    def test_forced_text_is_streamed(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        pieces: list[str] = []
        how = Decoding(schema=OneOf(("stone",)))
        assert list(generator.generate(prompts[:1], how, lambda index, text: pieces.append(text)))
        assert "".join(pieces) == "stone"

    @pytest.mark.parametrize(
        ("schema", "named"),
        [
            ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
            ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            ({"not": {"type": "string"}}, "not"),
            ({"type": "string", "format": "shoe-size"}, "shoe-size"),
            (Regex("(?=a)b"), "look-ahead"),
            (OneOf(()), "choice"),
        ],
    )
    def test_what_cannot_be_kept_is_refused_by_name(
        self, generator: backend.Generator, prompts: list[list[int]], schema: backend.Constraint, named: str
    ) -> None:
        with pytest.raises(RecipeError, match=re.escape(named)) as caught:
            next(generator.generate(prompts, Decoding(schema=schema)))
        assert caught.value.exit_code == 2

    def test_too_few_tokens_are_refused(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        with pytest.raises(RecipeError, match=r"max_tokens 5"):
            run(generator, prompts, schema=Point, max_tokens=5)


class TestOptions:
    @pytest.mark.parametrize(
        "how",
        [
            {"temperature": 0.8},
            {"temperature": 1.5, "top_k": 5},
            {"temperature": 1.5, "top_p": 0.7},
            {"temperature": 1.5, "min_p": 0.2},
            {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
            {"repetition_penalty": 1.8},
            {"temperature": 1.0, "repetition_penalty": 0.6, "top_k": 20},
        ],
        ids=str,
    )
    def test_follow_numpy(self, generator: backend.Generator, prompts: list[list[int]], how: dict[str, float]) -> None:
        """Each token is the one that the numpy statement chooses from the model's logits and the row's draw."""
        for completion in run(generator, prompts[:3], **how, max_tokens=6, seed=4, stop_ids=NEVER):
            settings = Decoding(**how)  # type: ignore[arg-type]
            draws = Draws(4, completion.index)
            ids = list(prompts[completion.index])
            for place, token in enumerate(completion.ids):
                uniform = draws.next() if settings.temperature else 0.0
                flags = np.zeros(320, np.uint8)
                flags[list(completion.ids[:place])] = 1
                seen = np.packbits(flags, bitorder="little").view(np.uint32)[None]
                picks = gather([settings], [uniform], seen=seen if settings.repetition_penalty != 1 else None)
                assert choose(generator.logits(ids)[-1:], picks)[0] == token
                ids.append(token)

    @pytest.mark.parametrize(
        ("extreme", "plain"),
        [
            ({"temperature": 1e-45}, {}),
            ({"temperature": 1.0, "top_p": 1e-300}, {}),
            ({"temperature": 1.0, "top_k": 2**40}, {"temperature": 1.0, "top_k": 320}),
            ({"temperature": 1.0, "min_p": 1e-300}, {"temperature": 1.0}),
            ({"no_repeat_ngram": 2**40}, {}),
        ],
        ids=str,
    )
    def test_extremes_mean_what_they_come_near_to(
        self, generator: backend.Generator, prompts: list[list[int]], extreme: Any, plain: Any
    ) -> None:
        found, wanted = (run(generator, prompts[:3], **how, max_tokens=6, stop_ids=NEVER) for how in (extreme, plain))
        assert found == wanted
        run(generator, prompts[:1], temperature=1.0, seed=2**200)

    @pytest.mark.parametrize("value", [math.inf, math.nan, 1e39])
    @pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_p", "min_p"])
    def test_no_bound_lets_infinity_pass(self, name: str, value: float) -> None:
        with pytest.raises(RecipeError, match=name):
            Decoding(**{name: value})  # type: ignore[arg-type]

    def test_no_ngram_comes_twice(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        free = run(generator, prompts, max_tokens=60, stop_ids=NEVER)
        held = run(generator, prompts, max_tokens=60, stop_ids=NEVER, no_repeat_ngram=2)
        assert any(len(set(zip(c.ids, c.ids[1:], strict=False))) < len(c.ids) - 1 for c in free), "nothing to hold back"
        for completion in held:
            pairs = list(zip(completion.ids, completion.ids[1:], strict=False))
            assert len(set(pairs)) == len(pairs)

    def test_the_prompt_may_be_repeated(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        """The n-grams of the prompt are free: an answer differs only once it repeats itself."""
        (free,) = run(generator, prompts[:1], max_tokens=3, stop_ids=NEVER)
        (held,) = run(
            generator, [[*prompts[0], *free.ids, *prompts[0]]], max_tokens=2, stop_ids=NEVER, no_repeat_ngram=1
        )
        (same,) = run(generator, [[*prompts[0], *free.ids, *prompts[0]]], max_tokens=1, stop_ids=NEVER)
        assert held.ids[0] == same.ids[0]

    def test_stop_text(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        long = run(generator, prompts, max_tokens=30, stop_ids=NEVER)
        stop = long[0].text[5:8]
        for whole, completion in zip(
            long, run(generator, prompts, max_tokens=30, stop_ids=NEVER, stop=(stop,)), strict=True
        ):
            place = whole.text.find(stop)
            assert completion.finished == (place >= 0)
            assert completion.text == (whole.text[:place] if place >= 0 else whole.text)

    @pytest.mark.parametrize("stop", [(), ("e r",)])
    def test_streamed_pieces_add_up(
        self, generator: backend.Generator, prompts: list[list[int]], stop: tuple[str, ...]
    ) -> None:
        pieces: dict[int, list[str]] = {i: [] for i in range(len(prompts))}
        how = Decoding(max_tokens=25, temperature=1.0, stop=stop, stop_ids=NEVER, batch_size=3)
        found = list(generator.generate(prompts, how, lambda index, text: pieces[index].append(text)))
        for completion in found:
            assert "".join(pieces[completion.index]) == completion.text
        assert max(map(len, pieces.values())) > 5, "text comes in pieces, not at the end"

    def test_counts(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        for completion in run(generator, prompts):
            assert completion.num_prompt == len(prompts[completion.index]) and completion.num_forced == 0

    def test_wrong_values_are_all_named(self) -> None:
        with pytest.raises(RecipeError) as caught:
            Decoding(max_tokens=0, top_p=0, min_p=2, stop=("",))
        assert len(caught.value.problems) == 4
        with pytest.raises(RecipeError) as caught:
            Decoding(max_tokens="9", temperature="hot", seed=0.5, top_k=True, stop=(1,))  # type: ignore[arg-type]
        assert len(caught.value.problems) == 5
        for wrong in ("xy", (1,)):
            with pytest.raises(RecipeError, match="expected a list of texts"):
                OneOf(wrong)  # type: ignore[arg-type]

    def test_a_stop_text_would_cut_what_must_be_whole(self) -> None:
        with pytest.raises(RecipeError, match="stop: would cut an answer"):
            Decoding(stop=("e",), schema=OneOf(("yes", "yep")))


class TestBatches:
    def test_rows_enter_as_places_fall_free(
        self, lab: Lab, generator: backend.Generator, prompts: list[list[int]]
    ) -> None:
        """Rows of very different lengths of answer, in few places, and long prompts beside short ones."""
        many = [prompt * (1 + i % 4) for i, prompt in enumerate(prompts * 3)]
        stops = tuple({ids[4] for ids in (c.ids for c in run(generator, many, stop_ids=NEVER))})
        how = {"max_tokens": 40, "stop_ids": stops, "no_repeat_ngram": 3}
        alone = [c.ids for prompt in many for c in run(generator, [prompt], **how)]
        assert lab.name == "toy" or len({len(ids) for ids in alone}) > 2, "answers of different lengths"
        for size in (2, 5, 64):
            assert [c.ids for c in run(generator, many, **how, batch_size=size)] == alone

    def test_a_shared_beginning_changes_nothing(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        head = (prompts[5] * 10)[:40]
        many = [[*head, *prompt] for prompt in prompts] + [[*head, prompts[0][0]]]
        alone = [c.ids for prompt in many for c in run(generator, [prompt], stop_ids=NEVER)]
        assert [c.ids for c in run(generator, many, stop_ids=NEVER)] == alone
        assert [c.ids for c in run(generator, many, stop_ids=NEVER, batch_size=3)] == alone

    def test_prompt_of_one_token(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        many = [prompts[1][:1], prompts[0], prompts[2][:1]]
        alone = [c.ids for prompt in many for c in run(generator, [prompt], stop_ids=NEVER)]
        assert [c.ids for c in run(generator, many, stop_ids=NEVER)] == alone

    def test_prompt_longer_than_one_pass(
        self, lab: Lab, generator: backend.Generator, prompts: list[list[int]]
    ) -> None:
        long = (prompts[3] * 200)[:700]
        (found,) = run(generator, [long], max_tokens=1, stop_ids=NEVER)
        assert found.ids[0] == int(generator.logits(long)[-1].argmax())
        both = run(generator, [long, prompts[0]], max_tokens=3, stop_ids=NEVER)
        assert both[0].ids[:1] == found.ids

    def test_no_prompts(self, generator: backend.Generator) -> None:
        assert list(generator.generate([], Decoding())) == []


def test_adapters_are_switched_on_one_base(lab: Lab, prompts: list[list[int]]) -> None:
    plan = lab.plan(train__max_steps=10)
    first = lab.train(plan).adapter
    second = lab.train(lab.plan(train__max_steps=10, lora__r=2, train__learning_rate=0.03)).adapter
    wanted = {folder: lab.generator(plan, folder).logits(prompts[0]) for folder in (None, first, second)}
    assert np.abs(wanted[first] - wanted[second]).max() > 1e-2
    generator = lab.generator(plan)
    for folder in (first, None, second, first, None, None, second):
        generator.use_adapter(folder)
        assert np.array_equal(generator.logits(prompts[0]), wanted[folder])
        alone = [c.ids for c in run(generator, prompts[:2], max_tokens=4, stop_ids=NEVER)]
        assert alone[0][0] == int(wanted[folder][-1].argmax())


def test_a_refused_adapter_leaves_the_base(lab: Lab, prompts: list[list[int]]) -> None:
    plan = lab.plan(train__max_steps=2)
    adapter = lab.train(plan).adapter
    generator = lab.generator(plan)
    bare = generator.logits(prompts[0])
    generator.use_adapter(adapter)
    with pytest.raises(RecipeError):
        generator.use_adapter(adapter.parent)
    assert np.array_equal(generator.logits(prompts[0]), bare)


def test_engines_draw_alike(lab: Lab, prompts: list[list[int]]) -> None:
    """On one base in float32 the two real engines sample the same tokens from the same seed."""
    if lab.name != "cuda":
        pytest.skip("compared once, from the PyTorch engine's side")
    pytest.importorskip("mlx.core")
    plan = lab.plan()
    other = backend.load("mlx").generator(plan.model, None, plan.tokenizer, backend.Loading("cpu", plan.dtype))
    how = {"temperature": 1.2, "top_p": 0.9, "seed": 2, "stop_ids": NEVER}
    assert [c.ids for c in run(lab.generator(plan), prompts, **how)] == [c.ids for c in run(other, prompts, **how)]
