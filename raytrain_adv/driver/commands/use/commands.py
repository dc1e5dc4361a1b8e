"""The command lines of chat, generate and evaluate."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raytrain_adv.config.load import with_keys
from raytrain_adv.driver.commands.use.sampling import Sampling
from raytrain_adv.driver.commands.use.source import find
from raytrain_adv.driver.commands.verify import verify_folder
from raytrain_adv.errors import JobError

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


def quieten_bars() -> None:
    """Hide the bars of libraries that load a model; before they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def _load(named: str, device: str, template: str, trust_remote_code: bool) -> Loaded:
    source = find(named)[0]
    from raytrain_adv.driver.commands.use.load import device_named, load

    return load(source, device_named(device), template, trust_remote_code)


KEYS = click.argument("keys", nargs=-1, metavar="[key=value]...")
BATCH = click.option("--batch-size", type=click.IntRange(1, 4096), default=8, metavar="N",
                     help="Prompts that are answered together (default: 8).")  # fmt: skip
GREEDY = Sampling(do_sample=False)


@click.command("chat")
@click.argument("folder", metavar="RUN|FOLDER")
@KEYS
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
    drawn = with_keys(Sampling(), keys)
    named = [folder, *([compare] if compare else [])]
    for one in named:
        find(one)  # a wrong name is refused before the first model is loaded
    quieten_bars()
    from raytrain_adv.driver.commands.use.chat import Chat, run

    run(Chat([_load(one, **options) for one in named], drawn, system))


@click.command("generate")
@click.argument("folder", metavar="RUN|FOLDER")
@click.argument("prompts", type=click.Path(path_type=Path))
@KEYS
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, metavar="FILE")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@BATCH
@model_options
def generate_command(
    folder: str,
    prompts: Path,
    keys: tuple[str, ...],
    output: Path,
    overwrite: bool,
    batch_size: int,
    **options: Any,
) -> None:
    """Answer a file of prompts.

    PROMPTS has a prompt a line (.txt), or rows (.json, .jsonl, .parquet, .csv) with prompt,
    instruction and input, question, or messages. FILE gets a JSON line for each, in their order.
    Keys are those of chat; here do_sample is false by default.
    """
    drawn = with_keys(GREEDY, keys)
    find(folder)
    quieten_bars()
    from raytrain_adv.driver.commands.use import generate
    from raytrain_adv.driver.commands.use.prompts import read_prompts

    generate.refuse_existing(output, overwrite)
    rows = read_prompts(prompts)
    generate.run(_load(folder, **options), rows, output, drawn, batch_size)


@click.command("evaluate")
@click.argument("folders", nargs=-1, required=True, metavar="RUN|FOLDER... [key=value]...")
@click.option("--job", default="", metavar="FILE", help="Job file whose held-out rows are "
              "evaluated; by default the job of the first model's run.")  # fmt: skip
@click.option("--answers", type=click.Path(path_type=Path), metavar="FILE", help="Rows with "
              "prompts and right answers, as for generate.")  # fmt: skip
@click.option(
    "--score",
    default="",
    metavar="MODULE:FUNCTION",
    help="Scores an answer: "
    "def function(answer, reference) -> number; by default 1 if they are the same.",
)
@click.option(
    "--tasks",
    default="",
    metavar="NAMES",
    help="Tasks of lm-evaluation-harness, comma separated, or local YAML files of tasks.",
)
@click.option("--num-fewshot", type=click.IntRange(0), metavar="N", help="Examples in a task.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Rows of each task.")
@click.option("--chat-template/--no-chat-template", default=False, help="Ask tasks as a chat.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="By default "
              "evaluation.json in the first model's run, or here.")  # fmt: skip
@BATCH
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--trust-remote-code", is_flag=True, help="Run model code of the folders.")
def evaluate_command(folders: tuple[str, ...], **options: Any) -> None:
    """Evaluate finished models beside each other.

    RUN stands for all its models, FOLDER for one. Measures the loss on the job's held-out rows
    (with the masks and template of training), scores of answers, and tasks, each with its standard
    error and, row by row, its difference from the first model.
    """
    keys = [one for one in folders if "=" in one and not Path(one).is_dir()]
    drawn = with_keys(GREEDY, keys)
    sources = [source for one in folders if one not in keys for source in find(one)]
    if not sources:
        raise JobError("no model is named", "", "raytrain-adv evaluate RUN [FOLDER]...")
    quieten_bars()
    from raytrain_adv.driver.commands.use import evaluate

    evaluate.start(sources, drawn, **options)


COMMANDS = (chat_command, generate_command, evaluate_command, verify_folder)
