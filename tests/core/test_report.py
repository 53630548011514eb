"""The report as data and as HTML: what it says, what it refuses, and that nothing in it can leave or run."""

from __future__ import annotations

import copy
import csv
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from run_folders import INJECTED, NOTES, make_pipeline, make_run, make_sweep
from smolmlx.adapters.analysis import DATA_FILE, analyze, keep
from smolmlx.errors import RecipeError, RunError
from smolmlx.evals import headlines
from smolmlx.evals.text import content_spans, content_tokens
from smolmlx.models import open_model
from smolmlx.reports import card, charts, figures, page, sweep_figures
from smolmlx.reports.boards import label_runs, make_boards
from smolmlx.reports.folders import RunView, open_runs, read_run
from smolmlx.reports.rows import EMPTY, FORMULAIC, flaw_kind, flaws, mark_text, view_rows
from smolmlx.reports.sweeps import open_sweeps
from smolmlx.reports.weights import weight_changes
from smolmlx.rundir import RunDir

TEST_ROWS_SHA = hashlib.sha256((NOTES / "test.jsonl").read_bytes()).hexdigest()[:12]
needs_vega = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("vl_convert"), reason="vl-convert is not installed"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one recipe with different learning rates, over the same rows."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "notes-sft-20261121-081316-b00e", rows=12)
    make_run(folder / "notes-sft-20261121-091316-c11f", rows=12, seed=1, skill=0.3, rate=1e-3, stages=("sft",))
    return folder


@pytest.fixture(scope="module")
def views(runs: Path) -> list[RunView]:
    return open_runs([runs])


def test_runs_are_found_in_a_folder_once_each(runs: Path) -> None:
    names = [view.name for view in open_runs([runs, *sorted(runs.glob("*"))])]
    assert names == ["notes-sft-20261121-081316-b00e", "notes-sft-20261121-091316-c11f"]


def test_an_evaluation_folder_is_a_view_without_a_run(runs: Path) -> None:
    (view,) = open_runs([next(runs.glob("*b00e")) / "eval"])
    assert not view.is_run and set(view.sets) == {"test", "ood"} and figures.training_facts(view)


def test_an_evaluation_has_every_figure_of_every_set_in_its_csv_files(runs: Path) -> None:
    scored = next(runs.glob("*b00e")) / "eval"
    with (scored / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["set"] for line in lines} == {"test", "ood"} and lines[0]["sha256"].startswith(TEST_ROWS_SHA)
    with (scored / "test-rows.csv").open() as file:
        row = next(csv.DictReader(file))
    parts = [f"rubric_{part}" for part in ("summary", "key_points", "limitation", "follow_up")]
    assert sum(int(row[part]) for part in parts) == int(row["rubric"]) and row["is_question"] in ("0", "1")
    assert {"precision", "recall", "words_summary", "words_follow_up"} <= set(row)


def test_every_wrong_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError) as error:
        open_runs([tmp_path / "empty", tmp_path / "gone"])
    assert "empty: neither a run" in str(error.value) and "gone: no such folder" in str(error.value)


def test_broken_files_of_a_run_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=6)
    (run / "eval" / "test-answers.jsonl").write_text('{"id": "row-0001"}\n')
    with pytest.raises(RunError, match=r"test-answers\.jsonl:1"):
        read_run(run)
    (run / "eval" / "results.json").write_text("[1, 2]")
    with pytest.raises(RunError, match=r"results\.json: holds list '\[1, 2\]'"):
        read_run(run)
    (run / "eval" / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"results\.json: not valid JSON"):
        read_run(run)


def test_labels_tell_runs_apart(views: list[RunView]) -> None:
    assert list(label_runs(views).values()) == ["notes-sft b00e", "notes-sft c11f"]
    assert list(label_runs(views[:1]).values()) == ["notes-sft"]
    assert len(set(label_runs([views[0], *views]).values())) == 2


def test_runs_over_the_same_rows_share_a_board(views: list[RunView]) -> None:
    boards = make_boards(views)
    assert [board.name for board in boards] == ["test", "ood"]
    labels = [entrant.label for entrant in boards[0].entrants]
    assert labels == [
        "base",
        "copy control",
        "random control",
        "notes-sft b00e: sft",
        "notes-sft b00e: dpo",
        "notes-sft c11f",
    ]
    compared = {(c.system, c.against): c.verdict for c in boards[0].comparisons if c.metric == "content_alignment"}
    assert compared["notes-sft c11f", "base"] == "better"
    assert ("notes-sft c11f", "notes-sft b00e: sft") in compared


def test_runs_over_other_rows_are_never_compared(views: list[RunView], tmp_path: Path) -> None:
    fewer = read_run(make_run(tmp_path / "fewer-20261121-101316-d22a", rows=8))
    boards = make_boards([views[0], fewer])
    assert [board.name for board in boards] == ["test (notes-sft)", "ood (notes-sft)", "test (fewer)", "ood (fewer)"]


def test_findings_claim_no_more_than_the_intervals(views: list[RunView]) -> None:
    (board, _) = make_boards(views[:1])
    for comparison in board.comparisons:
        claimed = comparison.verdict != "no difference shown"
        assert claimed == (comparison.low > 0 or comparison.high < 0)
        assert ("no difference shown" in comparison.sentence) != claimed
    unsupported = [c for c in board.comparisons if c.metric == "unsupported" and c.verdict == "better"]
    assert unsupported and all(c.mean < 0 for c in unsupported)
    said = figures.findings(board)
    assert said[0].startswith("sft keeps to the template in ") and "12 rows are few" in said[-1]


def test_run_table_shows_what_differs(views: list[RunView]) -> None:
    head, lines = figures.run_table(views, label_runs(views))
    assert head[:2] == ["run", "train.learning_rate"]
    assert [line[:2] for line in lines] == [["notes-sft b00e", "0.004"], ["notes-sft c11f", "0.001"]]


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=6)
    (run / "report.json").unlink()
    assert figures.status(read_run(run)) == "Not finished: step 100 of 100. Every figure below is of that moment."
    assert [tile.label for tile in figures.tiles(read_run(run), [])][:2] == ["training loss", "validation loss"]


def places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value, of lists to the first."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in inside:
        yield (key,)
        if depth < 4:
            yield from ((key, *rest) for rest in places(value, depth + 1))


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value in one place; without the key for Ellipsis."""
    made = copy.deepcopy(tree)
    inside = made
    for key in place[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return made


@pytest.mark.parametrize("name", ["report.json", "plan.json", "env.json", "samples.json", "eval/results.json"])
def test_a_file_of_a_run_is_read_whole_or_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in a place of it, the report is drawn or says which file and which place; never a traceback."""
    monkeypatch.setattr(charts, "browser_bundle", lambda: "")
    path = make_run(tmp_path / "run", rows=3, stages=("sft",)) / name
    tree = json.loads(path.read_text())
    found = list(places(tree))
    # Every system and metric is read alike.
    kept = [place for place in found if not {"copy control", "random control", "ood"} & set(place)]
    refused = 0
    for place in kept[:40]:
        for value in (..., None, [1]):
            path.write_text(json.dumps(changed(tree, place, value)))
            try:
                view = read_run(tmp_path / "run")
                page.render([view], max_rows=1)
                card.card(view)
            except RunError as error:
                assert str(path) in str(error), str(error)
                refused += 1
    assert refused > len(kept[:40]) / 2 or name == "env.json"


def test_rows_hold_every_answer_whole_with_its_flaws(views: list[RunView]) -> None:
    (board, _) = make_boards(views[:1])
    rows = view_rows(board, 100)
    assert len(rows) == 12
    for shown, row in zip(rows, board.rows, strict=True):
        for entrant, answer in zip(board.entrants, shown["answers"], strict=True):
            assert "".join(text for text, _ in answer["pieces"]) == row.answers[entrant.label]
    injected = rows[0]["answers"][[e.label for e in board.entrants].index("sft")]
    assert "text before the first header" in injected["flaws"]


@settings(deadline=None)
@given(st.text(max_size=200), st.sets(st.sampled_from(["reef", "coral", "gradient"])))
def test_marked_pieces_are_the_text(text: str, known: set[str]) -> None:
    pieces = mark_text(text, known)
    assert "".join(piece for piece, _ in pieces) == text
    assert all(piece and mark in ("", "u", "b") for piece, mark in pieces)
    assert all(first[1] != second[1] for first, second in itertools.pairwise(pieces))


@settings(deadline=None)
@given(st.text(max_size=100))
def test_spans_are_the_content_tokens(text: str) -> None:
    spans = content_spans(text)
    if len(text.lower()) == len(text):
        assert [text.lower()[start:end] for start, end in spans] == content_tokens(text)
    else:
        assert spans == []


def test_marks_of_both_kinds() -> None:
    assert mark_text("Reefs grow. This text discusses reefs.", {"reefs"}) == [
        ("Reefs ", ""), ("grow", "u"), (". ", ""), ("This text discusses", "b"), (" reefs.", ""),
    ]  # fmt: skip


def test_flaws_have_kinds_to_choose_from() -> None:
    assert flaws("  ", {}) == [EMPTY]
    assert flaws("x", {"problems": ("a",), "formulaic": True, "unsupported": 0.1}) == ["a", FORMULAIC]
    assert flaw_kind("Key Points: 4 bullets, 3 expected") == flaw_kind("Key Points: 12 bullets, 3 expected")
    assert flaw_kind("headers out of order: Limitation, Summary") == "headers out of order"


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), max_size=2000))
def test_thinning_keeps_range_and_bound(values: list[float]) -> None:
    points = list(enumerate(values))
    for made in (charts.thin(points), charts.running_mean(points)):
        assert len(made) <= max(charts.MAX_POINTS, len(points) if made != charts.thin(points) else 0)
        assert all(min(values) - 1e-4 <= y <= max(values) + 1e-4 for _, y in made)
    assert len(charts.thin(points)) <= charts.MAX_POINTS


def test_weight_change_is_the_norm_of_the_product(runs: Path) -> None:
    from smolmlx.session import load_arrays

    adapter = next(runs.glob("*b00e")) / "adapter"
    changes = weight_changes(adapter)
    assert len(changes) == 18 and {c.module for c in changes} == {"q_proj", "v_proj", "up_proj"}
    arrays = load_arrays(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.3.mlp.up_proj"
    product = 16 / 8 * arrays[f"{name}.lora_B.weight"] @ arrays[f"{name}.lora_A.weight"]
    (change,) = [c for c in changes if (c.layer, c.module) == (3, "up_proj")]
    assert change.norm == pytest.approx(math.sqrt((product.astype(float) ** 2).sum()), rel=1e-5)
    assert change.rms == pytest.approx(change.norm / math.sqrt(product.size))
    assert weight_changes(runs) == []


def edit_adapter(folder: Path, **config: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("config", [{"alpha_pattern": {"q_proj": 160}}, {"use_rslora": True}], ids=str)
def test_weight_change_has_each_matrix_own_scale(config: dict[str, Any], runs: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(next(runs.glob("*b00e")) / "adapter", tmp_path / "adapter"))
    edit_adapter(adapter, base_model_name_or_path="moved", **config)
    known = {change.weight: change.frobenius for change in analyze(adapter)}
    found = weight_changes(adapter)
    assert len(found) == len(known) == 18
    assert sorted(change.norm for change in found) == pytest.approx(sorted(known.values()), rel=1e-4)


def test_weight_change_of_dora_is_relative_to_its_base(runs: Path, tmp_path: Path) -> None:
    """Taken from the table in the run's folder, else measured where the base is; never the low-rank part alone."""
    base, run, rng = tmp_path / "base", RunDir(tmp_path / "run"), np.random.default_rng(0)
    shutil.copytree(next(runs.glob("*b00e")) / "adapter", run.adapter)
    edit_adapter(run.adapter, use_dora=True, base_model_name_or_path="moved")
    arrays = load_file(run.adapter / "adapter_model.safetensors")
    paths = [name.removesuffix(".lora_A.weight") for name in arrays if name.endswith(".lora_A.weight")]
    arrays |= {f"{path}.lora_magnitude_vector": np.full(24, 2, np.float32) for path in paths}
    save_file(arrays, run.adapter / "adapter_model.safetensors")
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    weights = {path.removeprefix("base_model.model."): rng.standard_normal((24, 32)) for path in paths}
    save_file({f"{n}.weight": w.astype(np.float32) for n, w in weights.items()}, base / "model.safetensors")
    assert weight_changes(run.adapter) == []
    table = analyze(run.adapter, open_model(base))
    keep(table, run)
    kept = weight_changes(run.adapter)
    assert sorted(change.norm for change in kept) == sorted(change.frobenius for change in table)
    (run.path / DATA_FILE).unlink()
    edit_adapter(run.adapter, base_model_name_or_path=str(base))
    assert weight_changes(run.adapter) == kept and len(kept) == 18


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("sweeps") / "sweep-my")


def test_a_sweep_has_settings_in_its_own_order(sweep_folder: Path) -> None:
    views, (sweep,) = open_runs([sweep_folder]), open_sweeps([sweep_folder])
    assert list(label_runs(views).values()) == [
        "baseline, seed 0", "baseline, seed 1", "r 64, seed 0", "r 64, seed 1", "lr <1e-4>, seed 0",
    ]  # fmt: skip
    assert (sweep.first, sweep.finished, len(sweep.runs)) == ("baseline", 5, 6)
    assert sweep.changes("r 64") == [("lora.r", "64")] and sweep.changes("baseline") == []
    rows = sweep_figures.rows(sweep, make_boards(views))
    assert [row.name for row in rows] == [*sweep.settings, "base", "copy control", "random control"]
    assert [row.seeds for row in rows[:3]] == ["2 of 2", "2 of 2", "1 of 2"]
    kept = rows[0].cells[0]
    values = [run["figures"]["test.compliance"] for run in sweep.runs if run["setting"] == "baseline"]
    assert kept is not None and kept.mean == f"{100 * sum(values) / 2:.1f} %" and kept.spread.startswith("± ")


def test_a_sweeps_sentences_claim_what_its_table_shows(sweep_folder: Path) -> None:
    (sweep,) = open_sweeps([sweep_folder])
    said = sweep_figures.findings(sweep)
    # The bad setting has one seed left, which is too few whatever its rows say.
    assert all("lr <1e-4>" not in part for text in said for part in text.split(";") if "lower with" in part)
    assert any(text.startswith("strict compliance, against baseline:") for text in said)
    for best in sweep.best:
        assert best["shown"] == ("is best" in best["sentence"]) != ("no best setting is shown" in best["sentence"])


@needs_vega
def test_a_sweeps_page_shows_settings_before_runs(sweep_folder: Path) -> None:
    from smolmlx.reports.card import write_sweep_report

    made = write_sweep_report(open_runs([sweep_folder]), open_sweeps([sweep_folder])[0])
    assert made == [sweep_folder / "report.html", sweep_folder / "charts"]
    text = made[0].read_text(encoding="utf-8")
    assert "lr &lt;1e-4&gt;" in text and "<1e-4>" not in text
    assert "lr &lt;1e-4&gt;, seed 1 failed: the loss is not a number" in text
    assert text.index('id="settings"') < text.index('id="result"') and "What rank and rate change." in text
    names = {path.name for path in made[1].iterdir()}
    assert {"sweep0-test-compliance.svg", "sweep0-test-content-alignment.png", "sweep0-val-loss.svg"} <= names


def test_an_old_or_broken_sweep_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"name": "x", "description": "", "recipe": "r", "seeds": [0]}')
    with pytest.raises(RunError, match=r"sweep\.json: runs: field required; .* Run the same `smolmlx sweep` again"):
        open_sweeps([tmp_path])
    assert open_sweeps([tmp_path / "other"]) == []


def test_many_runs_are_not_compared_with_each_other(views: list[RunView]) -> None:
    """Pairs of many runs would find differences by chance; each is compared with base and controls."""
    boards = make_boards(views * 4)
    pairs = {(c.system, c.against) for c in boards[0].comparisons}
    assert boards[0].crowded and {against for _, against in pairs} == {"base", "copy control", "random control"}


def test_sets_name_their_files_and_hashes(views: list[RunView]) -> None:
    for name, found in views[0].sets.items():
        assert found.data.endswith(f"{name}.jsonl")
        assert found.sha256 == hashlib.sha256(Path(found.data).read_bytes()).hexdigest()
    folder = views[0].path / "eval"
    files = json.loads((folder / "results.json").read_text())["files"]
    assert set(files) == {"test", "ood", "train"} and files["ood"]["rows"] == 12
    assert files["ood"]["sha256"] in (folder / "ood.csv").read_text()
    assert f"`{files['ood']['path']}` (sha256 {files['ood']['sha256'][:16]})" in (folder / "results.md").read_text()


class _Page(HTMLParser):
    """Collects what a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def html(views: list[RunView]) -> Iterator[str]:
    pytest.importorskip("vl_convert", reason="vl-convert is not installed")
    from smolmlx.reports.page import render

    yield render(views[:1])


def test_page_names_no_remote_address(html: str) -> None:
    found = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}", html))
    assert found <= {"http://www.w3.org"}, "only XML name spaces, which nothing fetches"
    for tag, attributes in _Page(html).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")


def test_page_escapes_what_models_wrote(html: str) -> None:
    assert INJECTED not in html and "<script>window.injected" not in html
    scripts = [attributes for tag, attributes in _Page(html).tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}, {}]
    payload = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert payload is not None
    data: Any = json.loads(payload[1])
    first = data["boards"][0]["rows"][0]["answers"]
    assert any("".join(text for text, _ in answer["pieces"]).startswith(INJECTED) for answer in first)


def test_page_takes_any_text(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert is not installed")
    from smolmlx.reports.page import render

    run = make_run(tmp_path / "a<b>&'\"", rows=6)
    path = run / "eval" / "test-answers.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    lines[0]["answers"]["sft"] = "half a pair \ud800, a line\u2028separator, </script><!-- {{ 7 * 7 }}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = render(open_runs([run]))
    assert text.encode("utf-8") and "a&lt;b&gt;&amp;" in text and "{{ 7 * 7 }}" in text and "</script><!--" not in text


def test_rows_beyond_the_limit_are_counted_not_held(views: list[RunView]) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert is not installed")
    from smolmlx.reports.page import render

    text = render(views[:1], max_rows=3)
    assert "test: 3 of 12 rows" in text


@needs_vega
def test_pages_of_less_than_a_whole_run(tmp_path: Path) -> None:
    """An evaluation alone, a loss suite, a run without evaluation or samples, and one that has not made a step."""
    from smolmlx.reports.page import render

    run = make_run(tmp_path / "run", rows=6)
    assert "Held-out rows" in render([read_run(run / "eval")])
    loss = tmp_path / "loss"
    loss.mkdir()
    found = {"num_rows": 3, "num_tokens": 30, "loss": 2.5, "perplexity": None, "accuracy": 0.5}
    (loss / "results.json").write_text(json.dumps({"suite": "loss", "data": "x.jsonl", "systems": {"base": found}}))
    assert "Held-out loss" in render([read_run(loss)]) and "2.5000" in render([read_run(loss), read_run(run)])
    for name in ("report.json", "samples.json", "recipe.yaml", "env.json"):
        (run / name).unlink()
    shutil.rmtree(run / "eval")
    assert "Curves" in render([read_run(run)])
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "adapter")
    assert "Not finished: step 0 of 100" in render([read_run(run)])


def test_a_pipeline_is_read_in_its_order_and_names_each_system_once(tmp_path: Path) -> None:
    views = open_runs([make_pipeline(tmp_path / "notes-pipeline-20261121-081316-b00e")])
    labels = label_runs(views)
    assert list(labels.values()) == ["sft", "dpo"]
    board, _ = make_boards(views)
    assert [e.label for e in board.entrants] == ["base", "copy control", "random control", "sft", "dpo"]
    assert ("dpo", "sft") in {(c.system, c.against) for c in board.comparisons}
    tiles = {tile.label: tile for tile in figures.last_stage(views, labels, make_boards(views))}
    assert tiles["strict compliance"].value == figures.figure(board.entrants[-1], board.metrics[0])
    assert "; base 0 %; sft " in tiles["strict compliance"].note and "mean per pair" in tiles["training loss"].note
    _, lines = figures.run_table(views, labels)
    assert any(cell.endswith(" per pair") for cell in lines[1]) and "per pair" not in " ".join(lines[0])


@needs_vega
def test_a_pipelines_page_shows_its_last_stage_and_one_axis_per_unit(tmp_path: Path) -> None:
    from smolmlx.reports.page import render

    pipeline = make_pipeline(tmp_path / "notes-pipeline-20261121-081316-b00e")
    html = render(open_runs([pipeline]))
    assert "<h1>notes-pipeline</h1>" in html and "sft → pairs → dpo" in html and "SFT, then DPO." in html
    assert html.count('class="tile"') == 7 and "Key figures of dpo, the last stage here." in html
    drawn = [attributes["data-chart"] for _, attributes in _Page(html).tags if "data-chart" in attributes]
    assert drawn[drawn.index("loss") :][:5] == ["loss", "accuracy", "pair-loss", "pair-accuracy", "margin"]
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    specs: Any = json.loads(found[1])["charts"]
    assert specs["loss"]["title"] == "Loss: sft" and specs["pair-accuracy"]["title"] == "Pair accuracy: dpo"
    alone = render(open_runs([pipeline / "dpo"]))
    assert 'aria-label="Reward margin over steps"' in alone and 'aria-label="Pair accuracy over steps"' in alone


@needs_vega
def test_one_run_leaves_page_card_and_charts(tmp_path: Path) -> None:
    from smolmlx.reports.card import write_run_report

    run = make_run(tmp_path / "run-20261121-081316-b00e", rows=8)
    write_run_report(read_run(run))
    names = {path.name for path in (run / "charts").iterdir()}
    assert {"loss.svg", "loss.png", "test-compliance.svg", "weights0.png"} <= names
    assert (run / "charts" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in (run / "charts" / "loss.svg").read_text(encoding="utf-8")
    card = (run / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["smolmlx", "sft", "lora"]
    assert f"8 rows of test.jsonl (sha256 {TEST_ROWS_SHA})." in body and str(run) not in body
    assert "| data | data/notes/train.jsonl; validation: none |" in body and "datasets" not in head
    for text in ("| test (n=8) |", "![loss](charts/loss.svg)", "| copy control |", "learning rate", "rows are few"):
        assert text in body
    assert all(metric.label in body for metric in headlines.NOTES)


@needs_vega
def test_a_card_names_hub_data_and_the_interval_of_a_loss(tmp_path: Path) -> None:
    from smolmlx.reports import card, page

    run = make_run(tmp_path / "run", rows=6)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] = {"train": ["owner/chats", "data/notes", "gone/rows.jsonl"], "validation_share": 0.1}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = {
        "num_rows": 3,
        "num_tokens": 30,
        "loss": 2.5,
        "perplexity": 12.2,
        "accuracy": 0.5,
        "low": 2.25,
        "high": 2.75,
    }
    files = {"test": {"path": "rows/test.jsonl", "sha256": "ab" * 32, "rows": 3}}
    RunDir(run / "eval").write_json("results.json", {"suite": "loss", "files": files, "systems": {"base": found}})
    text = card.card(read_run(run))
    assert yaml.safe_load(text.split("---\n", 2)[1])["datasets"] == ["owner/chats"]
    assert "3 rows of rows/test.jsonl (sha256 abababababab)." in text and "| base | 2.5000 [2.2500, 2.7500] |" in text
    assert "validation: 10 % of the rows for training" in text
    assert "2.5000 [2.2500, 2.7500]" in page.render([read_run(run)])
