"""Chunks to rows: what is asked, what is accepted, and that nothing is lost or made twice, against a real HTTP server."""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from augment_work import always, prose, published
from openai_server import Behaviour, serving
from smolmlx import cli
from smolmlx.data.notes import INSTRUCTION
from smolmlx.data.splits import Method
from smolmlx.errors import BackendError, RecipeError, RunError
from smolmlx.evals.notes import strict_compliance
from smolmlx.evals.parsers import parse_retrieval
from smolmlx.evals.run import Settings
from smolmlx.evals.run import read_rows as read_scored
from smolmlx.synth.augment import augment, outline
from smolmlx.synth.chunks import Cut, write_chunks
from smolmlx.synth.jobs import Order, Workshop, chance
from smolmlx.synth.runtimes import TOO_LONG, Reply, Request
from smolmlx.synth.server import Limits, ServerRuntime
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks import MADE
from smolmlx.tasks.registry import read_registry
from smolmlx.tasks.schemas import Bullets, Quest

FAST = Limits(concurrency=8, timeout=30, retries=12)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 60 chunks of 20 documents in three splits."""
    folder = tmp_path_factory.mktemp("documents")
    for i in range(20):
        (folder / f"{i}.txt").write_text(prose(i, 18 + 2 * i))
    write_chunks([str(folder)], folder / "chunks", Cut(200, 40), Method(seed=1))
    return folder / "chunks"


@pytest.fixture
def store(chunks: Path) -> Iterator[ChunkStore]:
    with ChunkStore(chunks) as opened:
        yield opened


def workshop(store: ChunkStore, probability: float = 1.0, **order: Any) -> Workshop:
    return Workshop(
        store, always(read_registry(), probability), Order(**{"model": "rule", "runtime": "server", **order})
    )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    files = [folder / f"{split}.jsonl" for split in ("train", "validation", "test")]
    return [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]


class Canned:
    """A runtime in the process whose answers are a function of the request."""

    name, model, concurrency = "server", "rule", 4

    def __init__(self, answer: Callable[[Request], Reply], together: int = 1) -> None:
        self.answer, self.together, self.asked = answer, together, list[Request]()

    async def __aenter__(self) -> Canned:
        return self

    async def __aexit__(self, *exception: object) -> None:
        return None

    async def ask(self, requests: Any) -> list[Reply]:
        await asyncio.sleep(0)
        self.asked += requests
        return [self.answer(request) for request in requests]


def test_probability_is_kept_whatever_else_changes(store: ChunkStore) -> None:
    share = sum(chance(0, f"chunk {i}", "qa") < 0.25 for i in range(20_000)) / 20_000
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5  # four standard errors of a binomial
    one, two = workshop(store, 0.25, tasks=("qa",)), workshop(store, 0.25, tasks=("bullets", "qa"))
    drawn = [{one.key(job) for job in one.jobs()}, {two.key(job) for job in two.jobs() if job.task == "qa"}]
    assert drawn[0] == drawn[1] and 0 < len(drawn[0]) < len(store)
    other = workshop(store, 0.25, tasks=("qa",), seed=1)
    assert {other.key(job) for job in other.jobs()} != drawn[0]


def test_jobs_and_rows(store: ChunkStore, tmp_path: Path) -> None:
    made = workshop(store)
    planned = outline(made)
    assert planned.total == sum(planned.jobs.values()) and set(planned.jobs) == set(MADE)
    with serving() as server:
        result = augment(made, ServerRuntime(server.url, "rule", limits=FAST), tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    tasks = Counter(row["task"] for row in rows)
    assert all(tasks[task] == planned.jobs[task] for task in MADE) and tasks["answer"] == tasks["qa"]
    assert 0.2 < tasks["question"] / tasks["qa"] < 0.8 and tasks["fact"] > 0
    assert result.manifest["rows"] == len(rows) == len({row["id"] for row in rows})
    homes = {row["document"]: row["split"] for row in rows}
    assert all(homes[row["document"]] == row["split"] for row in rows)
    for row in rows:
        assert row["chunk"].startswith(row["document"]) and row["prompt_version"] == made.registry.prompt_version
        assert all(homes[other.rpartition(":")[0]] == row["split"] for other in row["other_chunks"])
        assert row["model"] == ("none" if row["task"] == "continuation" else "rule") and row["seed"] == 0
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    styles = {(row["task"], row["style"]) for row in rows}
    assert {("bullets", "markdown"), ("bullets", "python"), ("bullets", "json"), ("continuation", "infill")} <= styles
    assert len({row["messages"][0]["content"].split("\n")[0] for row in rows if row["task"] == "rephrase"}) == 3
    assert "Splits are by document" in (tmp_path / "out" / "README.md").read_text()


def test_retrieval_gold(store: ChunkStore, tmp_path: Path) -> None:
    made = workshop(store, tasks=("retrieval",))
    with serving() as server:
        augment(made, ServerRuntime(server.url, "rule", limits=FAST), tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    gold = [row["gold"]["index"] for row in rows]
    assert 0.05 < gold.count(None) / len(gold) < 0.5 and {0, 1, 2} <= set(gold)
    texts = {store[n].id: store[n].text for n in range(len(store))}
    for row in rows:
        asked, answer = (turn["content"] for turn in row["messages"])
        passages = [part.split("\n", 1)[1] for part in asked.split("\n\nPassage ")[1:]]
        assert 3 <= len(passages) <= 5 and parse_retrieval(answer, len(passages)).index == row["gold"]["index"]
        own = [index for index, passage in enumerate(passages) if passage in texts[row["chunk"]]]
        assert own == ([] if row["gold"]["index"] is None else [row["gold"]["index"]])
        assert len(set(passages)) == len(passages) == len(row["other_chunks"]) + (row["gold"]["index"] is not None)


def test_comparison_takes_two_chunks(store: ChunkStore) -> None:
    made = workshop(store, tasks=("comparison",))
    for job in list(made.jobs())[:30]:
        (row,) = made.rows(job, "They are alike.")
        (other,) = row["other_chunks"]
        assert other != row["chunk"]
        request = made.request(job, 0)
        assert request is not None and '{"text": "..."}' in request.prompt and request.temperature == 0.5
        first, second = row["messages"][0]["content"].partition("First passage:\n")[2].split("\n\nSecond passage:\n")
        assert first != second and first in request.prompt and second in request.prompt


@pytest.mark.parametrize("layout", ["messages", "prompt-completion", "alpaca"])
def test_layouts_are_read_as_the_same_conversation(store: ChunkStore, tmp_path: Path, layout: str) -> None:
    from smolmlx.data.formats import open_source

    made, plain = workshop(store, tasks=("bullets",), layout=layout), workshop(store, tasks=("bullets",))
    job = next(made.jobs())
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(made.rows(job, ("one", "two"))[0]))
    (example,) = open_source(str(path))
    assert [dict(turn) for turn in example.messages] == plain.rows(job, ("one", "two"))[0]["messages"]


def test_troubles_lose_nothing(store: ChunkStore, tmp_path: Path) -> None:
    made = workshop(store, 0.3)
    with serving(Behaviour(nonsense=0.1)) as server:
        calm = augment(made, ServerRuntime(server.url, "rule", limits=FAST), tmp_path / "calm")
    how = Behaviour(
        errors=0.1, limits=0.1, hangs=0.01, drops=0.05, garbage=0.05, nonsense=0.1, seconds=0.003, hang_seconds=3
    )
    with serving(how) as server:
        runtime = ServerRuntime(server.url, "rule", limits=Limits(concurrency=8, timeout=1.5, retries=20))
        rough = augment(made, runtime, tmp_path / "rough")
    assert published(tmp_path / "calm") == published(tmp_path / "rough")
    assert rough.totals.failed.total() == 0 and rough.totals.done == rough.totals.jobs
    assert all(server.seen.troubles[name] for name in ("errors", "limits", "hangs", "drops", "garbage"))
    assert 1 < server.seen.most_at_once <= 8 + server.seen.troubles["hangs"]  # the server sleeps on
    reasons = runtime.traffic.retries
    assert {"http 500", "http 503", "http 429", "time-out", "reply is not a chat completion"} <= set(reasons)
    assert any(reason.startswith("connection: ") for reason in reasons)
    refused = calm.totals.attempts_refused
    assert {"cut off", "empty"} <= set(refused) and refused.total() > calm.totals.rejected.total()


def test_concurrency_is_bounded_and_used(store: ChunkStore, tmp_path: Path) -> None:
    with serving(Behaviour(seconds=0.02)) as server:
        augment(workshop(store, 0.3), ServerRuntime(server.url, "rule", limits=Limits(concurrency=3)), tmp_path / "out")
    assert server.seen.most_at_once == 3


@pytest.mark.parametrize("said", ["0.3", "date", None])
def test_rate_limits_hold_for_all_requests(store: ChunkStore, tmp_path: Path, said: str | None) -> None:
    how = Behaviour(limits=0.05, retry_after=said)
    if said == "date":
        how.retry_after = email.utils.formatdate(time.time() + 1, usegmt=True)
    with serving(how) as server:
        runtime = ServerRuntime(server.url, "rule", limits=Limits(concurrency=2, retries=0))
        result = augment(workshop(store, 0.3), runtime, tmp_path / "out")
    assert runtime.traffic.retries["http 429"] == server.seen.troubles["limits"] > 0
    assert not result.totals.failed, "a rate limit uses up no retry"
    if said == "0.3":
        gaps = [after - before for before, after in zip(server.seen.times, server.seen.times[1:], strict=False)]
        assert max(gaps) >= 0.29


def test_requests_a_minute(store: ChunkStore, tmp_path: Path) -> None:
    with serving() as server:
        limits = Limits(concurrency=8, per_minute=1200)
        augment(
            workshop(store, 0.1, tasks=("bullets", "qa")),
            ServerRuntime(server.url, "rule", limits=limits),
            tmp_path / "o",
        )
    times = server.seen.times
    assert len(times) > 3 and times[-1] - times[0] >= 0.9 * 0.05 * (len(times) - 1)


@pytest.mark.parametrize(
    ("refuses", "forms"),
    [
        ((), {"json_schema"}),
        (("json_schema",), {"json_schema", "json_object"}),
        (("json_schema", "json_object"), {"json_schema", "json_object", None}),
    ],
)
def test_response_format_is_what_the_server_takes(
    store: ChunkStore, tmp_path: Path, refuses: tuple[str, ...], forms: set[str | None]
) -> None:
    notes: list[str] = []
    with serving(Behaviour(refuses=refuses)) as server:
        runtime = ServerRuntime(server.url, "rule", limits=Limits(concurrency=4, retries=0), on_note=notes.append)
        result = augment(workshop(store, 0.3), runtime, tmp_path / "out")
    asked = [(body.get("response_format") or {}).get("type") for body in server.seen.bodies]
    assert set(asked) == forms and len(notes) == len(refuses)
    assert result.totals.accepted == result.totals.jobs


def test_a_request_that_is_refused_is_rejected_alone(store: ChunkStore, tmp_path: Path) -> None:
    with serving(Behaviour(status=422, after=5)) as server:
        runtime = ServerRuntime(server.url, "rule", limits=FAST)
        result = augment(workshop(store, 0.2, tasks=("bullets",)), runtime, tmp_path / "out")
    assert set(result.totals.rejected) == {"http 422"} and result.totals.accepted == 5
    assert server.seen.requests == result.totals.jobs


@pytest.mark.parametrize(("refuses", "form"), [((), "json_schema"), (("json_schema",), "json_object")])
def test_one_refused_prompt_changes_no_format(
    store: ChunkStore, tmp_path: Path, refuses: tuple[str, ...], form: str
) -> None:
    notes: list[str] = []
    with serving(Behaviour(too_long=0, refuses=refuses)) as server:
        runtime = ServerRuntime(server.url, "rule", limits=Limits(concurrency=1), on_note=notes.append)
        result = augment(workshop(store, 0.3, tasks=("bullets",)), runtime, tmp_path / "out")
    asked = [(body.get("response_format") or {}).get("type") for body in server.seen.bodies]
    assert asked[:3] == ["json_schema", "json_object", None] and asked[-1] == form
    assert len(notes) == len(refuses)
    assert dict(result.totals.rejected) == {"http 400": 1} and result.totals.accepted == result.totals.jobs - 1


@pytest.mark.parametrize(
    ("status", "says"), [(401, "the key is missing or wrong"), (404, "Check the address and --model")]
)
def test_closed_servers_stop_the_run(store: ChunkStore, tmp_path: Path, status: int, says: str) -> None:
    with serving(Behaviour(status=status, after=4)) as server, pytest.raises(BackendError, match=says):
        augment(workshop(store), ServerRuntime(server.url, "rule", limits=FAST), tmp_path / "out")
    assert server.seen.requests < 4 + 2 * FAST.concurrency


def test_a_dead_server_stops_the_run_and_the_next_goes_on(store: ChunkStore, tmp_path: Path) -> None:
    made = workshop(store, 0.3)
    with (
        serving(Behaviour(status=500, after=40)) as server,
        pytest.raises(RunError, match=r"no answer to the last \d+"),
    ):
        limits = Limits(concurrency=4, retries=0)
        augment(made, ServerRuntime(server.url, "rule", limits=limits), tmp_path / "out")
    assert server.seen.requests < 40 + 40
    with serving() as server:
        result = augment(made, ServerRuntime(server.url, "rule", limits=FAST), tmp_path / "out")
        assert server.seen.requests + 40 >= result.totals.jobs - outline(made).jobs["continuation"]
        augment(made, ServerRuntime(server.url, "rule", limits=FAST), tmp_path / "whole")
    assert result.totals.accepted == result.totals.jobs
    assert published(tmp_path / "out") == published(tmp_path / "whole")


def test_failed_jobs_are_recorded_and_asked_again(store: ChunkStore, tmp_path: Path) -> None:
    made = workshop(store, 0.5, tasks=("bullets",))
    first = Canned(lambda r: Reply(failed="time-out") if chance(r.seed) < 0.3 else Reply('{"bullets": ["a"]}', 5, 2))
    result = augment(made, first, tmp_path / "out")
    assert result.totals.failed["time-out"] > 0 and result.manifest["jobs"]["failed"] == result.totals.failed.total()
    second = Canned(lambda r: Reply('{"bullets": ["a"]}', 5, 2))
    again = augment(made, second, tmp_path / "out")
    assert len(second.asked) == result.totals.failed.total() and not again.totals.failed
    assert again.totals.accepted == again.totals.jobs and again.totals.prompt_tokens == 5 * again.totals.jobs


def test_answers_that_teach_nothing(store: ChunkStore, tmp_path: Path) -> None:
    made = workshop(store, tasks=("rephrase", "comparison", "retrieval"))
    jobs = {task: next(job for job in made.jobs() if job.task == task) for task in made.order.tasks}
    request = made.request(jobs["rephrase"], 0)
    assert request is not None
    copied = request.prompt.partition("Passage:\n")[2]

    def reason(task: str, value: Any) -> str | None:
        found = made.refuse(jobs[task], value)
        return found and found.reason

    assert reason("rephrase", copied.upper()) == "copies the passage"
    assert reason("rephrase", "short") == reason("comparison", "Both differ.") == "too short"
    assert reason("retrieval", Quest("What does the passage say?", "x")) == "speaks of the passage"
    assert reason("retrieval", Quest("What does Adam keep?", "x")) is None
    bad = augment(made, Canned(lambda r: Reply("no", 1, 1)), tmp_path / "out", attempts=3)
    assert bad.totals.rejected["unreadable"] and bad.totals.rejected["too short"] and not bad.totals.accepted
    assert bad.totals.attempts_refused.total() == 3 * bad.totals.jobs


def made_notes(request: Request, question: str = "Who else says that?", lead: str = "It says, in short, ") -> str:
    """Notes on a request's passage: the heads of its sentences, turned round."""
    passage = request.prompt.partition("\n\n")[2]
    said = [part.split(" that ", 1)[1] for part in passage.replace("\n", " ").split(". ") if " that " in part][:5]
    lines = [f"{lead}{text.rstrip('.')}." for text in said]
    return json.dumps({"summary": lines[0], "key_points": lines[1:4], "limitation": lines[4], "question": question})


def test_notes_by_a_model(store: ChunkStore, tmp_path: Path) -> None:
    """Made when named alone, in the layout that suite `notes` scores; what breaks the form or strays is refused."""
    made = workshop(store, tasks=("notes",), layout="alpaca")
    result = augment(made, Canned(lambda r: Reply(made_notes(r), 9, 9)), tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert len(rows) == result.totals.accepted == result.totals.jobs > 50  # chunks of fewer than 50 words are left out
    assert all(strict_compliance(row["output"]).passed and row["instruction"].endswith("Question.") for row in rows)
    assert INSTRUCTION in {row["instruction"] for row in rows}
    test = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    scored = [row for row, _ in read_scored(str(tmp_path / "out" / "test.jsonl"), Settings("x"))]
    assert [(row.id, row.group) for row in scored] == [(row["id"], row["document"]) for row in test]

    bad = augment(made, Canned(lambda r: Reply(made_notes(r, "No question."))), tmp_path / "bad", attempts=1)
    assert set(bad.totals.rejected) == {"breaks the form (Follow-up Question: does not end in '?')"}
    other = '{"summary": "Rain fell.", "key_points": ["Snow came.", "Wind rose.", "Ice held."], "limitation": "Fog stayed.", "question": "Why?"}'
    copies = augment(made, Canned(lambda r: Reply(made_notes(r, lead=""))), tmp_path / "copies", attempts=1)
    assert set(copies.totals.rejected) == {"copies the passage"}
    stray = augment(made, Canned(lambda r: Reply(other)), tmp_path / "stray", attempts=1)
    assert set(stray.totals.rejected) == {"says what the passage does not"}
    assert "notes" not in Order().tasks


def test_every_attempt_has_a_seed_of_its_own(store: ChunkStore, tmp_path: Path) -> None:
    made = workshop(store, tasks=("bullets",))
    runtime = Canned(lambda r: Reply("- a" if r.seed % 2 else ""))
    result = augment(made, runtime, tmp_path / "out", attempts=4)
    assert len({(r.prompt, r.seed) for r in runtime.asked}) == len(runtime.asked) > result.totals.jobs
    assert all(r.schema is Bullets for r in runtime.asked)


@pytest.mark.parametrize("together", [1, 7])
def test_interrupted_calls_of_any_size_leave_the_same_rows(store: ChunkStore, tmp_path: Path, together: int) -> None:
    class Stopping(Canned):
        left = 10**9

        async def ask(self, requests: Any) -> list[Reply]:
            self.left -= 1
            if self.left < 0:
                raise RunError("stopped")
            return await super().ask(requests)

    def answer(request: Request) -> Reply:
        return Reply("" if request.seed % 3 == 0 else f"- {request.seed}")

    made = workshop(store, tasks=("bullets",))
    augment(made, Stopping(answer, together), tmp_path / "whole", attempts=3)
    cut = Stopping(answer, together)
    cut.left = 5
    with pytest.raises(RunError, match="stopped"):
        augment(made, cut, tmp_path / "out", attempts=3)
    lines = (tmp_path / "out" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "journal.jsonl").write_bytes(b"".join([*lines[::2], lines[1][:20]]))  # half, and a cut line
    augment(made, Stopping(answer, together), tmp_path / "out", attempts=3)
    assert published(tmp_path / "out") == published(tmp_path / "whole")


def test_folders_of_other_settings_are_refused(store: ChunkStore, tmp_path: Path) -> None:
    runtime = Canned(lambda r: Reply("- a"))
    augment(workshop(store, 0.2, tasks=("bullets",)), runtime, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"begun with other settings.*\n.*seed: 0 there, 5 now"):
        augment(workshop(store, 0.2, tasks=("bullets",), seed=5), runtime, tmp_path / "out")
    with pytest.raises(RecipeError, match="quantize: none there, 4bit now"):
        augment(workshop(store, 0.2, tasks=("bullets",), quantize="4bit"), runtime, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match=r"holds train.jsonl"):
        augment(workshop(store, 0.2), runtime, tmp_path / "mine")
    with pytest.raises(RecipeError, match="no job in"):
        augment(workshop(store, 0.0), runtime, tmp_path / "none")


COMMAND = [sys.executable, "-c", "from smolmlx.cli import main; main()", "data", "augment"]


@pytest.mark.slow
def test_killed_ten_times(chunks: Path, tmp_path: Path) -> None:
    """One Ctrl-C and SIGKILL at ten random moments, then a last run: the same bytes as one that ran through, and no job answered twice."""
    tasks = tmp_path / "tasks.yaml"
    tree = always(read_registry(), 0.9).model_dump(mode="json", by_alias=True, exclude_none=True)
    tasks.write_text(json.dumps(tree))
    dice = random.Random(11)
    how = Behaviour(errors=0.03, limits=0.02, drops=0.02, nonsense=0.1, seconds=0.08, retry_after="0.01")
    with serving(how) as server:
        options = ["--server", server.url, "--model", "rule", "--tasks-file", str(tasks), "--concurrency", "6"]
        subprocess.run([*COMMAND, str(chunks), str(tmp_path / "whole"), *options], check=True, capture_output=True)
        server.seen.asked.clear()
        journal = tmp_path / "out" / "journal.jsonl"
        # A test run in the background (`make test &`) hands its children an ignored SIGINT.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        stopped = subprocess.Popen(
            [*COMMAND, str(chunks), str(tmp_path / "out"), *options], stderr=subprocess.PIPE, preexec_fn=heed
        )
        while stopped.poll() is None and not (journal.is_file() and journal.stat().st_size):
            time.sleep(0.005)
        stopped.send_signal(signal.SIGINT)
        _, said = stopped.communicate()
        assert stopped.returncode == 130 and b"every finished job is kept" in said and b"Traceback" not in said
        killed, sizes = 0, [journal.stat().st_size]
        while killed < 10:
            process = subprocess.Popen(
                [*COMMAND, str(chunks), str(tmp_path / "out"), *options],
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            while process.poll() is None and journal.stat().st_size <= sizes[-1]:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.12))
            assert process.poll() is None, "it ended before it was killed ten times: make the work longer"
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            sizes.append(journal.stat().st_size)
        subprocess.run([*COMMAND, str(chunks), str(tmp_path / "out"), *options], check=True, capture_output=True)
    assert sizes == sorted(sizes) and sizes[-1] > 0
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert published(whole) == published(out)
    rows = read_rows(out)
    assert len(rows) == len({row["id"] for row in rows}) > 200
    done = [json.loads(line)["job"] for line in journal.read_text().splitlines()]
    assert len(done) == len(set(done))


@pytest.mark.slow
def test_real_documents_to_rows(assets: Path, tmp_path: Path) -> None:
    made = write_chunks([str(assets / "text")], tmp_path / "chunks", Cut(), Method())
    with ChunkStore(tmp_path / "chunks") as store, serving() as server:
        work = Workshop(store, read_registry(), Order(model="rule", runtime="server"))
        result = augment(work, ServerRuntime(server.url, "rule", limits=FAST), tmp_path / "rows")
        texts = {store[n].id: " ".join(store[n].text.split()) for n in range(len(store))}
    rows = read_rows(tmp_path / "rows")
    assert result.totals.accepted == result.totals.jobs and len(rows) == result.totals.rows > 200
    homes = {entry["id"]: entry["split"] for entry in made["document_list"]}
    for row in rows:
        assert row["split"] == homes[row["document"]]
        assert {homes[other.rpartition(":")[0]] for other in row["other_chunks"]} <= {row["split"]}
        if row["task"] in ("bullets", "qa", "triplets"):
            shown = row["messages"][0]["content"].partition("Passage:\n")[2]
            assert " ".join(shown.split()) == texts[row["chunk"]]
    for split, entry in result.manifest["files"].items():
        assert entry["rows"] == sum(row["split"] == split for row in rows)


def data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["smolmlx", "data", "augment", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_command(
    chunks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THE_KEY", "secret")
    code, out, err = data(monkeypatch, capsys, chunks, "plan", "--dry-run", "--json")
    planned = json.loads(out)
    assert (
        code == 0 and sum(planned["jobs"].values()) > 20 and planned["example"]["schema"] and not Path("plan").exists()
    )
    code, out, err = data(monkeypatch, capsys, chunks, "plan", "--dry-run")
    assert code == 0 and "The first request:" in out
    with serving() as server:
        options = [chunks, "rows", "--server", server.url, "--key-variable", "THE_KEY"]
        code, out, err = data(monkeypatch, capsys, *options, "--json")
        made = json.loads(out)
        assert code == 0 and made["jobs"]["planned"] == sum(planned["jobs"].values()) and made["model"] == "rule"
        assert server.seen.headers[0]["Authorization"] == "Bearer secret" and "secret" not in out + err
        asked = server.seen.requests
        code, out, err = data(monkeypatch, capsys, *options)
        assert code == 0 and "Next: smolmlx data inspect rows/train.jsonl" in out and server.seen.requests == asked
    code, _, err = data(monkeypatch, capsys, chunks, "other", "--server", server.url)
    assert code == 3 and "cannot be reached" in err
    with serving(models=("a", "b")) as server:
        code, _, err = data(monkeypatch, capsys, chunks, "other", "--server", server.url)
        assert code == 3 and "It has: a, b" in err
    with serving(Behaviour(status=404)) as server:
        code, _, err = data(monkeypatch, capsys, chunks, "named", "--server", server.url, "--model", "rul")
        assert code == 3 and "model rul: http 404, not found (told to)" in err and "--model" in err
        assert not Path("named").exists(), "a wrong name binds no folder"
    with serving() as server:
        options = (chunks, "named", "--server", server.url, "--model", "unlisted", "--task", "rephrase")
        code, _, _ = data(monkeypatch, capsys, *options)
        assert code == 0 and {body["model"] for body in server.seen.bodies} == {"unlisted"}, "it may serve more"
    with serving(Behaviour(status=503)) as server:
        code, _, err = data(
            monkeypatch, capsys, chunks, "dead", "--server", server.url, "--retries", 0, "--task", "bullets"
        )
        assert code == 1 and "http 503" in err


def test_chunks_too_long_for_the_model_say_what_to_do(
    chunks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(runtime: ServerRuntime, requests: list[Request]) -> list[Reply]:
        return [Reply(rejected=TOO_LONG) for _ in requests]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ServerRuntime, "ask", ask)
    with serving() as server:
        code, _, err = data(monkeypatch, capsys, chunks, "rows", "--server", server.url)
    assert code == 0 and "prompt too long for the model" in err and "--words 120 --overlap 20" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("none", "out", "--model", "tiny"), 4, "none: no such file or folder"),
        ((".", "out", "--model", "tiny"), 4, "no chunks here"),
        (("one.md", "out", "--dry-run"), 4, "one.md: a document, not chunks. Cut it first: smolmlx data chunk one.md"),
        (("chunks", "out"), 2, "pass --model M"),
        (("chunks",), 2, "Missing argument"),
        (("chunks", "out", "--server", "localhost:80"), 2, "expected an address such as"),
        (("chunks", "out", "--server", "http://127.0.0.1:99999/v1"), 2, "expected an address such as"),
        (("--print-tasks", "--tasks-file", "no.yaml"), 2, "no.yaml: cannot be read"),
        (("chunks", "out", "--server", "http://x/v1", "--adapter", "a"), 2, "no effect with --server"),
        (
            ("chunks", "out", "--server", "http://x/v1", "--batch-size", "4"),
            2,
            "--batch-size 4: has no effect with --server",
        ),
        (("chunks", "out", "--server", "http://x/v1", "--quantize", "none"), 2, "--quantize none: has no effect with"),
        (("chunks", "out", "--server", "http://x/v1", "--batch-requests", "9"), 2, "no effect without --batch"),
        (("chunks", "out", "--server", "http://x/v1", "--batch", "--concurrency", "9"), 2, "no effect with --batch"),
        (("chunks", "out", "--model", "tiny", "--batch"), 2, "--batch: needs --server URL"),
        (("chunks", "out", "--model", "tiny", "--concurrency", "9", "--retries", "1"), 2, "data augment: 2 problems"),
        (("chunks", "out", "--dry-run", "--model", "nonsense"), 2, "nonsense: no such model folder"),
        (("chunks", "out", "--dry-run", "--adapter", "nowhere"), 2, "--adapter nowhere: no such folder"),
        (("chunks", "out", "--dry-run", "--backend", "nope"), 3, "--backend nope: unknown engine"),
        (("chunks", "out", "--model", "tiny", "--task", "bulets"), 2, "Did you mean 'bullets'?"),
        (("chunks", "out", "--model", "tiny", "--tasks-file", "no.yaml"), 2, "no.yaml: cannot be read"),
        (("chunks", "out", "--model", "./nowhere"), 2, "no such model folder"),
    ],
)
def test_command_refuses(
    chunks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("chunks").symlink_to(chunks)
    Path("one.md").write_text("# One\n\nparagraph")
    found, out, err = data(monkeypatch, capsys, *arguments)
    assert found == code and says in err and "Traceback" not in err and not out
