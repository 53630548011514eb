"""The runtime that asks an OpenAI-compatible server (mlx_lm.server, vLLM, llama.cpp, or a service) over HTTP.

Bounded concurrency, a time limit for each request, retries with growing pauses, and one pause for all requests where the
server says that it is asked too often. Replies are asked for in the request's JSON schema as far as the server takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from smolmlx.errors import BackendError, RecipeError
from smolmlx.synth.runtimes import Reply, Request

if TYPE_CHECKING:
    import httpx2

Format = Literal["json_schema", "json_object", "none"]
FORMATS: tuple[Format, ...] = ("json_schema", "json_object", "none")

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes after which the same request may succeed."""
_CLOSED = {401: "the key is missing or wrong", 402: "not paid for", 403: "not allowed", 404: "not found"}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_LONGEST_ASKED_PAUSE = 900.0
_MOST_RATE_LIMITS = 100
"""Rate limits are not a fault of the request: they use up no retry until there are this many."""
_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
BAD_BODY = "reply is not a chat completion"


@dataclass(frozen=True, slots=True)
class Limits:
    """How hard to press a server."""

    concurrency: int = 16
    timeout: float = 120.0
    """Seconds for one request, from sending to the last byte."""
    retries: int = 5
    per_minute: int | None = None
    """Most requests begun in a minute."""
    response_format: Literal["auto", "json_schema", "json_object", "none"] = "auto"


@dataclass(slots=True)
class _Outcome:
    """One try: a reply, or why not and after how long to try again."""

    reply: Reply | None = None
    reason: str = ""
    pause: float | None = None
    """Seconds the server asked for."""
    again: bool = True
    counts: bool = True
    """Whether it uses up a retry; what is no fault of the request does not."""


@dataclass(slots=True)
class Traffic:
    """What happened on the wire."""

    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)


class ServerRuntime:
    """Asks one model of one server."""

    name = "server"
    together = 1

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        key: str | None = None,
        limits: Limits | None = None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Name a server by the address its API begins at, e.g. http://127.0.0.1:8080/v1.

        Args:
            model: as the server names it; None takes the only one it has.
            on_note: told once what the server cannot do.

        Raises:
            RecipeError: not an http address.
        """
        if not has_host(url):
            raise RecipeError(f"--server {url}: expected an address such as http://127.0.0.1:8080/v1.")
        self.url, self.model, self.limits, self.on_note = url.rstrip("/"), model or "", limits or Limits(), on_note
        self.concurrency = self.limits.concurrency
        self.traffic = Traffic()
        auto = self.limits.response_format == "auto"
        self._formats: list[Format] = list(FORMATS) if auto else [self.limits.response_format]  # type: ignore[list-item]
        self._format_works = not auto
        self._key = key
        self._client: httpx2.AsyncClient | None = None
        self._not_before = 0.0

    async def __aenter__(self) -> ServerRuntime:
        await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _connect(self) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise BackendError("asking a server needs httpx2: pip install 'smolmlx[synth]'") from error
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # Pausing and the time limit are this module's; the pool must not add a limit of its own.
        pool = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self._client = httpx2.AsyncClient(headers=headers, timeout=None, limits=pool)

    def find_model(self) -> str:
        """Ask the server which models it has, and settle on one.

        A name that it does not list is tried with one short question: servers answer to more names than they list.

        Raises:
            BackendError: not reachable, closed to this key, it refuses the name, or none was given and it has not exactly one.
        """
        return asyncio.run(self._find_model())

    async def _find_model(self) -> str:
        async with self:
            assert self._client is not None
            import httpx2

            try:
                found = await asyncio.wait_for(self._client.get(f"{self.url}/models"), self.limits.timeout)
            except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise BackendError(
                    f"--server {self.url}: cannot be reached ({error or 'time-out'}). Start one, e.g.: "
                    "mlx_lm.server --model MODEL --port 8080, and pass --server http://127.0.0.1:8080/v1."
                ) from error
            if found.status_code in (401, 402, 403):
                raise self._closed(found)
            names = _model_names(found)
            if self.model and self.model not in names:
                await self._try_name()
        if not self.model:
            if len(names) != 1:
                listed = ", ".join(names[:20]) or "none"
                raise BackendError(f"--server {self.url}: which model? Pass --model. It has: {listed}.")
            self.model = names[0]
        return self.model

    async def _try_name(self) -> None:
        """Ask one short question, so that a wrong name is refused before anything is written under it."""
        import httpx2

        assert self._client is not None
        body = {"model": self.model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 8}
        with contextlib.suppress(
            TimeoutError, httpx2.HTTPError
        ):  # it may be loading the model, or be busy: not refused
            posting = self._client.post(f"{self.url}/chat/completions", json=body)
            response = await asyncio.wait_for(posting, self.limits.timeout)
            if response.status_code in _CLOSED:
                raise self._closed(response)

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        return list(await asyncio.gather(*(self._ask(request) for request in requests)))

    async def _ask(self, request: Request) -> Reply:
        tries = rate_limits = 0
        refused: set[Format] = set()
        while True:
            await self._turn()
            form = next(form for form in self._formats if form not in refused)
            outcome = await self._try(request, form)
            if outcome.reply is not None:
                self._settle(form)
                return outcome.reply
            if not outcome.again:
                refused.add(form)
                if self._may_be_the_format(form) and not refused.issuperset(self._formats):
                    self.traffic.retries[f"no {form}"] += 1
                    continue
                return Reply(rejected=outcome.reason)
            self.traffic.retries[outcome.reason] += 1
            limited = outcome.reason == "http 429"
            rate_limits += limited
            tries += outcome.counts
            if tries > self.limits.retries or rate_limits > _MOST_RATE_LIMITS:
                return Reply(failed=outcome.reason)
            pause = outcome.pause
            if pause is None:
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (tries + min(rate_limits, 6) - 1)) * random.uniform(
                    0.5, 1
                )
            if limited or outcome.pause is not None:  # it holds for all requests, not for this one alone
                self._not_before = max(self._not_before, time.monotonic() + pause)
            else:
                await asyncio.sleep(pause)

    async def _turn(self) -> None:
        """Wait until a request may be begun."""
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0, 0.05 * left))
        if self.limits.per_minute is not None:
            self._not_before = time.monotonic() + 60 / self.limits.per_minute

    async def _try(self, request: Request, form: Format) -> _Outcome:
        import httpx2

        assert self._client is not None
        self.traffic.requests += 1
        try:
            posting = self._client.post(f"{self.url}/chat/completions", json=chat_body(request, self.model, form))
            response = await asyncio.wait_for(posting, self.limits.timeout)
        except TimeoutError:
            return _Outcome(reason="time-out")
        except httpx2.HTTPError as error:
            return _Outcome(reason=f"connection: {type(error).__name__}")
        status = response.status_code
        if status == 200:
            return _read(response)
        if is_used_up(response):
            raise BackendError(
                f"--server {self.url}: the quota is used up. The same command goes on once there is more."
            )
        if status in _CLOSED:
            raise self._closed(response)
        if status in AGAIN:
            return _Outcome(reason=f"http {status}", pause=_asked_pause(response), counts=status != 429)
        return _Outcome(reason=f"http {status}", again=False)

    def _may_be_the_format(self, form: Format) -> bool:
        """Whether a refusal may be due to `form`: nothing was answered so far, or only what asked for another."""
        return not self._format_works or form not in self._formats

    def _settle(self, form: Format) -> None:
        """Ask for `form` from now on: a request was answered with it, and was refused with those before it."""
        if self._format_works:
            return
        self._format_works = True
        while self._formats[0] != form:
            dropped = self._formats.pop(0)
            self.on_note(f"{self.url}: does not take response_format {dropped}; asking for {self._formats[0]}")

    def _closed(self, response: httpx2.Response) -> BackendError:
        status = response.status_code
        said = _error_text(response)
        what = f"http {status}, {_CLOSED[status]}" + (f" ({said})" if said else "")
        hint = (
            "Check the address and --model." if status == 404 else "Put the key into the variable --key-variable names."
        )
        return BackendError(f"--server {self.url}, model {self.model}: {what}. {hint}")


def has_host(address: str) -> bool:
    """Whether a text is an http address that can be asked: with a host, and a port that there can be."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        return False


def _read(response: httpx2.Response) -> _Outcome:
    try:
        reply = read_completion(response.json())
    except ValueError:
        reply = None
    return _Outcome(reason=BAD_BODY) if reply is None else _Outcome(reply)


def _error_text(response: httpx2.Response) -> str:
    """Return what a server says of an error, on one line; nothing where it says it in another form than the API's."""
    try:
        error = response.json()["error"]
        said = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        return ""
    return " ".join(str(said).split())[:300].rstrip(".")


def _model_names(response: httpx2.Response) -> list[str]:
    """Return what a server lists; nothing where it has no such list."""
    try:
        return [str(entry["id"]) for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def chat_body(request: Request, model: str, form: Format) -> dict[str, Any]:
    """Return the body of a chat completion that asks for an answer in the request's schema, as far as `form` says it."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
    }
    if form == "json_schema":
        schema = request.schema.model_json_schema()
        named = {"name": request.schema.__name__.lower(), "strict": True, "schema": schema}
        body["response_format"] = {"type": form, "json_schema": named}
    elif form == "json_object":
        body["response_format"] = {"type": form}
    return body


def is_used_up(response: httpx2.Response) -> bool:
    """Tell a quota that does not come back from a 429 that says to wait."""
    return response.status_code == 429 and "insufficient_quota" in response.text


def read_completion(tree: Any) -> Reply | None:
    """Return the reply in a chat completion; None where it is not one."""
    try:
        choice = tree["choices"][0]
        text = choice["message"].get("content") or ""
        usage = tree.get("usage") or {}
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        return Reply(_THINKING.sub("", text), *counts, cut=choice.get("finish_reason") == "length")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _asked_pause(response: httpx2.Response) -> float | None:
    """Return the seconds of a Retry-After header, given as a number or a date."""
    said = response.headers.get("retry-after")
    if not said:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _LONGEST_ASKED_PAUSE)
