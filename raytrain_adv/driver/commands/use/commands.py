"""The command lines of chat, generate and evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from raytrain_adv.driver.commands.use import sampling
from raytrain_adv.driver.commands.use.source import find

if TYPE_CHECKING:
    from raytrain_adv.driver.commands.use.load import Loaded

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """Take what decides how a model is loaded."""
    for option in (
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
                     help="Where to compute; auto takes a GPU if there is one."),
        click.option("--template", default="", metavar="NAME", help="Chat template, as the job key "
                     "template; by default the one in the folder, with which its run trained."),
        click.option("--trust-remote-code", is_flag=True, help="Run model code of the folder."),
    ):  # fmt: skip
        command = option(command)
    return command


def _load(named: str, device: str, template: str, trust_remote_code: bool) -> Loaded:
    source = find(named)[0]
    from raytrain_adv.driver.commands.use.load import device_named, load

    return load(source, device_named(device), template, trust_remote_code)


@click.command("chat")
@click.argument("folder", metavar="RUN|FOLDER")
@click.argument("keys", nargs=-1, metavar="[key=value]...")
@click.option("--compare", default="", metavar="RUN|FOLDER", help="Show a second model's answers "
              "beside the first one's.")  # fmt: skip
@click.option("--system", default="", metavar="TEXT", help="System message.")
@model_options
def chat_command(
    folder: str, keys: tuple[str, ...], compare: str, system: str, **options: Any
) -> None:
    """Chat with a finished model.

    RUN is a run's output_dir: its model, the converted one if there are two; FOLDER is any model
    folder or adapter. Keys: temperature, top_p, top_k, repetition_penalty, max_new_tokens,
    do_sample, enable_thinking, seed. Without a terminal each line of standard input is a question.
    """
    drawn = sampling.changed(sampling.Sampling(), keys)
    named = [folder, *([compare] if compare else [])]
    for one in named:
        find(one)  # a wrong name is refused before the first model is loaded
    from raytrain_adv.driver.commands.use.chat import Chat, run

    run(Chat([_load(one, **options) for one in named], drawn, system))


COMMANDS = (chat_command,)
