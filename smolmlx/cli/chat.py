"""`smolmlx chat`: talk to a model in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError, SmolError

if TYPE_CHECKING:
    from smolmlx.backend import Decoding, Generator
    from smolmlx.data.chat import Tokenizer

HELP = """\
/reset           forget what was said
/system TEXT     set the system message, and begin anew
/adapter on|off  answer with the adapter, or with the base alone
/save FILE       write the conversation as a training row (JSONL)
/quit            leave (so does Ctrl-D; Ctrl-C ends an answer, and leaves when pressed twice at the prompt)"""


@click.command("chat")
@click.option("--model", required=True, metavar="M", help="Hub id, folder or `tiny`.")
@click.option("--adapter", metavar="A", type=click.Path(), help="Adapter folder (PEFT layout).")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(min=0, max=1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@options.quantize
@options.engine
def command(
    model: str,
    adapter: str | None,
    system: str | None,
    backend: str,
    device: str | None,
    quantize: str,
    **decoding: Any,
) -> None:
    """Talk to MODEL; answers appear while they are written. /help lists what can be typed besides messages."""
    from smolmlx import console
    from smolmlx.backend import Decoding, Loading
    from smolmlx.data.chat import Tokenizer
    from smolmlx.models import find_model

    options.refuse_idle_sampling(decoding["temperature"], "seed", "top_p")
    how = Decoding(**decoding)
    base = find_model(model)
    if adapter and not Path(adapter).is_dir():
        raise RecipeError(f"--adapter {adapter}: no such folder.")
    tokenizer = Tokenizer(options.tokenizer_folder(base.folder, [adapter] if adapter else []))
    choice = options.choose(backend, device)
    with console.status("loading the model"):
        generator = choice.backend.generator(
            base, Path(adapter) if adapter else None, tokenizer, Loading(device or choice.device, quantize=quantize)
        )
    console.note(f"{model}{f' with {adapter}' if adapter else ''}. /help lists the commands.")
    context = base.context
    Chat(generator, tokenizer, how, adapter, system, context).run()


class Chat:
    """A conversation, and the commands that change it."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        how: Decoding,
        adapter: str | None,
        system: str | None,
        context: int | None,
    ) -> None:
        self.generator, self.tokenizer, self.how, self.context = generator, tokenizer, how, context
        self.adapter = Path(adapter) if adapter else None
        self.messages: list[dict[str, str]] = []
        self._begin(system)

    def _begin(self, system: str | None) -> None:
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        from smolmlx import console

        warned = False
        while True:
            try:
                line = click.prompt("", prompt_suffix="> ", default="", show_default=False, err=True).strip()
            except click.Abort as stop:
                console.note("")
                if warned or not isinstance(stop.__context__, KeyboardInterrupt):
                    return
                warned = True
                console.note("Ctrl-D or /quit leaves, and so does a second Ctrl-C; /save FILE keeps the conversation.")
                continue
            warned = False
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    console.note(self.obey(line))
                elif line:
                    self.ask(line)
            except SmolError as error:
                console.note(str(error), style="red")

    def obey(self, line: str) -> str:
        """Carry out a command and return what to say about it."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self._begin(self.system)
            return "forgotten"
        if name == "/system":
            self._begin(rest or None)
            return f"system message: {rest or 'none'}; a new conversation"
        if name == "/adapter":
            if self.adapter is None:
                return "no adapter is loaded: start chat with --adapter"
            if rest not in ("on", "off"):
                return "/adapter on, or /adapter off"
            self.generator.use_adapter(self.adapter if rest == "on" else None)
            return f"adapter {rest}"
        if name == "/save":
            return self._save(rest)
        return f"{name}: no such command\n{HELP}"

    def _save(self, path: str) -> str:
        if not path:
            return "/save FILE: name a file"
        if all(message["role"] != "assistant" for message in self.messages):
            return f"/save {path}: there is no answer yet, and a training row needs one. Ask something first."
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"/save {path}: {error.strerror}"
        return f"{len(self.messages)} messages added to {path}"

    def ask(self, text: str) -> None:
        """Stream the answer to a message; Ctrl-C ends it, and what was said so far counts."""
        from dataclasses import replace

        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.encode(self.tokenizer.prompt(messages))
        room = self.how.max_tokens if self.context is None else self.context - len(prompt)
        if room < 1:
            raise RecipeError(
                f"the conversation has {len(prompt)} tokens, the model's context is {self.context}: /reset."
            )
        how = replace(self.how, max_tokens=min(self.how.max_tokens, room))
        pieces: list[str] = []

        def on_text(index: int, piece: str) -> None:
            pieces.append(piece)
            click.echo(piece, nl=False)

        try:
            for _ in self.generator.generate([prompt], how, on_text):
                pass
        except KeyboardInterrupt:
            pass
        click.echo()
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]
