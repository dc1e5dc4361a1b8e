"""`raytrain-adv chat`: talk with one finished model, or with two side by side."""

import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Queue

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from raytrain_adv.config.load import with_keys
from raytrain_adv.driver.commands.use.answer import Messages, prompt_ids, stream
from raytrain_adv.driver.commands.use.load import Loaded
from raytrain_adv.driver.commands.use.sampling import Sampling
from raytrain_adv.errors import RaytrainAdvError

COMMANDS = (
    "/system TEXT sets the system message, /set key=value changes sampling, /clear forgets the "
    "conversation, /exit ends; Ctrl-C ends an answer"
)


@dataclass
class Chat:
    """A conversation with each model; all get the same questions."""

    models: list[Loaded]
    sampling: Sampling
    system: str = ""
    histories: list[Messages] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        first: Messages = [{"role": "system", "content": self.system}] if self.system else []
        self.histories = [list(first) for _ in self.models]

    def answers(self, question: str, is_stopped: threading.Event) -> Iterator[tuple[int, str]]:
        """Yield the answers' text as it comes, each piece with its model's number, and keep them.
        Raises RaytrainAdvError: the first model's that could not answer; nothing is kept then.
        """
        asked = [[*h, {"role": "user", "content": question}] for h in self.histories]
        ids = [
            prompt_ids(model, messages, self.sampling.enable_thinking)
            for model, messages in zip(self.models, asked, strict=True)
        ]
        pieces: Queue[tuple[int, str | None, Exception | None]] = Queue()

        def work(number: int) -> None:
            error: Exception | None = None
            try:
                for text in stream(self.models[number], ids[number], self.sampling, is_stopped):
                    pieces.put((number, text, None))
            except RaytrainAdvError as failed:
                error = failed
            pieces.put((number, None, error))

        texts, failures = ["" for _ in self.models], list[Exception]()
        for number in range(len(self.models)):
            threading.Thread(target=work, args=(number,), daemon=True).start()
        running = len(self.models)
        while running:
            number, text, error = pieces.get()
            if text is None:
                running -= 1
                failures += [error] if error is not None else []
            else:
                texts[number] += text
                yield number, text
        if failures:
            raise failures[0]
        for number, text in enumerate(texts):
            self.histories[number] = [*asked[number], {"role": "assistant", "content": text}]

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a slash; return what to print, None to end."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return None
        if word == "/clear":
            self.clear()
            return "the conversation is forgotten"
        if word == "/system":
            if not self.models[0].has_template and rest:
                return "the model has no chat template, and so takes no system message"
            self.system = rest.strip()
            self.clear()
            what = "the system message is set" if self.system else "there is no system message"
            return f"{what}; the conversation begins again"
        if word == "/set":
            self.sampling = with_keys(self.sampling, rest.split())
            return self.sampling.words()
        return f"there is no command {word}: {COMMANDS}"


def run(chat: Chat) -> None:
    """Read questions from standard input, and print answers, until its end or /exit. Raises
    RaytrainAdvError: where no terminal is there to try again on.
    """
    console = Console(highlight=False, soft_wrap=True)
    notes = console if sys.stdin.isatty() else Console(highlight=False, soft_wrap=True, stderr=True)

    def note(text: str) -> None:
        notes.print(text, style="dim", markup=False)

    for model in chat.models:
        note(f"loaded {model.words()}")
    system = chat.system or chat.models[0].system
    note(f"system message: {system}" if system else "no system message but the template's")
    note(chat.sampling.words())
    if sys.stdin.isatty():
        note(COMMANDS)
    chat.clear()
    for line in _lines():
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if (said := chat.command(line.strip())) is None:
                    return
                note(said)
            else:
                _answer(chat, line, console)
        except RaytrainAdvError as error:
            if not sys.stdin.isatty():
                raise
            note(str(error))


def _lines() -> Iterator[str]:
    """Yield what the user types, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # input() then has a history and moves in the line

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _answer(chat: Chat, question: str, console: Console) -> None:
    """Print the answers as they come. Ctrl-C at a terminal ends them; what came is kept."""
    is_stopped = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        is_stopped.set()
        signal.signal(signal.SIGINT, before)  # a second one ends the program

    if sys.stdin.isatty():
        signal.signal(signal.SIGINT, stop)
    try:
        show = _one if len(chat.models) == 1 else _side_by_side
        show(chat, chat.answers(question, is_stopped), console)
    finally:
        signal.signal(signal.SIGINT, before)


def _one(chat: Chat, pieces: Iterator[tuple[int, str]], console: Console) -> None:
    for _, text in pieces:
        console.out(text, end="", highlight=False)
        console.file.flush()
    console.print()


def _side_by_side(chat: Chat, pieces: Iterator[tuple[int, str]], console: Console) -> None:
    texts = ["" for _ in chat.models]
    if not console.is_terminal:
        for number, text in pieces:
            texts[number] += text
        for model, text in zip(chat.models, texts, strict=True):
            console.out(f"[{model.name}] {text}", highlight=False)
        return
    width = console.width // len(texts) - 1

    def columns() -> Columns:
        named = zip(chat.models, texts, strict=True)
        panels = [Panel(Text(text), title=model.name, width=width) for model, text in named]
        return Columns(panels)

    with Live(
        columns(), console=console, refresh_per_second=8, vertical_overflow="visible"
    ) as live:
        for number, text in pieces:
            texts[number] += text
            live.update(columns())
