"""Write a tuned model for the program that will load it, and publish it once that program has loaded it and agreed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smolmlx import backend as backends
from smolmlx.adapters import adapter as adapters
from smolmlx.adapters import awq, card, gguf_model, gguf_vocab, hf_config, preflight, verification
from smolmlx.adapters.adapter import ADAPTER_SIDE_FILES, CONFIG, PEFT_WEIGHTS
from smolmlx.adapters.convert import convert, copy_side_files
from smolmlx.adapters.merge import ERASED, Merged, prepare, write_merged
from smolmlx.adapters.origin import find_origin
from smolmlx.adapters.tensors import read_json
from smolmlx.adapters.verification import Agreement, Sample
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, RecipeError, SmolError, VerificationError
from smolmlx.models import EMBEDDED, BaseModel, find_model, open_model
from smolmlx.rundir import RunDir, publish, writing

TARGETS = ("hf", "mlx", "gguf", "vllm")
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
Say = Callable[[str], None]
Judge = Callable[[Path, str], None]
"""Told what is about to be quantized, and its precision."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: a base and at most one adapter."""

    name: str
    base: BaseModel
    adapter: Path | None

    @property
    def terms(self) -> list[tuple[Path, float]]:
        return [(self.adapter, 1.0)] if self.adapter else []


@dataclass(frozen=True, slots=True)
class Settings:
    """How it is exported."""

    dtype: str = "auto"
    """Of hf, mlx (not quantized) and vllm."""
    quantize: str = "none"
    """mlx: none, 4bit, 8bit; vllm: none, awq."""
    calibration: str | None = None
    """vllm with awq: rows to run through the model."""
    kind: str = "f16"
    """gguf: one of gguf_model.PLAIN_TYPES or K_TYPES."""
    untie: bool = False
    verify: bool = True


@dataclass(slots=True)
class Export:
    """What was written, and who has loaded it."""

    target: str
    path: Path
    precision: str = ""
    agreements: list[Agreement] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    """What could not be asked, and why."""
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """What to type to use it."""


def find_source(name: str, model: str | None = None, revision: str | None = None) -> Source:
    """Find what a run, an adapter folder, a model folder or a hub id stands for.

    Args:
        model: the base, where the adapter's own note of it does not help.
        revision: of `model`, else of the hub model `name`.

    Raises:
        RecipeError: an unfinished run, nothing that can be exported, or a revision of what has none.
    """
    path = Path(name)
    run = RunDir(path)
    if (path / "recipe.yaml").is_file() and not run.done:
        raise RecipeError(f"{name}: this run is not finished. Go on with: smolmlx train --resume {name}")
    asked = model or name
    if revision and (asked == EMBEDDED or Path(asked).expanduser().is_dir()):
        raise RecipeError(
            f"--revision {revision} has no effect: {asked} lies on this machine. Leave it out, or name a hub model"
            f" {'with --model' if model or path.is_dir() else 'instead'}."
        )
    if run.model.is_dir() and run.done:
        return Source(name, open_model(run.model), None)
    folder = adapters.find_folder(path)
    if (folder / CONFIG).is_file():
        base = find_model(model, revision) if model else adapters.named_base(folder)
        return Source(name, base, folder)
    if model:
        raise RecipeError(f"{name}: not an adapter, so it takes no --model.")
    return Source(name, find_model(name, revision), None)


def export(target: str, source: Source, out: Path, how: Settings, say: Say = lambda text: None) -> Export:
    """Export, verify, publish, with a card in the folder. Nothing is left behind when a check fails.

    Raises:
        RecipeError: what the target cannot hold; an output in use, or one that cannot be written.
        BackendError: a package that the target needs is missing.
        VerificationError: the export does not agree with base and adapter.
    """
    assert target in TARGETS, target
    preflight.check_out(target, out)
    if target == "gguf":
        how = replace(how, kind=gguf_model.find_type(how.kind))
    if how.quantize == "awq":
        awq.refuse(how.calibration)
        awq.group_size(source.base)
    elif how.calibration is not None:
        raise RecipeError("--calibration has no effect without --quantize awq. Leave it out, or pass both.")
    done = Export(target, out)
    _preflight(target, source, how, done)
    samples, reference = _reference(source, how, done, say)
    check = _check_gguf if target == "gguf" else _check_folders

    def judge(whole: Path, precision: str) -> None:
        """Quantizing may be off by more than an adapter does, so that a lost one would not show afterwards."""
        if source.adapter is None or not samples:
            return
        say("loading it before it is quantized")
        found = Export(target, whole, precision)
        check(source, whole, found, samples, reference)
        done.agreements += [replace(one, consumer=f"{one.consumer}, before quantizing,") for one in found.agreements]

    with _publish(target, source, out, how) as place:
        say(f"writing {target}")
        if target == "gguf":
            _write_gguf(source, place, how, done, judge)
        elif target == "hf":
            _write_hf(source, place, out, how, done)
        else:
            {"mlx": _write_mlx, "vllm": _write_vllm}[target](source, place, out, how, done, judge)
        if how.verify:
            say("loading it where it will be used")
            check(source, place, done, samples, reference)
            done.unverified += _unseen(done)
        if target in ("hf", "mlx") and not _compared(source, done):
            done.notes.append(hf_config.uncompared(source.base.config))
        folder = place.parent if target == "gguf" else place  # of a single .gguf it is not kept
        (folder / card.NAME).write_text(card.card(done, source), encoding="utf-8")
    return done


def _preflight(target: str, source: Source, how: Settings, done: Export) -> None:
    """Refuse a broken base, and what the target would compute otherwise, before an engine is asked."""
    prepared = prepare(source.base, source.terms, dtype="float32" if target == "gguf" else how.dtype, untie=how.untie)
    preflight.check_source(prepared, source.base.folder)
    if target == "gguf":
        gguf_model.check(prepared)
    difference = hf_config.mlx_difference(prepared.config)
    if target == "mlx" and difference:
        raise RecipeError(f"{difference}. Use `export hf` with transformers.")
    window = hf_config.ignored_window(prepared.config)
    if target in ("hf", "mlx") and window:
        done.unverified.append(window)


def _compared(source: Source, done: Export) -> bool:
    """Whether transformers and mlx-lm are known to read the same model, by the tests or by what was asked now."""
    asked = " ".join(f"{found.consumer} {found.reference}" for found in done.agreements)
    both = "transformers" in asked and "mlx-lm" in asked
    return both or source.base.config.get("model_type") in hf_config.COMPARED


def _unseen(done: Export) -> list[str]:
    """Say where the adapter does too little for anyone to tell whether it is in the export."""
    effects = [found.effect for found in done.agreements if found.effect]
    if not effects or any(found.can_tell for found in done.agreements):
        return []
    return [
        f"that the adapter is in it: its mean KL divergence from the base is {effects[0]:.2g} nats per token, too little"
        f" to see in {done.precision}"
    ]


@contextlib.contextmanager
def _publish(target: str, source: Source, out: Path, how: Settings) -> Iterator[Path]:
    """Yield the folder (for gguf: the file) to write; it is moved into place when all went well."""
    if target != "gguf":
        with publish(out) as temporary:
            yield temporary
        return
    if preflight.is_gguf_file(out):
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".gguf-", dir=out.parent) as folder:
                yield Path(folder) / out.name
                (Path(folder) / out.name).replace(out)
        return
    with publish(out) as temporary:
        yield temporary / f"model-{how.kind}.gguf"


def _reference(source: Source, how: Settings, done: Export, say: Say) -> tuple[list[Sample], str]:
    """Ask base and adapter before anything is written."""
    if not how.verify:
        done.unverified.append("everything: --no-verify")
        return [], ""
    engine = verification.reference_engine(source.base, source.adapter)
    if engine is None:
        done.unverified.append(
            "logits: neither torch with transformers and peft nor mlx-lm is installed to compare with"
        )
        return [], ""
    say(f"asking base and adapter through {verification.library(engine)}")
    tokenizer = Tokenizer(_tokenizer_folder(source))
    with contextlib.ExitStack() as stack:
        try:
            adapter = stack.enter_context(verification.peft_form(source.adapter, source.base))
        except RecipeError as error:
            done.unverified.append(
                f"logits: the adapter cannot be loaded apart from its merge to compare with: {error}"
            )
            return [], ""
        samples = verification.make_samples(engine, source.base, adapter, tokenizer)
    return samples, f"base{' and adapter' if source.adapter else ''} in {verification.library(engine)}"


def _tokenizer_folder(source: Source) -> Path:
    own = source.adapter is not None and (source.adapter / "tokenizer.json").is_file()
    return source.adapter if own and source.adapter else source.base.folder


def _write_hf(source: Source, place: Path, out: Path, how: Settings, done: Export) -> None:
    merged = _merge_into(source, place, how, done)
    done.precision = merged.dtype
    done.commands.append(f'smolmlx generate --model {_quoted(out)} --prompt "..."')


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _merge_into(source: Source, place: Path, how: Settings, done: Export) -> Merged:
    merged = write_merged(source.base, source.terms, place, dtype=how.dtype, untie=how.untie)
    done.notes += merged.notes
    done.notes += _rounded(merged, merged.dtype, "--dtype float32")
    return merged


def _rounded(merged: Merged, precision: str, remedy: str) -> list[str]:
    if not merged.erased:
        return []
    worst = max(merged.erased, key=lambda name: merged.erased[name])
    return [
        f"{precision} rounds {worst} off by {merged.erased[worst]:.0%} of its change, and {len(merged.erased) - 1} others by"
        f" more than {ERASED:.0%}; {remedy} keeps it"
    ]


def _write_mlx(source: Source, place: Path, out: Path, how: Settings, done: Export, judge: Judge) -> None:
    """mlx-lm reads a merged folder as it is; quantizing is mlx-lm's own work."""
    done.commands.append(f'mlx_lm.generate --model {_quoted(out)} --prompt "..."')
    if how.quantize == "none":
        done.precision = _merge_into(source, place, how, done).dtype
        return
    if not verification.is_installed("mlx"):
        raise BackendError("export mlx --quantize needs mlx-lm. pip install 'smolmlx[mlx]'.")
    backends.load("mlx")  # brings a fast BLAS before mlx.core
    from mlx_lm import convert as mlx_convert

    with tempfile.TemporaryDirectory(prefix=".merged-", dir=place.parent) as folder:
        merged = _merge_into(source, Path(folder) / "merged", how, done)
        judge(merged.folder, merged.dtype)
        with contextlib.redirect_stdout(sys.stderr):
            mlx_convert(
                str(merged.folder),
                str(Path(folder) / "mlx"),
                quantize=True,
                q_bits=int(how.quantize[0]),
                q_group_size=64,
            )
        shutil.copytree(Path(folder) / "mlx", place, dirs_exist_ok=True)
        copy_side_files(merged.folder, place)
    _check_quantized(place, how.quantize)
    done.precision = how.quantize


def _check_quantized(place: Path, quantize: str) -> None:
    """Remove mlx-lm's own card, and refuse what is called quantized and is not."""
    (place / card.NAME).unlink(missing_ok=True)
    if not any(name.endswith(".scales") for name in open_model(place).shapes):
        raise RecipeError(
            f"--quantize {quantize}: no layer is a multiple of 64 wide, so nothing would be quantized. Leave it out."
        )


def _write_vllm(source: Source, place: Path, out: Path, how: Settings, done: Export, judge: Judge) -> None:
    """A merged folder, and the adapter beside it in the form that vLLM's --lora-modules takes."""
    done.precision = _merge_into(source, place / "merged", how, done).dtype
    if how.quantize == "awq":
        judge(place, done.precision)
        _quantize_merged(source, place, how, done)
    done.commands.append(f"vllm serve {_quoted(out / 'merged')}")
    if source.adapter is None:
        return
    reasons = _not_for_vllm(source.adapter)
    if reasons:
        done.notes.append(f"no adapter folder: vLLM loads none with {', '.join(reasons)}; serve the merged one")
        return
    with tempfile.TemporaryDirectory(prefix=".uniform-", dir=place) as folder:
        uniform_adapter(source.adapter, Path(folder), place / "adapter", source.base)
    _name_base(place / "adapter" / CONFIG, source.base)
    done.commands.append(_serve_adapter(source.base, place / "adapter", out / "adapter"))


def _name_base(path: Path, base: BaseModel) -> None:
    """Let the adapter's config name the base that it was loaded on now, which need not be the one of its training."""
    tree = read_json(path)
    known = {"base_model_name_or_path": base.name if base.revision else str(base.folder), "revision": base.revision}
    path.write_text(json.dumps({**tree, **known}, indent=2) + "\n", encoding="utf-8")


def _serve_adapter(base: BaseModel, adapter: Path, out: Path) -> str:
    rank = adapters.read(adapter).modules[0].rank
    limit = next((size for size in _VLLM_RANKS if size >= rank), rank)
    which = [base.name, "--revision", base.revision] if base.revision else [str(base.folder)]
    rest = ["--enable-lora", "--max-lora-rank", str(limit), "--lora-modules", f"tuned={out}"]
    return shlex.join(["vllm", "serve", *which, *rest])


def _quantize_merged(source: Source, place: Path, how: Settings, done: Export) -> None:
    """Put the AWQ model in the place of the merged one; the adapter folder stays for the unquantized base."""
    assert how.calibration is not None
    rows = awq.read_calibration(how.calibration, Tokenizer(_tokenizer_folder(source)))
    with tempfile.TemporaryDirectory(prefix=".whole-", dir=place) as folder:
        whole = (place / "merged").rename(Path(folder) / "merged")
        awq.quantize(whole, place / "merged", rows, awq.group_size(source.base))
        copy_side_files(whole, place / "merged")
    done.precision = "awq"
    done.notes.append(
        f"calibrated on {len(rows)} rows of {how.calibration}; compare it with the whole model before use"
    )


def _not_for_vllm(folder: Path) -> list[str]:
    found = adapters.read(folder)
    reasons = ["DoRA"] if found.dora else []
    reasons += ["whole weights"] if found.full else []
    reasons += (
        ["embeddings or a head"] if any(m.kind == "embedding" or m.path == "lm_head" for m in found.modules) else []
    )
    reasons += ["stacked experts"] if any(m.kind == "experts" for m in found.modules) else []
    return reasons


def uniform_adapter(folder: Path, work: Path, out: Path, base: BaseModel) -> None:
    """Write a PEFT adapter of one rank and one scale; vLLM scales all modules alike, whatever the patterns say."""
    found = adapters.read(folder)
    # With patterns even one scale for all need not be alpha / r.
    patterns = found.config.get("rank_pattern") or found.config.get("alpha_pattern")
    if found.form == "peft" and not patterns:
        out.mkdir()
        for name in (PEFT_WEIGHTS, CONFIG):
            shutil.copyfile(folder / name, out / name)
        copy_side_files(folder, out, ADAPTER_SIDE_FILES)
        return
    if found.form == "peft":
        folder = convert(folder, work / "mlx", "mlx", base).folder
    convert(folder, out, "peft", base, fresh=True)


def _write_gguf(source: Source, place: Path, how: Settings, done: Export, judge: Judge) -> None:
    kind = how.kind
    prepared = prepare(source.base, source.terms, dtype="float32", untie=how.untie)
    name = find_origin(source.base, source.adapter).title
    if kind in gguf_model.PLAIN_TYPES:
        gguf_model.write_gguf(prepared, place, kind, name)
        done.notes += _rounded(prepared.report(place), kind, "--type f32")
    else:
        with tempfile.TemporaryDirectory(prefix=".f32-", dir=place.parent) as folder:
            gguf_model.write_gguf(prepared, Path(folder) / "f32.gguf", "f32", name)
            judge(Path(folder) / "f32.gguf", "float32")
            done.notes.append(f"quantized by {gguf_model.quantize(Path(folder) / 'f32.gguf', place, kind)}")
    done.precision = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(kind, kind)
    done.notes += prepared.notes
    done.notes += [gguf_vocab.NFC_NOTE] if gguf_vocab.normalizes(prepared.tokenizer) else []
    path = done.path if preflight.is_gguf_file(done.path) else done.path / place.name
    done.commands.append(f"llama-cli -m {_quoted(path)}")


def _check_folders(source: Source, place: Path, done: Export, samples: Sequence[Sample], reference: str) -> None:
    """Load the folder in the libraries that will; transformers reads no MLX quantization."""
    folder = place / "merged" if done.target == "vllm" else place
    wanted = {"hf": ("cuda", "mlx"), "vllm": ("cuda",), "mlx": ("mlx",)}[done.target]
    if done.target == "vllm":
        here = "is here, but was not asked" if importlib.util.find_spec("vllm") else "is not installed"
        done.unverified.append(
            f"vLLM itself: it {here}; the folders were loaded by the libraries whose layout it reads"
        )
    for engine in wanted:
        program = {"cuda": "transformers", "mlx": "mlx-lm"}[engine]
        if not verification.is_installed(engine):
            done.unverified.append(f"{program}: not installed")
            continue
        if not samples:
            continue
        difference = hf_config.mlx_difference(source.base.config)
        if engine == "mlx" and difference:
            done.unverified.append(f"mlx-lm, which computes another model from it: {difference}")
            continue
        try:
            done.agreements.append(verification.check_folder(engine, folder, samples, reference, done.precision))
        except SmolError as error:
            if engine == wanted[0] and isinstance(error, BackendError):
                raise VerificationError(f"{program} does not load {folder}: {error}") from error
            if engine == wanted[0] or error.exit_code == 5:
                raise
            done.unverified.append(f"{program}: {error}")
    _check_tokenizer(folder, done)
    if done.target == "vllm" and (place / "adapter").is_dir() and samples and verification.is_installed("cuda"):
        tokenizer = Tokenizer(_tokenizer_folder(source))
        with verification.loaded("cuda", source.base, place / "adapter", tokenizer) as generator:
            names = (f"base and the adapter folder in {verification.library('cuda')}", reference)
            done.agreements.append(verification.compare(samples, generator.logits, names, "float32"))


def _check_tokenizer(folder: Path, done: Export) -> None:
    """transformers, and mlx-lm and vLLM through it, must cut text as in training."""
    if importlib.util.find_spec("transformers") is None:
        done.unverified.append("tokenizer: transformers is not installed")
        return
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    count = verification.compare_ids(
        Tokenizer(folder), lambda text: found.encode(text, add_special_tokens=False), "transformers' AutoTokenizer"
    )
    done.notes.append(f"the same ids from AutoTokenizer on {count} hard texts")


def _check_gguf(source: Source, place: Path, done: Export, samples: Sequence[Sample], reference: str) -> None:
    """Ask llama.cpp for ids and logits, with a float32 cache: its default of float16 alone costs 1e-2."""
    if importlib.util.find_spec("llama_cpp") is None:
        done.unverified.append("llama.cpp: llama-cpp-python is not installed (pip install llama-cpp-python)")
        return
    import llama_cpp

    name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    threads = max(1, (os.cpu_count() or 1) // 2)  # its threads wait by spinning: on busy cores more are far slower
    longest = max([len(sample.ids) for sample in samples], default=0)
    llama: Any = llama_cpp.Llama(
        str(place), n_ctx=max(512, longest + 8), n_batch=max(512, longest + 8), logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, n_threads=threads, n_threads_batch=threads,
    )  # fmt: skip
    try:
        tokenizer = Tokenizer(_tokenizer_folder(source))
        composed = gguf_vocab.normalizes(tokenizer.folder)  # llama.cpp does not, and the export says so

        def cut(text: str) -> list[int]:
            text = unicodedata.normalize("NFC", text) if composed else text
            return list(llama.tokenize(text.encode(), add_bos=False, special=True))

        count = verification.compare_ids(tokenizer, cut, name)
        around, own = list(llama.tokenize(b"a", add_bos=True, special=True)), tokenizer.encode("a", special=True)
        if around != own:
            raise VerificationError(
                f"{name} makes {around} of 'a' where the tokenizer, which adds BOS and EOS by itself, makes {own}."
                " The export was not kept; --no-verify keeps it."
            )
        done.notes.append(f"the same ids from llama.cpp on {count} hard texts{' in NFC' if composed else ''}")

        def logits(ids: Sequence[int]) -> Any:
            llama.reset()
            llama.eval(list(ids))
            return llama.scores[: len(ids)].copy()

        if samples:
            done.agreements.append(verification.compare(samples, logits, (name, reference), done.precision))
    finally:
        llama.close()
