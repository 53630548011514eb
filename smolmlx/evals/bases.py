"""One base in memory, adapters put on it in turn: what lets a comparison, or a whole sweep, load and ask a base once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from smolmlx.backend import Backend, Decoding, Generator, Loading
from smolmlx.data.chat import Tokenizer
from smolmlx.models import BaseModel


@dataclass(frozen=True, slots=True)
class System:
    """A model under test: a base with at most one adapter."""

    name: str
    model: BaseModel
    adapter: Path | None = None


@dataclass
class Bases:
    """The base that is loaded now, and what bases without an adapter have answered."""

    backend: Backend
    loads: int = 0
    """How often a base was loaded."""
    _loaded: tuple[object, Generator] | None = None
    _answers: dict[str, list[str]] = field(default_factory=dict)

    def generator(self, system: System, tokenizer: Tokenizer, loading: Loading) -> Generator:
        """Return a generator of a system; the one before shares its base, and must not be used any more."""
        key = (system.model.folder, loading, tokenizer.eos_ids)
        if self._loaded is not None and self._loaded[0] == key:
            generator = self._loaded[1]
            generator.use_adapter(system.adapter)
            return generator
        self.release()  # one base in memory at a time
        generator = self.backend.generator(system.model, system.adapter, tokenizer, loading)
        self._loaded = (key, generator)
        self.loads += 1
        return generator

    def answer(
        self,
        system: System,
        tokenizer: Tokenizer,
        loading: Loading,
        prompts: Sequence[Sequence[int]],
        how: Decoding,
        on_done: Callable[[int], None],
    ) -> list[str]:
        """Answer token prompts, in order. A base without an adapter is asked the same only once."""
        asked = [str(system.model.folder), astuple(loading), tokenizer.eos_ids, astuple(how), prompts]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        if system.adapter is not None or key not in self._answers:
            found = generate(self.generator(system, tokenizer, loading), tokenizer, prompts, how, on_done)
            if system.adapter is not None:
                return found
            self._answers[key] = found
        else:
            on_done(len(prompts))
        return list(self._answers[key])

    def release(self) -> None:
        """Let go of the loaded base; its answers stay."""
        self._loaded = None


def generate(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Decoding,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answer token prompts in batches; answers come back as text, in order."""
    answers = [""] * len(prompts)
    for done, completion in enumerate(generator.generate(prompts, how), 1):
        answers[completion.index] = completion.text.strip()
        on_done(done)
    return answers
