"""An OpenAI-compatible server on loopback whose replies a test decides one by one, and rows to judge with it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GOOD = {"faithfulness": 5, "answer_correctness": 4, "relevance": 3, "completeness": 2, "reason": "short"}


class Server:
    """An OpenAI-compatible server on this machine; `answer(prompt, times asked)` says what it does."""

    def __init__(self, answer: Callable[[str, int], Any]) -> None:
        self.answer = answer
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.models: Any = {"object": "list", "data": [{"id": "tiny-judge", "object": "model"}]}


@contextmanager
def serve(answer: Callable[[str, int], Any]) -> Iterator[tuple[str, Server]]:
    """Serve in threads. An answer is text to reply, bytes to send as they are, an int to fail with that status, a tuple
    of a status and what to say with it, or None to hang up; where it is 400 or 422 at 0 times, this is said to structured requests, and the answer at -1 to others."""
    state = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            pass

        def send(self, status: int, tree: Any) -> None:
            body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.send_header("retry-after-ms", "5")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, state.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][-1]["content"]
            with state.lock:
                state.bodies.append(body)
                state.asked[prompt] += 1
                times = state.asked[prompt]
                state.busy += 1
                state.most_busy = max(state.busy, state.most_busy)
            found = (
                state.answer(prompt, times)
                if "response_format" in body or state.answer(prompt, 0) not in (400, 422)
                else state.answer(prompt, -1)
            )
            with state.lock:
                state.busy -= 1
            if found is None:
                self.close_connection = True
            elif isinstance(found, bytes):
                self.send(200, found)
            elif isinstance(found, tuple):
                self.send(*found)
            elif isinstance(found, int):
                self.send(found, {"error": {"message": f"fault {found}"}})
            else:
                with state.lock:
                    state.paid[prompt] += 1
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": found}}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                self.send(
                    200,
                    {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 1,
                        "model": "tiny-judge",
                        "choices": [choice],
                        "usage": usage,
                    },
                )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write_rows(path: Path, count: int, **more: Any) -> Path:
    rows = [
        {"id": f"r{i}", "input": f"question {i}", "reference": f"right {i}", "answer": f"answer {i}", **more}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
