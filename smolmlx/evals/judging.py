"""Ask judges many questions: at once, again where it failed, and never twice for a reply that was paid for."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from smolmlx.backend import Decoding, Generator
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, RunError
from smolmlx.evals.judge import Marks, Messages, Question, Record, parse_reply
from smolmlx.rundir import hold
from smolmlx.synth.server import BAD_BODY, is_used_up, read_completion

if TYPE_CHECKING:
    import httpx2

NONSENSE = "nonsense"
_FIRST_PAUSE = 0.5
_UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What reading a body raises that is not of the form asked for, whatever it is instead."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge said, and what it cost in tokens."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    has_usage: bool = True
    """False where the server did not say; the tokens are 0 then."""
    cut: bool = False
    """Its tokens ran out: whatever it says, it did not come to its end."""


class NoReply(Exception):
    """A judge could not be reached for this question; another one may still work."""


class Judge(Protocol):
    """Something that answers messages; `ask` is called from several threads, or from the caller's where concurrency is 1."""

    name: str
    """What its replies are kept under: two judges must not share one."""
    concurrency: int
    asks: int
    """How often it is asked the same when it answers nonsense."""

    def ask(self, messages: Messages, schema: dict[str, object]) -> Reply: ...


class Ledger:
    """The replies so far, one line each, written as they come: what was paid for is kept, whatever happens next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = _read_ledger(path)
        self._lock = threading.Lock()

    def settled(self, asks: int) -> set[str]:
        """Return the keys that need no asking: good replies, and nonsense that was paid for as often as is asked."""
        return {key for key, record in self.records.items() if not record.error or record.nonsense >= asks}

    def add(self, record: Record) -> None:
        with self._lock:
            self.records[record.key] = record
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
                file.flush()
                os.fsync(file.fileno())


@contextlib.contextmanager
def open_ledger(path: Path) -> Iterator[Ledger]:
    """Read a ledger, and keep a second process out of it.

    Raises:
        RunError: another process asks judges for it, or it is not a ledger.
    """
    busy = f"{path}: another process is writing here. Wait for it, or choose another --out."
    with hold(path.with_name(f".{path.name}.lock"), busy):
        yield Ledger(path)


def _read_ledger(path: Path) -> dict[str, Record]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # a line cut by a kill
        path.write_text(whole, encoding="utf-8")
    records = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{path}:{number}: not a line of a judge's ledger ({error}). Choose another --out."
            ) from error
        records[record.key] = record
    return records


def run(
    judge: Judge, asked: Sequence[Question], ledger: Ledger, on_done: Callable[[int], None] = lambda done: None
) -> None:
    """Ask every question that the ledger has no reply to.

    Raises:
        BackendError: the judge refuses all questions (no such model, a wrong key, no quota); what was answered is kept.
    """
    settled = ledger.settled(judge.asks)
    left = [question for question in asked if question.key not in settled]
    before = len(asked) - len(left)
    if judge.concurrency == 1:  # no thread: MLX aborts the process at its end if another thread has used it
        for done, question in enumerate(left, before + 1):
            _ask(judge, question, ledger)
            on_done(done)
        return
    with ThreadPoolExecutor(judge.concurrency) as pool:
        waiting = [pool.submit(_ask, judge, question, ledger) for question in left]
        try:
            for done, future in enumerate(as_completed(waiting), before + 1):
                future.result()
                on_done(done)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def _ask(judge: Judge, question: Question, ledger: Ledger) -> None:
    """Ask until the reply is good, or was nonsense often enough; goes on from what the ledger holds of the question.

    The thread that got a reply writes it down at once, so that none is paid for again when another one fails, or in a kill.
    """
    new = Record(question.key, question.item.id, question.judge, question.swapped, None)
    record = ledger.records.get(question.key, new)
    while record.nonsense < judge.asks:
        try:
            reply = judge.ask(question.messages, question.schema.model_json_schema())
        except NoReply as error:
            ledger.add(replace(record, error=str(error)))
            return
        found = None if reply.cut else parse_reply(reply.text, question.schema)
        record = replace(
            record,
            reply=found,
            error="" if found else NONSENSE,
            raw="" if found else reply.text,
            prompt_tokens=record.prompt_tokens + reply.prompt_tokens,
            completion_tokens=record.completion_tokens + reply.completion_tokens,
            without_usage=record.without_usage + (not reply.has_usage),
            nonsense=record.nonsense + (not found),
        )
        ledger.add(record)
        if found:
            return


class EndpointJudge:
    """A model behind an OpenAI-compatible address; the client repeats what failed, with growing pauses."""

    asks = 3

    def __init__(self, url: str, model: str | None, *, key: str, concurrency: int = 4, retries: int = 5, seconds: float = 60, named: tuple[str, str] = ("--model", "--key-from")) -> None:  # fmt: skip
        """Name a judge by its address; raises BackendError where the model is left to a server that has not exactly one.

        Args:
            named: where the model and the key are given, for messages.
        """
        try:
            import openai
        except ImportError as error:
            raise BackendError("a judge at an address needs openai: pip install 'smolmlx[judge]'") from error
        self._openai = openai
        http = openai.DefaultHttpxClient(event_hooks={"response": [_stop_retries]})
        weakref.finalize(self, http.close)  # openai closes only clients that it made itself
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=seconds, http_client=http)
        self._structured = True
        self._retries, self._named = retries, named
        self.concurrency = concurrency
        self.url = url
        self._model = model or self._only_model()
        self.name = f"{self._model} at {address(url)}"

    def _only_model(self) -> str:
        try:
            listed = json.loads(self._client.models.with_raw_response.list().content)
            names = [str(model["id"]) for model in listed["data"]]
        except self._openai.APIConnectionError as error:
            raise BackendError(f"--judge {self.url}: cannot be reached ({_why(error)}). Is the server running?") from error  # fmt: skip
        except (self._openai.OpenAIError, *_UNREADABLE) as error:
            raise BackendError(f"--judge {self.url}: cannot be asked for its models ({error}). Is it the address that ends in /v1? Else pass {self._named[0]}.") from error  # fmt: skip
        if len(names) != 1:
            raise BackendError(
                f"--judge {self.url}: serves {len(names)} models ({', '.join(names[:5])}). Choose with {self._named[0]}."
            )
        return names[0]

    def ask(self, messages: Messages, schema: dict[str, object]) -> Reply:
        """Ask once, through retries.

        Raises:
            NoReply: no reply after all retries.
            BackendError: every question would be refused.
        """
        openai = self._openai
        form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
        try:
            if not self._structured:
                return self._complete(messages)
            try:
                return self._complete(messages, response_format=form)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                # A server without structured replies, where it takes the same in words alone; else a bad request.
                reply = self._complete(messages)
                self._structured = False
                return reply
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise BackendError(f"--judge {self.url}: refused ({error}). Check {' and '.join(self._named)}.") from error
        except openai.OpenAIError as error:
            if isinstance(error, openai.APIStatusError) and is_used_up(error.response):
                raise BackendError(f"--judge {self.url}: the quota is used up. Go on with --resume once there is more.") from error  # fmt: skip
            raise NoReply(f"{type(error).__name__}: {_why(error)}") from error

    def probe(self) -> None:
        """Ask one short question, before work is done for a judge that cannot be asked.

        Raises:
            BackendError: not reachable, or every question would be refused.
        """
        try:
            self.ask(({"role": "user", "content": "Reply with a mark of 1 for each."},), Marks.model_json_schema())
        except NoReply as error:
            raise BackendError(f"--judge {self.url}: does not answer ({error}). Is the server running?") from error

    def _complete(self, messages: Messages, **extra: Any) -> Reply:
        """Return a reply, asking again for a body that is not a chat completion: the client's own retries take any 200."""
        for tried in range(self._retries + 1):
            time.sleep(min(8.0, _FIRST_PAUSE * 2 ** (tried - 1)) if tried else 0)
            made = self._client.chat.completions.with_raw_response.create(model=self._model, messages=[dict(m) for m in messages], temperature=0, **extra)  # fmt: skip
            with contextlib.suppress(*_UNREADABLE):
                tree = json.loads(made.content)
                if (found := read_completion(tree)) is not None:
                    return Reply(found.text, found.prompt_tokens, found.completion_tokens, _has_usage(tree), found.cut)
        raise NoReply(BAD_BODY)


def _why(error: Exception) -> str:
    """Return what is known of a failure: the client says "Connection error." where the cause says which."""
    return str(error.__cause__ or error)


def _stop_retries(response: httpx2.Response) -> None:
    """Tell the client that asking again is in vain, as servers may do with this header: a quota does not come back."""
    if response.status_code == 429:
        response.read()
        if is_used_up(response):
            response.headers["x-should-retry"] = "false"


def _has_usage(tree: Mapping[str, Any]) -> bool:
    usage = tree.get("usage") or {}
    return None not in (usage.get("prompt_tokens"), usage.get("completion_tokens"))


def address(url: str) -> str:
    """Return an address as judges are told apart by it: without what may hold a key."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


class LocalJudge:
    """A model on this machine, through an engine's generator.

    It answers freely: decoding held to the schema would give marks to a model that cannot judge.
    """

    concurrency = 1
    asks = 1  # greedy: it would say the same again

    def __init__(self, name: str, generator: Generator, tokenizer: Tokenizer) -> None:
        self.name, self._generator, self._tokenizer = name, generator, tokenizer

    def ask(self, messages: Messages, schema: dict[str, object]) -> Reply:
        tokens = self._tokenizer.encode(self._tokenizer.prompt(messages))
        (made,) = self._generator.generate([tokens], Decoding(max_tokens=200))
        return Reply(made.text, len(tokens), len(made.ids), cut=not made.finished)
