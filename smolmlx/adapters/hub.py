"""Upload an export to the model hub, with a card that says what was verified; only when asked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from smolmlx.adapters.exports import Export, Source
from smolmlx.errors import BackendError


def refuse() -> None:
    """Refuse before the work starts where an upload cannot follow.

    Raises:
        BackendError: huggingface_hub is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BackendError("--push needs huggingface_hub. pip install huggingface_hub.")


def card(done: Export, source: Source) -> str:
    """Return a model card for an exported folder."""
    name = source.base.name if source.base.revision else Path(source.base.name).name
    tags = {"hf": "transformers", "vllm": "transformers", "mlx": "mlx", "gguf": "gguf"}[done.target]
    lines = ["---", f"base_model: {json.dumps(name)}", f"library_name: {tags}", "tags: [smolmlx]", "---", ""]
    lines += [f"# {Path(done.path).stem}", "", f"{name}, fine-tuned and exported with smolmlx ({done.precision}).", ""]
    lines += [
        f"* {a.consumer} against {a.reference}: {a.nats:.2g} nats per token, {a.greedy:.1%} of {a.num_tokens} greedy tokens"
        for a in done.agreements
    ]
    lines += [f"* {note}" for note in done.notes]
    lines += [f"* not verified: {text}" for text in done.unverified]
    return "\n".join([*lines, ""])


def push(done: Export, source: Source, repo: str, private: bool) -> str:
    """Upload an export with its card to the hub; returns the address.

    Raises:
        BackendError: the hub cannot be reached, or refuses.
    """
    refuse()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        if done.path.is_file():
            api.upload_file(path_or_fileobj=str(done.path), path_in_repo=done.path.name, repo_id=repo)
        else:
            api.upload_folder(folder_path=str(done.path), repo_id=repo)
        api.upload_file(path_or_fileobj=card(done, source).encode(), path_in_repo="README.md", repo_id=repo)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BackendError(
            f"--push {repo}: {str(error).splitlines()[0]} The export is kept. Log in with `hf auth login`, then:"
            f" hf upload {repo} {done.path}"
        ) from error
    return address
