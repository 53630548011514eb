"""Rows to token rows: nothing is cut silently, and every row that is not trained is counted under a reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smolmlx.data import encode as encoding
from smolmlx.data.chat import Encoded, Tokenizer
from smolmlx.data.encode import Account, Encoding, document_end, encode_document, encode_rows
from smolmlx.data.formats import Example, open_source
from smolmlx.data.store import encode_source, from_rows, open_store
from smolmlx.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def chat(*turns: str, where: str = "f:1") -> Example:
    roles = ("user", "assistant") * len(turns)
    return Example(where, tuple({"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)))


def run(tokenizer: Tokenizer, rows: list[Example], **how: Any) -> tuple[list[Encoded], Account]:
    account = Account()
    found = list(encode_rows(rows, tokenizer, Encoding(**{"max_length": 1000, **how}), account))
    return found, account


def learned(tokenizer: Tokenizer, rows: list[Encoded]) -> str:
    ids = [i for row in rows for i, supervised in zip(row.ids, row.mask, strict=True) if supervised]
    return tokenizer.decode(ids, skip_special=False)


def test_control_tokens_in_a_message_are_counted(tokenizer: Tokenizer) -> None:
    rows = [chat("q", "a"), chat("what is <|im_end|>?", "a", where="f:2"), chat("q", "<|im_start|>", where="f:3")]
    account = run(tokenizer, rows)[1]
    assert account.reasons == {encoding.CONTROL: 2} and account.lost == 0
    assert account.first[encoding.CONTROL] == "f:2"


LONG = chat("what " * 100, "word " * 60 + "end")
END = "<|im_end|>"


class TestLossOn:
    rows = [chat("q", "a", "q", "b")]  # noqa: RUF012 - read only

    def test_assistant(self, tokenizer: Tokenizer) -> None:
        assert learned(tokenizer, run(tokenizer, self.rows)[0]) == f"a{END}b{END}"

    def test_completion(self, tokenizer: Tokenizer) -> None:
        assert learned(tokenizer, run(tokenizer, self.rows, loss_on="completion")[0]) == f"b{END}"

    def test_all(self, tokenizer: Tokenizer) -> None:
        (row,), _ = run(tokenizer, self.rows, loss_on="all")
        assert all(row.mask)

    def test_preference_rows_teach_the_chosen_answer(self, tokenizer: Tokenizer) -> None:
        talk = chat("q", "a", "q")
        row = Example(
            "f:1",
            talk.messages,
            None,
            ({"role": "assistant", "content": "yes"},),
            ({"role": "assistant", "content": "no"},),
        )
        assert learned(tokenizer, run(tokenizer, [row])[0]) == f"yes{END}"


class TestOverlong:
    def test_drop(self, tokenizer: Tokenizer) -> None:
        found, account = run(tokenizer, [chat("q", "a"), LONG], max_length=64)
        assert len(found) == 1 and account.rows == 2
        assert account.reasons == {encoding.TOO_LONG: 1} and account.lost == 1
        assert account.first == {encoding.TOO_LONG: "f:1"}

    def test_truncate_prompt_keeps_the_answer_whole(self, tokenizer: Tokenizer) -> None:
        whole = len(run(tokenizer, [LONG])[0][0].ids)
        answer = len(run(tokenizer, [chat("", LONG.messages[1]["content"])])[0][0].ids)
        limit = (whole + answer) // 2
        (row,), account = run(tokenizer, [LONG], max_length=limit, overlong="truncate_prompt")
        assert answer < len(row.ids) <= limit
        assert learned(tokenizer, [row]) == LONG.messages[1]["content"] + END
        assert account.reasons == {encoding.CUT_PROMPT: 1} and account.lost == 0
        kept = tokenizer.decode(row.ids[: row.mask.index(True)], skip_special=False).split("user\n")[1].split(END)[0]
        assert LONG.messages[0]["content"].endswith(kept) and kept

    def test_truncate_prompt_spares_the_system_message(self, tokenizer: Tokenizer) -> None:
        rules = {"role": "system", "content": "never " * 80}
        row = replace(LONG, messages=(rules, {"role": "user", "content": "what " * 60}, LONG.messages[1]))
        whole = len(run(tokenizer, [row])[0][0].ids)
        (found,), _ = run(tokenizer, [row], max_length=whole - 20, overlong="truncate_prompt")
        assert rules["content"] in tokenizer.decode(found.ids)

    def test_truncate_prompt_drops_what_no_prompt_can_save(self, tokenizer: Tokenizer) -> None:
        found, account = run(
            tokenizer, [chat("q", LONG.messages[1]["content"])], max_length=32, overlong="truncate_prompt"
        )
        assert not found and account.reasons == {encoding.TOO_LONG: 1}

    @pytest.mark.parametrize("limit", [8, 33, 64, 100])
    def test_split_supervises_every_token_once(self, tokenizer: Tokenizer, limit: int) -> None:
        (whole,), _ = run(tokenizer, [LONG])
        found, account = run(tokenizer, [LONG], max_length=limit, overlong="split")
        assert account.reasons == {encoding.SPLIT_ROWS: 1, encoding.CUT_PROMPT: 1} and account.lost == 0
        assert max(len(row.ids) for row in found) <= limit
        assert learned(tokenizer, found) == learned(tokenizer, [whole]) == LONG.messages[1]["content"] + END
        # Nothing predicts the first token of a row, so it must not be one that is to be learned.
        assert not any(row.mask[0] for row in found)

    def test_split_says_what_was_cut(self, tokenizer: Tokenizer) -> None:
        """A row that lost the start of its prompt was counted as an answer that goes on in another row."""
        found, account = run(tokenizer, [chat("word " * 40, "a")], max_length=64, overlong="split")
        assert len(found) == 1 and account.reasons == {encoding.CUT_PROMPT: 1}
        found, account = run(tokenizer, [chat("q", "word " * 40)], max_length=64, overlong="split")
        assert len(found) > 1 and account.reasons == {encoding.SPLIT_ROWS: 1}

    def test_row_of_just_the_right_length_is_kept(self, tokenizer: Tokenizer) -> None:
        size = len(run(tokenizer, [LONG])[0][0].ids)
        assert not run(tokenizer, [LONG], max_length=size)[1].reasons
        assert run(tokenizer, [LONG], max_length=size - 1)[1].reasons


class TestAccount:
    def test_rows_without_an_answer(self, tokenizer: Tokenizer) -> None:
        found, account = run(tokenizer, [chat("q"), chat("q", "a"), chat("q2", where="f:3")])
        assert len(found) == 1
        assert (account.rows, account.lost, dict(account.reasons), account.first) == (
            3,
            2,
            {encoding.NO_TARGET: 2},
            {encoding.NO_TARGET: "f:1"},
        )

    def test_empty_answers_are_not_trained(self, tokenizer: Tokenizer) -> None:
        """Trained, they would teach to end a turn at once."""
        rows = [chat("q", ""), chat("q", " \n", where="f:2"), chat("q", "", "q", "b", where="f:3")]
        found, account = run(tokenizer, rows)
        assert learned(tokenizer, found) == f"b{END}"
        assert account.reasons == {encoding.NO_TARGET: 2, encoding.EMPTY_TURN: 1} and account.lost == 2
        assert account.first == {encoding.NO_TARGET: "f:1", encoding.EMPTY_TURN: "f:3"}
        assert run(tokenizer, [chat("q", "a", "q", "")], loss_on="completion")[1].lost == 1
        assert run(tokenizer, [chat("q", "")], loss_on="all")[1].lost == 1

    def test_answer_of_tool_calls_alone_is_trained(self, tokenizer: Tokenizer) -> None:
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        row = Example("f:1", ({"role": "user", "content": "q"}, call))
        assert run(tokenizer, [row])[1].lost == 0

    def test_every_row_that_does_not_fit_the_template_is_named(self, assets: Path) -> None:
        smollm2 = Tokenizer(assets / "tokenizers/smollm2-135m-instruct")

        def begun(where: str) -> Example:
            return Example(where, ({"role": "assistant", "content": "hello"}, *chat("q", "a").messages))

        rows = [begun("f:1"), chat("q", "a", where="f:2"), begun("f:3")]
        with pytest.raises(DataError) as caught:
            run(smollm2, rows)
        assert [problem.partition(": the conv")[0] for problem in caught.value.problems] == ["f:1", "f:3"]
        assert all("begins with the assistant" in problem for problem in caught.value.problems)
        with pytest.raises(DataError, match="the first 20: 20 problems"):
            run(smollm2, [begun(f"f:{i}") for i in range(50)])
        found, account = run(smollm2, rows, history="last_turn")
        assert len(found) == 3 and account.reasons == {encoding.LAST_TURN: 2}

    def test_only_turn_without_a_prompt(self, assets: Path) -> None:
        smollm2 = Tokenizer(assets / "tokenizers/smollm2-135m-instruct")
        with pytest.raises(DataError, match="begins with the assistant") as caught:
            run(smollm2, [Example("f:1", ({"role": "assistant", "content": "hello"},))])
        assert "last_turn" not in str(caught.value)

    def test_rewritten_history(self, assets: Path) -> None:
        qwen3 = Tokenizer(assets / "tokenizers/qwen3")
        talk = chat("q", "a", "q", "b")
        with pytest.raises(DataError, match="f:1: the chat template renders turn 2 differently"):
            run(qwen3, [talk])
        found, account = run(qwen3, [talk, chat("q", "a")], history="last_turn")
        assert learned(qwen3, found) == f"<think>\n\n</think>\n\nb{END}<think>\n\n</think>\n\na{END}"
        assert account.reasons == {encoding.LAST_TURN: 1} and account.lost == 0

    def test_refused_row_is_named(self, tokenizer: Tokenizer, tmp_path: Path, tiny_model: Path) -> None:
        (tmp_path / "t.jinja").write_text("{{ raise_exception('no system here') }}")
        with pytest.raises(DataError, match="f:9: the chat template refuses these messages: no system here"):
            run(Tokenizer(tiny_model, str(tmp_path / "t.jinja")), [chat("q", "a", where="f:9")])

    @pytest.mark.parametrize("body", ["{{ 1 / 0 }}", "{{ messages[99].content.strip() }}", "{{ messages | sum }}"])
    def test_templates_that_break(self, tmp_path: Path, tiny_model: Path, body: str) -> None:
        (tmp_path / "t.jinja").write_text(body)
        with pytest.raises(DataError, match="f:9: the chat template refuses these messages: "):
            run(Tokenizer(tiny_model, str(tmp_path / "t.jinja")), [chat("q", "a", where="f:9")])


class TestDocuments:
    def test_end_of_document_once(self, tokenizer: Tokenizer) -> None:
        end = document_end(tokenizer)
        assert tokenizer.fast.id_to_token(end) == "<|endoftext|>"
        for text in ("red apple", "red apple<|endoftext|>"):
            assert encode_document(text, tokenizer).count(end) == 1

    def test_exactly_one_bos(self, assets: Path) -> None:
        tokenizer = Tokenizer(assets / "models/stories260k")
        for text in ("Once upon a time", "<s>Once upon a time"):
            ids = encode_document(text, tokenizer)
            assert (ids.count(1), ids[0], ids.count(2), ids[-1]) == (1, 1, 1, 2)

    def test_chat_never_gets_a_second_bos(self, assets: Path, tmp_path: Path) -> None:
        """The template writes the BOS; the tokenizer, which would write one too, is not asked."""
        (tmp_path / "t.jinja").write_text(
            "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        )
        tokenizer = Tokenizer(assets / "models/stories260k", str(tmp_path / "t.jinja"))
        (row,), _ = run(tokenizer, [chat("q", "a", "q", "b")])
        assert row.ids.count(1) == 1 and row.ids[0] == 1
        assert tokenizer.encode(tokenizer.prompt(chat("q").messages)).count(1) == 1

    def test_chunks_lose_no_token(self, tokenizer: Tokenizer) -> None:
        texts = [f"red apple {i} " * (i % 5 + 1) for i in range(40)]
        stream = [token for text in texts for token in encode_document(text, tokenizer)]
        found, account = run(
            tokenizer, [Example(f"f:{i}", text=text) for i, text in enumerate(texts)], chunks=True, max_length=64
        )
        assert [token for row in found for token in row.ids] == stream
        assert {len(row.ids) for row in found[:-1]} == {64} and len(found[-1].ids) <= 64
        assert all(all(row.mask) for row in found) and account.rows == 40

    def test_chunks_of_messages_are_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(DataError, match="pretrain wants text"):
            run(tokenizer, [chat("q", "a")], chunks=True)

    @pytest.mark.parametrize("overlong", ["drop", "split"])
    def test_long_text_row(self, tokenizer: Tokenizer, overlong: str) -> None:
        row = Example("f:1", text="red apple " * 50)
        found, account = run(tokenizer, [row], max_length=32, overlong=overlong)
        if overlong == "drop":
            assert not found and account.reasons == {encoding.TOO_LONG: 1}
        else:
            assert learned(tokenizer, found) == "red apple " * 50 + "<|endoftext|>"


class TestStore:
    def test_round_trip(self, tmp_path: Path) -> None:
        rows = [Encoded([1, 2, 3], [False, True, True]), Encoded([4, 5], [True, True])]
        store = from_rows(rows, tmp_path / "store")
        assert len(store) == 2
        for index, row in enumerate(rows):
            ids, mask = store.row(index)
            assert (ids.tolist(), mask.tolist()) == (row.ids, row.mask)
        assert store.lengths.tolist() == [3, 2]
        assert store.supervised.tolist() == [2, 1], "nothing predicts the first token of a row"

    def test_broken_store(self, tmp_path: Path) -> None:
        store = from_rows([Encoded([1, 2, 3], [True] * 3)], tmp_path / "store")
        (store.folder / "ids.i32").write_bytes(b"\0" * 4)
        with pytest.raises(DataError, match="Delete the folder"):
            open_store(store.folder)

    def test_cache_is_used_and_keyed_by_content(
        self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "r.jsonl"
        path.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
        how = Encoding(64)
        seen: list[int] = []
        first = encode_source(open_source(str(path)), tokenizer, how, on_rows=seen.append)
        count = len(seen)
        again = encode_source(open_source(str(path)), tokenizer, how, on_rows=seen.append)
        assert again.folder == first.folder and len(seen) == count > 0
        assert again.account.rows == 1
        assert encode_source(open_source(str(path)), tokenizer, Encoding(65)).folder != first.folder
        path.write_text(json.dumps({"prompt": "q", "completion": "b"}) + "\n")
        assert encode_source(open_source(str(path)), tokenizer, how).folder != first.folder

    @pytest.mark.parametrize("lost", ["meta.json", "ids.i32", "mask.u8", "offsets.i64", "cut", "all"])
    def test_cache_that_was_half_deleted_is_made_again(
        self, lost: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SMOLMLX_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "r.jsonl"
        path.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
        first = encode_source(open_source(str(path)), tokenizer, Encoding(64))
        if lost == "all":
            shutil.rmtree(first.folder)
        elif lost == "cut":
            (first.folder / "meta.json").write_text('{"rows": ')
        else:
            (first.folder / lost).unlink()
        assert len(encode_source(open_source(str(path)), tokenizer, Encoding(64))) == 1
