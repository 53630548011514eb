"""`smolmlx serve`: a model over HTTP, as OpenAI's API."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import click

from smolmlx.cli import options
from smolmlx.errors import BackendError, RecipeError

EPILOG = """\b
Examples:
  smolmlx serve --model tiny --adapter runs/quickstart-.../adapter
  smolmlx data augment chunks rows --server http://127.0.0.1:8000/v1     # from another terminal
"""


@click.command("serve", epilog=EPILOG)
@click.option("--model", required=True, metavar="M", help="Hub id, folder or `tiny`.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="A", type=click.Path(),
    help="Adapter folder; may be repeated. Each is a model of its own beside the base.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; there is no password.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Most answers at a time.")
@options.quantize
@options.engine
def command(
    model: str,
    adapters: tuple[str, ...],
    host: str,
    port: int,
    batch_size: int,
    backend: str,
    device: str | None,
    quantize: str,
) -> None:
    """Serve MODEL at /v1/chat/completions and /v1/completions, with a page to try it at /."""
    from smolmlx import console
    from smolmlx.backend import Loading
    from smolmlx.data.chat import Tokenizer
    from smolmlx.models import find_model

    try:
        import uvicorn

        from smolmlx.serving.app import Service, make_app
        from smolmlx.serving.worker import Worker, names
    except ImportError as error:
        raise BackendError(f"serve: needs starlette and uvicorn ({error}). pip install 'smolmlx[serve]'.") from error

    base = find_model(model)
    missing = [adapter for adapter in adapters if not Path(adapter).is_dir()]
    if missing:
        raise RecipeError(f"--adapter {missing[0]}: no such folder.")
    folders = [Path(adapter) for adapter in adapters]
    served = names(model, folders)
    tokenizer = Tokenizer(options.tokenizer_folder(base.folder, adapters))
    listener = _listen(host, port)
    choice = options.choose(backend, device)
    loading = Loading(device or choice.device, quantize=quantize)
    with console.status("loading the model"):
        worker = Worker(lambda: choice.backend.generator(base, None, tokenizer, loading), batch_size, folders)
    app = make_app(Service(worker, tokenizer, served, base.context, ending=lambda: server.should_exit))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    listener.listen(2048)  # uvicorn's own backlog; from here on nobody who was told the address is refused
    at = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    console.note(f"Serving {', '.join(served)} at {at}/v1 (a page to try it: {at}/). Ctrl-C ends it.", style="bold")
    try:
        server.run(sockets=[listener])
    finally:
        worker.close()


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before anything heavy is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, TypeError) as error:  # TypeError: what no name of a host can hold
        listener.close()
        if not isinstance(error, OSError) or isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise RecipeError(
                f"--host {host}: not an address of this machine ({error}). Pass 127.0.0.1, or 0.0.0.0 for all of them."
            ) from error
        raise BackendError(
            f"--port {port}: cannot listen at {host} ({error.strerror}). Choose another --port."
        ) from error
    return listener
