"""The runtime that hands many requests to a server at once, through the batch endpoint of the OpenAI API.

Such a batch is answered within a day, at about half the price, and costs nothing to wait for: what was sent is written to
`batches.jsonl` first, so a killed run finds its batches again and pays for none twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from smolmlx.errors import BackendError, RunError
from smolmlx.synth.runtimes import Reply, Request
from smolmlx.synth.server import AGAIN, BAD_BODY, Format, chat_body, read_completion

LEDGER = "batches.jsonl"
_RUNNING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0


class Ledger:
    """Which request lies in which batch, on disk: a line for each batch, and a line for requests to be sent again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batch_of: dict[str, str] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                self._take(json.loads(line))
            except ValueError:  # a line that a kill cut short: that batch is unknown, and sent again
                continue

    def _take(self, entry: Mapping[str, Any]) -> None:
        self.batch_of.update(dict.fromkeys(entry.get("requests", ()), entry.get("batch", "")))
        for name in entry.get("again", ()):
            self.batch_of.pop(name, None)

    def write(self, **entry: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
        self._take(entry)


class BatchRuntime:
    """Asks one model of one server, many requests to a batch."""

    name = "server"
    concurrency = 4

    def __init__(
        self,
        url: str,
        model: str,
        folder: Path,
        *,
        key: str | None = None,
        form: Format = "json_schema",
        together: int = 5_000,
        retries: int = 5,
        first_wait: float = _FIRST_WAIT,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Name a server and the folder that `batches.jsonl` lies in.

        Args:
            together: requests of a batch.
            first_wait: seconds until a batch is looked at for the first time; each wait is half as long again, to a minute.
        """
        try:
            import openai
        except ImportError as error:
            raise BackendError("batches need openai: pip install 'smolmlx[synth]'") from error
        self.url, self.model, self.form, self.together = url, model, form, together
        self.first_wait, self.on_note = first_wait, on_note
        self.ledger = Ledger(folder / LEDGER)
        self._openai = openai
        self._settings = {"base_url": url, "api_key": key or "none", "max_retries": retries}
        self._client: Any = None

    async def __aenter__(self) -> BatchRuntime:
        self._client = self._openai.AsyncOpenAI(**self._settings)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        bodies = {request_name(body): body for body in (chat_body(r, self.model, self.form) for r in requests)}
        names = [request_name(chat_body(r, self.model, self.form)) for r in requests]
        try:
            if fresh := [name for name in bodies if name not in self.ledger.batch_of]:
                await self._send({name: bodies[name] for name in fresh})
            found: dict[str, Reply] = {}
            for batch in dict.fromkeys(self.ledger.batch_of[name] for name in names):
                found |= await self._collect(batch)
        except self._openai.NotFoundError as error:
            raise BackendError(f"--server {self.url}: has no batches ({error}). Leave --batch out.") from error
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError) as error:
            raise BackendError(
                f"--server {self.url}: {error}. Put the key into the variable --key-variable names."
            ) from error
        except self._openai.OpenAIError as error:
            raise RunError(
                f"--server {self.url}: {error}. The same command goes on with the batches that were sent."
            ) from error
        replies = [found.get(name, Reply(failed="not in the batch's answers")) for name in names]
        if again := sorted({name for name, reply in zip(names, replies, strict=True) if reply.failed}):
            self.ledger.write(again=again)
        return replies

    async def _send(self, bodies: Mapping[str, Mapping[str, Any]]) -> None:
        lines = [
            json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})
            for name, body in bodies.items()
        ]
        uploaded = await self._client.files.create(file=("requests.jsonl", "\n".join(lines).encode()), purpose="batch")
        made = await self._client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        self.ledger.write(batch=made.id, requests=list(bodies))
        self.on_note(
            f"batch {made.id}: {len(bodies):,} requests sent; after an interruption the same command waits for it"
        )

    async def _collect(self, batch_id: str) -> dict[str, Reply]:
        """Wait for a batch and return its replies by request; none for requests that it has not answered."""
        wait = self.first_wait
        while (batch := await self._client.batches.retrieve(batch_id)).status in _RUNNING:
            await asyncio.sleep(wait)
            wait = min(_LONGEST_WAIT, 1.5 * wait)
        if batch.status == "failed":
            # None of its requests was asked; sent again unchanged, they would fail again.
            self.ledger.write(again=[name for name, where in self.ledger.batch_of.items() if where == batch_id])
            said = "; ".join(str(error.message) for error in (batch.errors.data if batch.errors else None) or ())
            raise BackendError(f"--server {self.url}: refused batch {batch_id}: {said or 'no reason given'}.")
        replies: dict[str, Reply] = {}
        for file_id in filter(None, (batch.error_file_id, batch.output_file_id)):
            content = await self._client.files.content(file_id)
            for line in content.text.splitlines():
                if line.strip():
                    entry = json.loads(line)
                    replies[entry["custom_id"]] = _reply(entry)
        return replies


def request_name(body: Mapping[str, Any]) -> str:
    """Return the name of a request: a hash of all it says."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]


def _reply(entry: Mapping[str, Any]) -> Reply:
    answer = entry.get("response") or {}
    status = int(answer.get("status_code") or 0)
    if entry.get("error") or not status:
        return Reply(failed=str((entry.get("error") or {}).get("code") or "no answer"))
    if status == 200:
        return read_completion(answer.get("body")) or Reply(failed=BAD_BODY)
    return Reply(failed=f"http {status}") if status in AGAIN else Reply(rejected=f"http {status}")
