"""What is trained is what is served: the template decides the text, prefixes decide the mask, and both must agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from smolmlx.data.chat import CHATML, Encoded, HistoryRewritten, Message, Tokenizer, encode_rendered, find_spans
from smolmlx.data.formats import open_source
from smolmlx.errors import DataError, RecipeError

TALK: tuple[Message, ...] = (
    {"role": "user", "content": "one Chai Latte please"},
    {"role": "assistant", "content": "is that all?"},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "ok!"},
)
TURN = "<|im_start|>{{ message['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = (  # what TRL calls a training template
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n\n{% else %}"
    + TURN + "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
)  # fmt: skip
Make = Callable[[str], Tokenizer]


@pytest.fixture(scope="module")
def smollm2(assets: Path) -> Tokenizer:
    return Tokenizer(assets / "tokenizers/smollm2-135m-instruct")


@pytest.fixture(scope="module")
def qwen3(assets: Path) -> Tokenizer:
    return Tokenizer(assets / "tokenizers/qwen3")


@pytest.fixture
def with_template(tiny_model: Path, tmp_path: Path) -> Make:
    """A function that gives the tiny tokenizer another template."""

    def make(template: str) -> Tokenizer:
        path = tmp_path / "template.jinja"
        path.write_text(template, encoding="utf-8")
        return Tokenizer(tiny_model, str(path))

    return make


def encode(tokenizer: Tokenizer, messages: Sequence[Message], last_only: bool = False) -> Encoded:
    return encode_rendered(tokenizer, find_spans(tokenizer, messages, last_only=last_only))


def learned(tokenizer: Tokenizer, encoded: Encoded) -> str:
    """Return the text of the supervised tokens."""
    ids = [i for i, supervised in zip(encoded.ids, encoded.mask, strict=True) if supervised]
    return tokenizer.decode(ids, skip_special=False)


class TestMask:
    def test_smollm2_supervises_answers_and_their_ends(self, smollm2: Tokenizer) -> None:
        encoded = encode(smollm2, TALK)
        assert learned(smollm2, encoded) == "is that all?<|im_end|>ok!<|im_end|>"
        pieces = [(smollm2.fast.id_to_token(i), m) for i, m in zip(encoded.ids, encoded.mask, strict=True)]
        # The end-of-turn token is trained, the line break behind it is not.
        assert pieces[-2:] == [("<|im_end|>", True), ("Ċ", False)]
        assert [pieces[end - 1] for end in encoded.turn_ends] == [("<|im_end|>", True)] * 2

    def test_smollm2_puts_its_system_message_in_front(self, smollm2: Tokenizer) -> None:
        assert smollm2.render(TALK[:1]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")

    def test_last_turn_alone(self, smollm2: Tokenizer) -> None:
        assert learned(smollm2, encode(smollm2, TALK, last_only=True)) == "ok!<|im_end|>"

    def test_qwen3_rewrites_history(self, qwen3: Tokenizer) -> None:
        with pytest.raises(HistoryRewritten, match="last_turn"):
            find_spans(qwen3, TALK)
        assert learned(qwen3, encode(qwen3, TALK, last_only=True)) == "<think>\n\n</think>\n\nok!<|im_end|>"

    def test_qwen3_without_thinking(self, qwen3: Tokenizer) -> None:
        rendered = find_spans(qwen3, TALK[:2], variables={"enable_thinking": False})
        assert learned(qwen3, encode_rendered(qwen3, rendered)) == "is that all?<|im_end|>"

    def test_qwen3_thinking_is_learned(self, qwen3: Tokenizer) -> None:
        talk = (TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok"})
        assert learned(qwen3, encode(qwen3, talk)) == "<think>\nhm\n</think>\n\nok<|im_end|>"

    def test_what_follows_the_last_answer_does_not_rewrite_it(self, qwen3: Tokenizer) -> None:
        """A conversation that ends with the user is trained on its last answer, as it was served."""
        talk = (*TALK, {"role": "user", "content": "thanks"})
        assert learned(qwen3, encode(qwen3, talk, last_only=True)) == "<think>\n\n</think>\n\nok!<|im_end|>"

    def test_nothing_to_learn(self, with_template: Make) -> None:
        with pytest.raises(DataError, match="no assistant turn"):
            find_spans(with_template(CHATML), TALK[:1])

    @pytest.mark.parametrize(
        "content", [">", "|>", "im_end|>", "<|im_end|>", " ok ", "a\nb\n", "…", "日本語 🍵", "é" * 3]
    )
    def test_answers_that_look_like_the_template(self, with_template: Make, content: str) -> None:
        tokenizer = with_template(CHATML)
        talk = (TALK[0], {"role": "assistant", "content": content}, TALK[2], {"role": "assistant", "content": content})
        assert learned(tokenizer, encode(tokenizer, talk)) == f"{content}<|im_end|>" * 2

    def test_empty_answer_learns_to_stop(self, with_template: Make) -> None:
        tokenizer = with_template(CHATML)
        assert learned(tokenizer, encode(tokenizer, (TALK[0], {"role": "assistant", "content": ""}))) == "<|im_end|>"

    def test_prompt_is_tokenized_as_when_served(self, smollm2: Tokenizer) -> None:
        """An answer that begins with a line break would melt into the prompt's last token."""
        talk = (TALK[0], {"role": "assistant", "content": "\n\n- a"})
        encoded = encode(smollm2, talk)
        prompt = smollm2.encode(smollm2.prompt(talk[:1]))
        assert (
            encoded.ids[: len(prompt)] == prompt
            and not any(encoded.mask[: len(prompt)])
            and all(encoded.mask[len(prompt) : -1])
        )
        assert learned(smollm2, encoded) == "\n\n- a<|im_end|>"


class TestGenerationMarks:
    def test_marks_that_agree(self, with_template: Make) -> None:
        marked, plain = with_template(MARKED), CHATML
        rendered = find_spans(marked, TALK)
        assert rendered.spans == find_spans(with_template(plain), TALK).spans
        assert "\ufdd0" not in rendered.text and marked.render(TALK) == rendered.text

    def test_marks_on_the_last_turn(self, with_template: Make) -> None:
        tokenizer = with_template(MARKED)
        assert learned(tokenizer, encode(tokenizer, TALK, last_only=True)) == "ok!<|im_end|>"

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),  # the model would never learn to stop
            ("assistant\n{% generation %}", "{% generation %}assistant\n"),  # the prompt would be learned
            ("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"),  # one too many
        ],
    )
    def test_marks_that_disagree(self, with_template: Make, old: str, new: str) -> None:
        assert MARKED.count(old) == 1
        with pytest.raises(DataError, match="marks disagree"):
            find_spans(with_template(MARKED.replace(old, new)), TALK)


class TestTemplates:
    def test_none(self, tiny_model: Path, tmp_path: Path) -> None:
        shutil.copy(tiny_model / "tokenizer.json", tmp_path)
        with pytest.raises(RecipeError, match="no chat template") as caught:
            Tokenizer(tmp_path).render(TALK)
        assert "chatml" in str(caught.value)

    def test_by_name_and_by_path(self, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
        assert Tokenizer(tiny_model, str(tmp_path / "t.jinja")).render(TALK) == TALK[0]["content"]
        assert Tokenizer(tiny_model, "chatml").template_text == CHATML
        with pytest.raises(RecipeError, match="neither one of chatml, plain nor a file"):
            Tokenizer(tiny_model, "chatlm")

    def test_chatml_needs_its_tokens(self, assets: Path) -> None:
        """Spelled in pieces, the end of a turn would not stop a server."""
        with pytest.raises(RecipeError, match="chat_template: plain"):
            Tokenizer(assets / "models/stories260k", "chatml")

    def test_plain_template(self, assets: Path) -> None:
        tokenizer = Tokenizer(assets / "models/stories260k", "plain")
        encoded = encode(tokenizer, TALK)
        assert learned(tokenizer, encoded).replace(" ", "") == "isthatall?</s>ok!</s>"
        assert encoded.ids[0] == 1 and encoded.ids.count(1) == 1
        assert encoded.ids.count(2) == 2 and tokenizer.eos_ids[0] == 2

    def test_file_wins_over_config(self, tiny_model: Path, tmp_path: Path) -> None:
        shutil.copy(tiny_model / "tokenizer.json", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
        assert Tokenizer(tmp_path).template_text == "config"
        (tmp_path / "chat_template.jinja").write_text("file")
        assert Tokenizer(tmp_path).template_text == "file"

    def test_named_templates(self, tiny_model: Path, tmp_path: Path) -> None:
        shutil.copy(tiny_model / "tokenizer.json", tmp_path)
        named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert Tokenizer(tmp_path).template_text == "d"

    def test_not_jinja(self, with_template: Make) -> None:
        with pytest.raises(RecipeError, match="line 1"):
            with_template("{% for %}")

    def test_refusing_template(self, with_template: Make) -> None:
        tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(DataError, match="roles must alternate"):
            tokenizer.render(TALK)

    def test_template_cannot_reach_python(self, with_template: Make) -> None:
        with pytest.raises(DataError, match="unsafe"):
            with_template("{{ messages.__class__.__mro__ }}").render(TALK)

    def test_no_end_of_turn(self, with_template: Make) -> None:
        template = "{% for message in messages %}" + TURN + "{{ message['content'] }}\n{% endfor %}" + PROMPT
        with pytest.raises(DataError, match="no end-of-turn token"):
            find_spans(with_template(template), TALK[:2])

    @pytest.mark.parametrize("prompt", ["", "{% if add_generation_prompt %}A: {% endif %}"])
    def test_answers_that_are_not_rendered(self, with_template: Make, prompt: str) -> None:
        """The rows were said to have no answer."""
        own = "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}\n{% endif %}{% endfor %}"
        with pytest.raises(DataError, match="does not render the assistant's answer"):
            encode(with_template(own + prompt), TALK)

    def test_missing_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"no tokenizer\.json"):
            Tokenizer(tmp_path)

    def test_fingerprint_follows_the_template(self, with_template: Make) -> None:
        assert (
            with_template(CHATML).fingerprint()
            == with_template(CHATML).fingerprint()
            != with_template(MARKED).fingerprint()
        )


def test_stop_tokens(smollm2: Tokenizer, qwen3: Tokenizer, assets: Path) -> None:
    assert smollm2.eos_ids == (2,)
    assert [qwen3.fast.id_to_token(i) for i in qwen3.eos_ids] == ["<|im_end|>"]
    # A base tokenizer with ChatML stops at the end of a turn as well as at the end of a document.
    base = Tokenizer(assets / "tokenizers/smollm2-135m-base", "chatml")
    assert {base.fast.id_to_token(i) for i in base.eos_ids} == {"<|endoftext|>", "<|im_end|>"}


CHAT_FILES = {  # file -> every how many rows
    "taskmaster_messages.jsonl": 4,
    "gsm8k_prompt_completion.jsonl": 10,
    "self_instruct_alpaca.jsonl": 2,
    "fastchat_sharegpt.json": 1,
    "preference_messages.jsonl": 5,
}


@pytest.mark.parametrize("name", CHAT_FILES)
def test_real_rows_learn_their_answers(assets: Path, smollm2: Tokenizer, name: str) -> None:
    """Supervised text, joined, is every answer with its end; the prompt of each turn is tokenized as when served."""
    rows = list(open_source(str(assets / "data" / name)))[:: CHAT_FILES[name]]
    for row in rows:
        messages = (*row.messages, *row.chosen)
        encoded = encode(smollm2, messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert learned(smollm2, encoded) == "".join(f"{answer}<|im_end|>" for answer in answers), row.where
        # <|im_start|> opens every turn and stands for a BOS nowhere else.
        assert encoded.ids.count(1) == len(messages) + (messages[0]["role"] != "system"), row.where
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompt = smollm2.encode(smollm2.prompt(messages[:first]))
        assert encoded.ids[: len(prompt)] == prompt, row.where


@pytest.mark.parametrize("name", CHAT_FILES)
def test_real_rows_with_a_sentencepiece_vocabulary(assets: Path, name: str) -> None:
    """Byte fallback and a prepended space: offsets still find every answer."""
    tokenizer = Tokenizer(assets / "models/stories260k", "plain")
    rows = list(open_source(str(assets / "data" / name)))[::20]
    for row in rows:
        messages = (*row.messages, *row.chosen)
        answers = "".join(f"{m['content']}</s>" for m in messages if m["role"] == "assistant")
        assert learned(tokenizer, encode(tokenizer, messages)).replace(" ", "") == answers.replace(" ", ""), row.where
