"""Chat templates and tokenizers: from messages to text, from text to tokens, and which tokens are trained.

The tokenizer's own template is the only source of text, so what is trained is what will be served. Supervised tokens
are found by rendering prefixes of the conversation and mapping character spans through token offsets; a template with
`{% generation %}` marks is checked against that.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from tokenizers import Tokenizer as _FastTokenizer

from smolmlx.errors import DataError, RecipeError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
"""For a tokenizer without chat tokens: plain headings, and its own end token behind each answer."""
BUILT_IN = {"chatml": CHATML, "plain": PLAIN}
Message = Mapping[str, Any]
Span = tuple[int, int]
"""Half-open range of characters."""


class HistoryRewritten(DataError):
    """The template renders an earlier turn differently once a later turn is there."""


class BeginsWithAssistant(HistoryRewritten):
    """The first turn is the assistant's, and the template does not render the nothing before it the same way."""

    def __init__(self, only: bool) -> None:
        other = "" if only else ", or set data.history: last_turn to train on the last answer only"
        super().__init__(
            "the conversation begins with the assistant, whose first turn this chat template cannot serve: it has no prompt. "
            f"Put a user turn before it, or leave it out of the row{other}"
        )


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the spans that are to be learned."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row and, for each, whether it is supervised."""

    ids: list[int]
    mask: list[bool]
    turn_ends: tuple[int, ...] = ()
    """Index just behind each supervised stretch."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: wraps what the assistant says in two marks that survive rendering."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute
    OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which no text may hold; they are taken out again

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start = jinja2.nodes.Output([jinja2.nodes.TemplateData(self.OPEN)]).set_lineno(line)
        end = jinja2.nodes.Output([jinja2.nodes.TemplateData(self.CLOSE)]).set_lineno(line)
        return [start, *body, end]


def _environment() -> jinja2.Environment:
    """The same sandbox, filters and globals that transformers gives a chat template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A Hugging Face tokenizer folder: ids, offsets and the chat template, without transformers."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Args:
            chat_template: `chatml`, `plain`, a path, or None for the tokenizer's own.

        Raises:
            RecipeError: the folder has no tokenizer.json, the template cannot be read, or the tokenizer lacks its tokens.
            DataError: a broken tokenizer.json, tokenizer_config.json or generation_config.json.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise RecipeError(
                f"{folder}: no tokenizer.json. smolmlx needs the fast tokenizer; save it with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder), or set model.tokenizer."
            )
        self.folder = folder
        try:
            self.fast = _FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise DataError(f"{path}: not a tokenizer ({error}). Fetch the file again.") from error
        self.fast.no_padding()
        self.fast.no_truncation()
        self.config = _read_json(folder / "tokenizer_config.json")
        self.template_text = _find_template(folder, self.config, chat_template)
        self._template = self._compile(self.template_text) if self.template_text else None
        if chat_template == "chatml" and self.token_id("<|im_end|>") is None:
            raise RecipeError(
                f"model.chat_template: 'chatml' needs <|im_start|> and <|im_end|>, which the tokenizer in {folder} does not have as "
                "tokens, so a model would not learn where to stop. Use chat_template: plain, which ends answers with its own end token."
            )
        self.eos_ids = self._find_eos_ids()

    @staticmethod
    def _compile(text: str) -> jinja2.Template:
        try:
            return _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error

    @property
    def vocab_size(self) -> int:
        return int(self.fast.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        found = self.fast.token_to_id(token)
        return None if found is None else int(found)

    def special(self, role: str) -> str | None:
        """Return the text of a special token, e.g. role `eos_token`."""
        value = self.config.get(role)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    @property
    def pad_id(self) -> int:
        """The pad token, else 0; padding is never attended to nor trained, so its value does not matter."""
        pad = self.special("pad_token")
        return (self.token_id(pad) if pad else None) or 0

    def _find_eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: what the template writes behind one, the tokenizer's eos, the generation config's."""
        found = [self._turn_end(), *(self.token_id(token) for token in [self.special("eos_token")] if token)]
        listed = _read_json(self.folder / "generation_config.json").get("eos_token_id")
        found += listed if isinstance(listed, list) else [listed]
        return tuple(dict.fromkeys(i for i in found if i is not None))

    def _turn_end(self) -> int | None:
        """The token the template writes behind an assistant's answer, if it is one token and the template can say so."""
        if self._template is None:
            return None
        try:
            rendered = find_spans(self, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except DataError:
            return None
        ids = encode_rendered(self, rendered).ids
        text = self.decode(ids[-2:], skip_special=False)
        last = ids[-1] if text == text.rstrip() else ids[-2]
        return int(last) if self.fast.id_to_token(last) in self._special_tokens() else None

    def _special_tokens(self) -> set[str]:
        return {token.content for token in self.fast.get_added_tokens_decoder().values()}

    def holds_control_token(self, text: str) -> bool:
        """Whether a text holds the characters of a special token, such as an end of turn, and would be read as one."""
        return self._control is not None and self._control.search(text) is not None

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        found = [token.content for token in self.fast.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, found))) if found else None

    def fingerprint(self) -> str:
        """Hash of vocabulary, merges and template: what decides the tokens of a row."""
        digest = hashlib.sha256((self.folder / "tokenizer.json").read_bytes())
        digest.update((self.template_text or "").encode())
        # Templates write the special tokens by their role, and the tokenizer may put one in front of a document.
        digest.update(json.dumps([self.special(role) for role in _ROLES]).encode())
        return digest.hexdigest()[:16]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer adds on its own, such as a BOS."""
        return list(self.fast.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return str(self.fast.decode(list(ids), skip_special_tokens=skip_special))

    def idle_variables(self, names: Iterable[str]) -> list[str]:
        """Return the names of variables that the chat template does not mention."""
        mentioned = set(re.findall(r"\w+", self.template_text or ""))
        return [name for name in names if name not in mentioned]

    @staticmethod
    def taken_variables(names: Iterable[str]) -> list[str]:
        """Return which of these names every template is given already."""
        return [name for name in names if name in ("messages", "add_generation_prompt", *_ROLES)]

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False, **variables: Any) -> str:
        """Render messages with the chat template.

        Raises:
            RecipeError: the tokenizer has no chat template.
            DataError: the template refuses the messages (wrong roles or order).
        """
        return _Generation_strip(self._render_marked(messages, generation_prompt, variables))

    def _render_marked(self, messages: Sequence[Message], generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        if self._template is None:
            raise RecipeError(
                f"{self.folder}: this tokenizer has no chat template, so messages cannot be turned into text. "
                "Set model.chat_template to chatml, plain or a Jinja file, or train on text rows."
            )
        specials = {name: self.special(name) or "" for name in _ROLES}
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=generation_prompt, **specials, **variables
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error

    def prompt(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """Render what a server would feed the model before it answers; raises as `render` does.

        Variables are the user's own: one called `messages` is refused as any that the template has already.
        """
        return _Generation_strip(self._render_marked(messages, True, variables))


def _Generation_strip(text: str) -> str:
    return text.replace(_Generation.OPEN, "").replace(_Generation.CLOSE, "")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Fetch the file again.") from error
    return found if isinstance(found, dict) else {}


def _find_template(folder: Path, config: Mapping[str, Any], asked: str | None) -> str | None:
    if asked in BUILT_IN:
        return BUILT_IN[asked]
    if asked:
        path = Path(asked)
        if not path.is_file():
            raise RecipeError(f"model.chat_template: '{asked}' is neither one of {', '.join(BUILT_IN)} nor a file.")
        return path.read_text(encoding="utf-8")
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # named templates; "default" is the one served
        found = next(
            (entry.get("template") for entry in found if isinstance(entry, dict) and entry.get("name") == "default"),
            None,
        )
    return found if isinstance(found, str) else None


def find_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    last_only: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """Render a conversation and find what the assistant says in it.

    A supervised span starts where the generation prompt ends and runs through the end-of-turn token, without the
    white space behind it.

    Args:
        last_only: supervise the last assistant turn alone; earlier turns may then be rewritten by the template.

    Raises:
        HistoryRewritten: a prefix of the conversation does not render to a prefix of the text.
        DataError: no assistant turn, no end-of-turn token, or `{% generation %}` marks that disagree.
    """
    variables = dict(variables or {})
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise DataError("no assistant turn, so nothing to learn")
    if last_only:
        messages = messages[
            : turns[-1] + 1
        ]  # what follows is not learned, and a template may rewrite the answer for it
    marked = tokenizer._render_marked(messages, False, variables)
    text, marks = _take_marks(marked)
    spans = []
    for turn in turns[-1:] if last_only else turns:
        before = tokenizer.render(messages[:turn], generation_prompt=True, **variables)
        through = tokenizer.render(messages[: turn + 1], **variables)
        if before.startswith(through.rstrip()) and str(messages[turn].get("content") or "").strip():
            raise DataError(
                "the chat template does not render the assistant's answer, so there is nothing to train on. Set "
                "model.chat_template to chatml, plain, or a template that renders it"
            )
        if not text.startswith(through) or not through.startswith(before):
            if all(message.get("role") == "system" for message in messages[:turn]):
                raise BeginsWithAssistant(turn == turns[-1])
            raise HistoryRewritten(
                f"the chat template renders turn {turn + 1} differently once later turns follow, so it would be trained "
                "on text it is never served. Set data.history: last_turn to train on the last answer only"
            )
        spans.append((len(before), _end_of_turn(through, len(before), messages[turn])))
    _check_marks(text, spans, marks, last_only)
    return Rendered(text, tuple(spans))


def _end_of_turn(text: str, start: int, message: Message) -> int:
    """Return the end of a turn's span: behind its end-of-turn token, before the white space that follows."""
    content = message.get("content")
    end = len(text.rstrip())
    if isinstance(content, str) and content.strip():
        # The first occurrence: an answer such as ">" also ends the end-of-turn token.
        behind = text.find(content.strip(), start) + len(content.strip())
        if behind >= start + len(content.strip()) and not text[behind:].strip():
            raise DataError(
                "the chat template writes no end-of-turn token after the assistant's answer, so the model would never learn "
                "to stop. Set model.chat_template to chatml, plain, or a template that writes one"
            )
    return max(end, start)


def _take_marks(marked: str) -> tuple[str, list[Span]]:
    """Split text from its generation marks."""
    pieces, spans, position, start = [], [], 0, 0
    for character in _split_marks(marked):
        if character == _Generation.OPEN:
            start = position
        elif character == _Generation.CLOSE:
            spans.append((start, position))
        else:
            pieces.append(character)
            position += len(character)
    return "".join(pieces), spans


def _split_marks(marked: str) -> Iterator[str]:
    rest = marked
    while rest:
        cut = min((i for i in (rest.find(_Generation.OPEN), rest.find(_Generation.CLOSE)) if i >= 0), default=-1)
        if cut < 0:
            yield rest
            return
        if cut:
            yield rest[:cut]
        yield rest[cut]
        rest = rest[cut + 1 :]


def _check_marks(text: str, spans: Sequence[Span], marks: Sequence[Span], last_only: bool) -> None:
    """Where a template marks generation itself, both ways must name the same characters."""
    if not marks:
        return
    trimmed = [(start, start + len(text[start:end].rstrip())) for start, end in marks]
    if last_only:
        trimmed = trimmed[-1:]
    if trimmed != list(spans):
        index, (mark, span) = next(
            ((i, pair) for i, pair in enumerate(zip(trimmed, spans, strict=False)) if pair[0] != pair[1]),
            (len(spans), ((0, 0), (0, 0))),
        )
        raise DataError(
            f"the template's {{% generation %}} marks disagree with what it serves, at assistant turn {index + 1}: marked "
            f"{text[mark[0] : mark[1]][-60:]!r}, served {text[span[0] : span[1]][-60:]!r}. Mend the template (marks must run from "
            "the generation prompt through the end-of-turn token)"
        )


def encode_rendered(tokenizer: Tokenizer, rendered: Rendered) -> Encoded:
    """Tokenize rendered text and mark the tokens that lie inside its spans.

    A token that straddles the start of a span would not be produced when serving (the prompt is tokenized on its own
    there), so such a text is tokenized in two pieces, cut where the prompt ends.
    """
    encoding = tokenizer.fast.encode(rendered.text, add_special_tokens=False)
    cuts = [start for start, _ in rendered.spans if any(a < start < b for a, b in encoding.offsets)]
    if cuts:
        return _encode_pieces(tokenizer, rendered)
    mask, ends, cursor = [], [], 0
    spans = rendered.spans
    for index, (start, end) in enumerate(encoding.offsets):
        while cursor < len(spans) and start >= spans[cursor][1]:
            ends.append(index)
            cursor += 1
        mask.append(cursor < len(spans) and start >= spans[cursor][0] and end <= spans[cursor][1] and end > start)
    ends += [len(mask)] * (len(spans) - cursor)
    return Encoded(list(encoding.ids), mask, tuple(ends))


def _encode_pieces(tokenizer: Tokenizer, rendered: Rendered) -> Encoded:
    ids: list[int] = []
    mask: list[bool] = []
    ends: list[int] = []
    position = 0
    for start, end in [*rendered.spans, (len(rendered.text), len(rendered.text))]:
        for piece, supervised in ((rendered.text[position:start], False), (rendered.text[start:end], True)):
            found = tokenizer.encode(piece) if piece else []
            ids += found
            mask += [supervised] * len(found)
        if end > start:
            ends.append(len(ids))
        position = end
    return Encoded(ids, mask, tuple(ends))
