"""A real HTTP server on loopback that speaks the OpenAI API, answers by rule, and misbehaves when told to.

The same request always gets the same answer, so what differs between two runs is the client's doing.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = [
    "adam",
    "keeps",
    "two",
    "moments",
    "while",
    "momentum",
    "carries",
    "speed",
    "and",
    "a",
    "schedule",
    "bends",
    "the",
    "rate",
    "over",
    "many",
    "steps",
    "of",
    "training",
]
HINTS = {"bullets": '{"bullets":', "pairs": '{"pairs":', "triplets": '{"triplets":', "question": '{"question":'}


@dataclass
class Behaviour:
    """Which share of requests meets which trouble; the n-th try of one request may fare better."""

    errors: float = 0.0
    limits: float = 0.0
    retry_after: str | None = "0.05"
    hangs: float = 0.0
    drops: float = 0.0
    garbage: float = 0.0
    nonsense: float = 0.0
    """Answers that keep to no schema."""
    seconds: float = 0.0
    hang_seconds: float = 1.0
    refuses: tuple[str, ...] = ()
    """response_format types that are answered with 400."""
    too_long: int | None = None
    """The n-th request's prompt, from 0, is answered with 400 in whatever form it is asked."""
    status: int | None = None
    """Answer everything with this status."""
    after: int = 0
    """... from this request on."""
    batches: bool = True
    batch_seconds: float = 0.0
    """How long a batch takes."""
    batch_status: str = "completed"
    """... and how it ends."""
    unanswered: float = 0.0
    """Share of a batch's requests that meet a 500 the first time."""


@dataclass
class Seen:
    """What the server saw."""

    requests: int = 0
    at_once: int = 0
    most_at_once: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    """Prompt and seed -> times."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    batch_lock: threading.RLock = field(default_factory=threading.RLock)
    """Files are numbered, and a batch is answered, by one thread at a time: a client that retries makes two."""


def share(*key: object) -> float:
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:6], "big") / 2**48


def sentence(size: int, *key: object) -> str:
    return " ".join(WORDS[int(share(*key, i) * len(WORDS))] for i in range(size)) + f" {share(*key):.9f}."


def answer(kind: str, key: str) -> dict[str, Any]:
    """Return an answer that keeps to the schema `kind`."""
    if kind == "bullets":
        return {"bullets": [sentence(8, key, i) for i in range(1 + int(share(key) * 6))]}
    if kind == "pairs":
        count = 1 + int(share(key) * 3)
        return {
            "pairs": [{"question": sentence(6, key, i, "q"), "answer": sentence(9, key, i, "a")} for i in range(count)]
        }
    if kind == "triplets":
        parts = ("subject", "relation", "object")
        return {
            "triplets": [{name: sentence(2, key, i, name) for name in parts} for i in range(1 + (share(key) > 0.5))]
        }
    if kind == "question":
        return {"question": sentence(7, key), "why": sentence(9, key, "why")}
    return {"text": sentence(220, key)}


def kind_of(body: Mapping[str, Any]) -> str:
    """Return the schema a request asks for, by its response_format or by its words."""
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        schema = form["json_schema"]["schema"]
        assert form["json_schema"]["strict"] and schema["additionalProperties"] is False
        return next(iter(schema["properties"]))
    prompt = body["messages"][-1]["content"]
    return next((kind for kind, hint in HINTS.items() if hint in prompt), "text")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        _, _, kind, *rest = self.path.split("/")
        if kind == "batches" and rest[0] in self.server.seen.batches:
            self._send(200, self._batch(rest[0]))
            return
        if kind == "files" and rest[0] in self.server.seen.files:
            self._send(200, None, raw=self.server.seen.files[rest[0]])
            return
        if kind != "models":
            self._send(404, {"error": {"message": "not here"}})
            return
        self._send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.path.endswith(("/files", "/batches")):
            self._take_batch(data)
            return
        body = json.loads(data)
        seen, how = self.server.seen, self.server.how
        key = f"{body['messages'][-1]['content']}|{body.get('seed')}"
        with seen.lock:
            seen.requests += 1
            seen.at_once += 1
            seen.most_at_once = max(seen.most_at_once, seen.at_once)
            seen.asked[key] += 1
            number, tries = seen.requests, seen.asked[key]
            seen.bodies.append(body)
            seen.headers.append(dict(self.headers))
            seen.times.append(time.monotonic())
        try:
            self._answer(body, key, tries, number, how)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up
        finally:
            with seen.lock:
                seen.at_once -= 1

    def _answer(self, body: Mapping[str, Any], key: str, tries: int, number: int, how: Behaviour) -> None:
        if how.status is not None and number > how.after:
            self._send(how.status, {"error": {"message": "told to"}})
            return
        form = (body.get("response_format") or {}).get("type")
        if how.too_long is not None and list(self.server.seen.asked).index(key) == how.too_long:
            self._send(400, {"error": {"message": "maximum context length"}})
            return
        if form in how.refuses:
            self._send(400, {"error": {"message": f"response_format {form} is not supported"}})
            return
        time.sleep(how.seconds)
        mark, trouble = share(key, tries, "trouble"), "none"
        for name in ("errors", "limits", "hangs", "drops", "garbage"):
            mark -= getattr(how, name)
            if mark < 0:
                trouble = name
                break
        with self.server.seen.lock:
            self.server.seen.troubles[trouble] += 1
        if trouble == "errors":
            self._send(500 + int(share(key, tries) * 2) * 3, {"error": {"message": "broken"}})
        elif trouble == "limits":
            self._send(
                429, {"error": {"message": "slow down"}}, {"Retry-After": how.retry_after} if how.retry_after else {}
            )
        elif trouble == "drops":
            self.close_connection = True
            self.connection.close()
        elif trouble == "garbage":
            self._send(200, {"choices": []})
        else:
            if trouble == "hangs":
                time.sleep(how.hang_seconds)
            self._send(200, self._completion(body, key, how))

    def _take_batch(self, data: bytes) -> None:
        """Take an uploaded file, or a batch of one."""
        with self.server.seen.batch_lock:
            self._take_alone(data)

    def _take_alone(self, data: bytes) -> None:
        seen = self.server.seen
        if not self.server.how.batches:
            self._send(404, {"error": {"message": "no such endpoint"}})
        elif self.path.endswith("/files"):
            boundary = self.headers["content-type"].split("boundary=")[1].strip('"')
            part = next(part for part in data.decode().split(f"--{boundary}") if 'name="file"' in part)
            name = f"file-{len(seen.files)}"
            seen.files[name] = part.split("\r\n\r\n", 1)[1].removesuffix("\r\n")
            self._send(200, {"id": name, "object": "file"})
        else:
            name, asked = f"batch-{len(seen.batches)}", json.loads(data)
            seen.batches[name] = {**asked, "begun": time.monotonic()}
            self._send(200, self._batch(name))

    def _batch(self, name: str) -> dict[str, Any]:
        """Return a batch, answered once its time is over."""
        with self.server.seen.batch_lock:
            return self._batch_alone(name)

    def _batch_alone(self, name: str) -> dict[str, Any]:
        seen, how = self.server.seen, self.server.how
        batch = seen.batches[name]
        done = time.monotonic() >= batch["begun"] + how.batch_seconds
        tree = {"id": name, "object": "batch", "created_at": 0, "completion_window": "24h", **batch}
        if not done:
            return {**tree, "status": "in_progress"}
        if how.batch_status == "failed":
            return {**tree, "status": "failed", "errors": {"data": [{"message": "told to fail"}]}}
        if "output_file_id" not in batch:
            answered, failed = [], []
            for line in seen.files[batch["input_file_id"]].splitlines():
                entry = json.loads(line)
                key = f"{entry['body']['messages'][-1]['content']}|{entry['body'].get('seed')}"
                seen.asked[key] += 1
                if share(key, "unanswered") < how.unanswered and seen.asked[key] == 1:
                    failed.append({"custom_id": entry["custom_id"], "response": {"status_code": 500, "body": {}}})
                else:
                    answer = {"status_code": 200, "body": self._completion(entry["body"], key, how)}
                    answered.append({"custom_id": entry["custom_id"], "response": answer, "error": None})
            for role, lines in (("output_file_id", answered), ("error_file_id", failed)):
                batch[role] = f"file-{len(seen.files)}"
                seen.files[batch[role]] = "".join(json.dumps(line) + "\n" for line in lines)
        return {**tree, **batch, "status": how.batch_status}

    def _completion(self, body: Mapping[str, Any], key: str, how: Behaviour) -> dict[str, Any]:
        text = json.dumps(answer(kind_of(body), key))
        finish = "stop"
        if share(key, "nonsense") < how.nonsense:
            mark = share(key, "which")
            text = (
                ""
                if mark < 0.3
                else '{"bullets": [], "pairs": 3, "text": ""}'
                if mark < 0.6
                else text[: len(text) // 2]
            )
            finish = "length" if mark >= 0.6 else finish
        usage = {"prompt_tokens": len(key.split()), "completion_tokens": len(text.split())}
        return {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
            "usage": usage,
        }

    def _send(self, status: int, tree: Any, headers: Mapping[str, str] | None = None, raw: str | None = None) -> None:
        data = (json.dumps(tree) if raw is None else raw).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, how: Behaviour, models: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.how, self.seen, self.models = how, Seen(), models

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections that a test drops or kills

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(how: Behaviour | None = None, models: tuple[str, ...] = ("rule",)) -> Iterator[_Server]:
    """Run a server while the block runs."""
    server = _Server(how or Behaviour(), models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
