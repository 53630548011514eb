"""What a request may say, and how it is decoded; whatever cannot be honoured is refused by name."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smolmlx.backend import Constraint, Decoding, OneOf, Regex
from smolmlx.errors import RecipeError

_DEFAULT_TOKENS = 512
# What only tells the service who asks or how to keep books; leaving it unread changes no answer.
_BOOKKEEPING = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# Fields of OpenAI's API that are honoured at the value that switches them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}


class _Body(BaseModel):
    """What a client sends; null stands for a field's default, as OpenAI's clients write what was not set."""

    @model_validator(mode="before")
    @classmethod
    def _set(cls, tree: Any) -> Any:
        return {name: value for name, value in tree.items() if value is not None} if isinstance(tree, dict) else tree


class _Part(_Body):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn; its content may come in parts of text."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant", "developer"]
    content: str | list[_Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Schema(_Body):
    model_config = ConfigDict(extra="forbid")
    name: str = ""
    description: str | None = None
    strict: bool | None = None
    tree: Annotated[dict[str, Any], Field(alias="schema")]


class _Format(_Body):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _StreamOptions(_Body):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Ask(_Body):
    """What chat and plain completions share."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    response_format: _Format | None = None
    regex: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _known(self) -> Ask:
        problems = [
            f"{name}: not supported by this server"
            for name, value in (self.model_extra or {}).items()
            if name not in _BOOKKEEPING and not (name in _OFF and value in _OFF[name])
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def constraint(self) -> Constraint | None:
        """Return what the answer keeps to.

        Raises:
            RecipeError: more than one thing.
        """
        found: list[Constraint] = []
        if self.response_format and self.response_format.type == "json_object":
            found.append({"type": "object"})
        if self.response_format and self.response_format.type == "json_schema":
            if self.response_format.json_schema is None:
                raise RecipeError("response_format: type json_schema needs json_schema.schema.")
            found.append(self.response_format.json_schema.tree)
        found += [Regex(self.regex)] if self.regex is not None else []
        found += [OneOf(tuple(self.choice))] if self.choice is not None else []
        if len(found) > 1:
            raise RecipeError("response_format, regex, choice: an answer keeps to one of them.")
        return found[0] if found else None

    def decoding(self) -> Decoding:
        """Return how to decode.

        Raises:
            RecipeError: values out of bounds.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**63
        return Decoding(
            max_tokens=self.max_completion_tokens or self.max_tokens or _DEFAULT_TOKENS,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram=self.no_repeat_ngram,
            seed=seed,
            stop=tuple(stops),
            schema=self.constraint(),
        )


class ChatAsk(Ask):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[str, Any] = {}


class TextAsk(Ask):
    """Body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)]


def explain(error: ValidationError) -> str:
    """Return what is wrong with a body, in one line."""
    parts = []
    for one in error.errors(include_url=False, include_input=False):
        place = ".".join(map(str, one["loc"]))
        message = one["msg"].removeprefix("Value error, ")
        parts.append(f"{place}: {message}" if place else message)
    return "; ".join(parts)
