"""Answers and scores of every engine, against the plainest way to make them: one token at a time from the logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lab import TINY, Lab, make_tiny, sentence
from smolmlx import backend, models
from smolmlx.backend import Decoding
from smolmlx.data.batches import plan_batches
from smolmlx.errors import DataError, RecipeError
from smolmlx.session import Arrays, load_arrays

NEVER = (319,)
"""A stop token that the answers below do not hold, so that they run to their full length."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def write_half(arrays: Arrays, path: Path, dtype: str) -> None:
    """Write a safetensors file of 16-bit floats; numpy has no bfloat16, so its bytes are cut from float32."""
    header: dict[str, object] = {}
    body = b""
    for name, value in arrays.items():
        data = (
            value.astype("<f2").tobytes()
            if dtype == "F16"
            else (value.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        )
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.fixture
def prompts(lab: Lab) -> list[list[int]]:
    """Seven prompts of different lengths and last words."""
    tokenizer = lab.plan().tokenizer
    return [tokenizer.encode(sentence(3 * i)) for i in range(7)]


@pytest.fixture
def generator(lab: Lab) -> backend.Generator:
    return lab.generator(lab.plan())


def answers(generator: backend.Generator, prompts: list[list[int]], **how: object) -> list[tuple[int, ...]]:
    found = list(generator.generate(prompts, Decoding(**{"max_tokens": 12, "stop_ids": NEVER, **how})))  # type: ignore[arg-type]
    assert sorted(completion.index for completion in found) == list(range(len(prompts))), "each prompt is answered once"
    return [completion.ids for completion in sorted(found, key=lambda c: c.index)]


class TestGreedy:
    def test_follows_the_logits(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        for prompt, answer in zip(prompts[:3], answers(generator, prompts[:3]), strict=True):
            ids = list(prompt)
            for token in answer:
                logits = generator.logits(ids)
                assert logits.shape == (len(ids), 320) and logits.dtype == np.float32
                assert token == int(logits[-1].argmax())
                ids.append(token)

    @pytest.mark.parametrize("size", [1, 3, 64])
    def test_does_not_depend_on_the_batch(
        self, generator: backend.Generator, prompts: list[list[int]], size: int
    ) -> None:
        together = answers(generator, prompts, batch_size=7)
        assert len(set(together)) > 1, "the prompts of this test should have different answers"
        assert answers(generator, prompts, batch_size=size) == together
        assert answers(generator, prompts[::-1], batch_size=size) == together[::-1]

    def test_max_tokens(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        long = answers(generator, prompts)
        for most in (1, 5):
            found = list(generator.generate(prompts, Decoding(max_tokens=most, stop_ids=NEVER)))
            assert all(len(c.ids) == most and not c.finished and c.ids == long[c.index][:most] for c in found)

    def test_stop_tokens(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        """An answer ends in front of the first stop token, which is not part of it."""
        long = answers(generator, prompts)
        stops = (long[0][2], long[1][0])
        for completion in generator.generate(prompts, Decoding(max_tokens=12, stop_ids=stops, batch_size=3)):
            whole = long[completion.index]
            end = next((i for i, token in enumerate(whole) if token in stops), None)
            assert completion.finished == (end is not None)
            assert completion.ids == whole[:end]

    def test_stops_at_the_tokenizers_end_by_default(self, lab: Lab, tmp_path: Path) -> None:
        row = json.dumps({"prompt": "green", "completion": "red"}) + "\n"
        (tmp_path / "red.jsonl").write_text(row * 8)
        plan = lab.plan(data__train=str(tmp_path / "red.jsonl"), train__max_steps=30, train__learning_rate=0.03)
        run = lab.train(plan)
        prompt = plan.tokenizer.encode(plan.tokenizer.prompt([{"role": "user", "content": "green"}]))
        (found,) = lab.generator(plan, run.adapter).generate([prompt], Decoding(max_tokens=20))
        assert found.finished and plan.tokenizer.decode(found.ids, skip_special=False) == "red"


class TestSampling:
    how = {"temperature": 1.5, "seed": 5}  # noqa: RUF012 - read only

    def test_depends_on_seed_and_row_alone(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        first = answers(generator, prompts, **self.how)
        assert answers(generator, prompts, **self.how) == first
        assert answers(generator, prompts, **self.how, batch_size=2) == first
        assert answers(generator, prompts[:3], **self.how) == first[:3]
        assert answers(generator, prompts, **{**self.how, "seed": 6}) != first

    def test_rows_with_one_prompt_differ(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        assert len(set(answers(generator, prompts[:1] * 5, **self.how))) > 1

    def test_smallest_nucleus_is_greedy(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        assert answers(generator, prompts, temperature=1.0, top_p=1e-6) == answers(generator, prompts)

    def test_first_token_is_drawn_from_the_model(self, generator: backend.Generator, prompts: list[list[int]]) -> None:
        """Frequencies over 400 draws against the tempered, cut distribution: a chi-square test at one in 10,000."""
        prompt, temperature, top_p = prompts[0], 0.7, 0.5
        how = {"max_tokens": 1, "temperature": temperature, "top_p": top_p, "batch_size": 100}
        drawn = np.array([(*ids, *NEVER)[0] for ids in answers(generator, [prompt] * 400, **how)])
        wanted = np.exp(log_softmax(generator.logits(prompt)[-1] / temperature))
        order = np.argsort(-wanted)
        kept = order[np.cumsum(wanted[order]) - wanted[order] < top_p]
        assert set(drawn.tolist()) <= set(kept.tolist())
        expected = 400 * wanted[kept] / wanted[kept].sum()
        counts = np.array([(drawn == token).sum() for token in kept])
        chi = ((counts - expected) ** 2 / expected).sum()
        freedom = max(1, len(kept) - 1)
        assert chi < freedom + 4 * np.sqrt(2 * freedom) + 8


class TestScore:
    @pytest.mark.parametrize("pack_to", [None, 128])
    def test_equals_the_logits(self, lab: Lab, generator: backend.Generator, pack_to: int | None) -> None:
        """Packed or not, padded or not, each document is scored as if it were alone."""
        store = lab.plan().train.store
        batches = list(plan_batches(store, batch_size=5, pack_to=pack_to).evaluation())
        assert pack_to is None or any(batch.packed for batch in batches)
        for batch, score in zip(batches, generator.score(batches), strict=True):
            assert score.log_probs.shape == score.correct.shape == batch.index.shape
            width = batch.ids.shape[1]
            for place in np.flatnonzero(batch.weights)[:: 1 + len(batch.index) // 12]:
                row, column = divmod(int(batch.index[place]), width)
                inside = np.flatnonzero(batch.segments[row] == batch.segments[row, column])
                ids = batch.ids[row][inside[inside <= column]]
                logits = log_softmax(generator.logits(ids.tolist())[-1])
                label = int(batch.labels[place])
                assert score.log_probs[place] == pytest.approx(logits[label], abs=2e-5)
                assert bool(score.correct[place]) == (label == int(logits.argmax()))

    def test_equal_logits_are_no_knowledge(self, lab: Lab, tiny_model: Path, tmp_path: Path) -> None:
        """A model that collapsed has no token above another, and would be right everywhere if a tie counted."""
        shutil.copytree(tiny_model, tmp_path / "flat")
        weights = tmp_path / "flat" / "model.safetensors"
        save_file({name: np.zeros_like(array) for name, array in load_file(weights).items()}, weights, {"format": "pt"})
        plan = lab.plan(model__id=str(tmp_path / "flat"))
        batches = list(plan.train.evaluation())
        for batch, score in zip(batches, lab.generator(plan).score(batches), strict=True):
            real = batch.weights > 0
            assert score.log_probs[real] == pytest.approx(-np.log(plan.model.config["vocab_size"]), rel=1e-5)
            assert not score.correct[real & (batch.labels != 0)].any()


class TestAdapters:
    def test_adapter_changes_the_model_and_the_base_stays(self, lab: Lab, prompts: list[list[int]]) -> None:
        plan = lab.plan(train__max_steps=10)
        before = lab.generator(plan).logits(prompts[0])
        run = lab.train(plan)
        assert np.abs(lab.generator(plan, run.adapter).logits(prompts[0]) - before).max() > 1e-2
        assert np.array_equal(lab.generator(plan).logits(prompts[0]), before)

    @pytest.mark.parametrize("dora", [False, True])
    def test_adapters_are_switched_on_one_base(self, lab: Lab, prompts: list[list[int]], dora: bool) -> None:
        """Whatever came before, a switched generator is the one that is loaded afresh."""
        plans = [lab.plan(train__max_steps=4, train__learning_rate=rate, lora__dora=dora) for rate in (0.01, 0.1)]
        runs = [lab.train(plan) for plan in plans]
        order = (runs[0].adapter, None, runs[1].adapter, runs[0].adapter, None)
        fresh = {adapter: lab.generator(plans[0], adapter).logits(prompts[0]) for adapter in order}
        generator = lab.generator(plans[0])
        for adapter in order:
            generator.use_adapter(adapter)
            assert np.array_equal(generator.logits(prompts[0]), fresh[adapter])

    def test_first_adapter_changes_nothing(self, lab: Lab, prompts: list[list[int]]) -> None:
        """Before the first step B is zero."""
        plan = lab.plan(train__learning_rate=1e-30, train__max_steps=1)
        run = lab.train(plan)
        ours, base = lab.generator(plan, run.adapter).logits(prompts[0]), lab.generator(plan).logits(prompts[0])
        assert np.abs(ours - base).max() < 1e-6

    @pytest.mark.parametrize("dtype", ["F16", "BF16"])
    def test_adapter_in_half_precision(self, lab: Lab, prompts: list[list[int]], dtype: str) -> None:
        """Published adapters are often stored in bfloat16."""
        plan = lab.plan(train__max_steps=5)
        run = lab.train(plan)
        whole = lab.generator(plan, run.adapter).logits(prompts[0])
        path = run.adapter / "adapter_model.safetensors"
        write_half(load_arrays(path), path, dtype)
        half = lab.generator(plan, run.adapter).logits(prompts[0])
        assert 0 < np.abs(half - whole).max() < 0.05

    def test_adapter_of_a_base_of_the_same_shape_is_refused(self, lab: Lab, tmp_path: Path) -> None:
        plan = lab.plan(train__max_steps=1)
        run = lab.train(plan)
        other = models.open_model(make_tiny(tmp_path / "other", seed=2))
        with pytest.raises(RecipeError, match="made for another base model"):
            lab.choice.backend.generator(other, run.adapter, plan.tokenizer, backend.Loading(lab.choice.device))
        (run.adapter / models.BASE_FILE).unlink()
        lab.choice.backend.generator(other, run.adapter, plan.tokenizer, backend.Loading(lab.choice.device))

    def test_broken_adapter_is_refused(self, lab: Lab) -> None:
        """A cut file ended as a bug of this program, or told to delete a checkpoint."""
        plan = lab.plan(train__max_steps=1)
        weights = lab.train(plan).adapter / "adapter_model.safetensors"
        whole = weights.read_bytes()
        for broken in (whole[:-50], whole + b"more"):
            weights.write_bytes(broken)
            with pytest.raises(DataError, match=r"adapter_model.safetensors: .* Fetch"):
                lab.generator(plan, weights.parent)

    def test_adapter_of_another_base_is_refused(self, lab: Lab, tmp_path: Path) -> None:
        plan = lab.plan(train__max_steps=1)
        run = lab.train(plan)
        (run.adapter / models.BASE_FILE).unlink()
        other = models.open_model(make_tiny(tmp_path / "other", hidden_size=64))
        with pytest.raises(RecipeError, match="another base model") as caught:
            lab.choice.backend.generator(other, run.adapter, plan.tokenizer, backend.Loading(lab.choice.device))
        assert caught.value.exit_code == 2

    def test_adapter_of_a_deeper_base_is_refused(self, lab: Lab, tmp_path: Path) -> None:
        """A layer that the base lacks must not be left out silently."""
        plan = lab.plan(train__max_steps=1)
        run = lab.train(plan)
        (run.adapter / models.BASE_FILE).unlink()
        other = models.open_model(make_tiny(tmp_path / "other", num_hidden_layers=1))
        with pytest.raises(RecipeError, match="another base model"):
            lab.choice.backend.generator(other, run.adapter, plan.tokenizer, backend.Loading(lab.choice.device))

    def test_folder_that_is_no_adapter(self, lab: Lab, tmp_path: Path) -> None:
        plan = lab.plan()
        with pytest.raises(RecipeError, match="adapter"):
            lab.generator(plan, tmp_path)


def test_induction_heads_copy_before_any_training(lab: Lab, tmp_path: Path) -> None:
    """On a text that repeats itself, the second half is easier than the first at step 0; with normal weights it is not."""
    if lab.name == "toy":
        pytest.skip("the toy engine has no attention")
    ids = np.random.default_rng(0).integers(10, 300, 40).tolist() * 2
    gain = {}
    for kind in ("normal", "induction"):
        folder = tmp_path / kind
        config = {**TINY, "hidden_size": 256, "num_hidden_layers": 3, "rope_theta": 1e5, "initializer_range": 0.02}
        models.make_model(config, folder, 0, kind)
        how = backend.Loading(lab.choice.device, "float32")
        generator = lab.choice.backend.generator(models.open_model(folder), None, lab.plan().tokenizer, how)
        logprobs = log_softmax(generator.logits(ids))[np.arange(79), ids[1:]]
        gain[kind] = logprobs[40:].mean() - logprobs[:39].mean()
    assert gain["induction"] > gain["normal"] + 0.5
