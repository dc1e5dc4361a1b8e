"""`raytrain-adv verify`: ask an engine for an exported folder's log-probabilities, and compare them
with those of the model in training.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raytrain_adv.errors import JobError, StorageError, TrainingError

if TYPE_CHECKING:
    from raytrain_adv.export.reference import Agreement

ENGINES = ("transformers", "vllm", "llamacpp", "executorch")
TAIL = 1500
"""Characters of an engine's output in an error."""


def run(folder: Path, engine: str, python: str) -> None:
    """Print how an engine's log-probabilities agree with training's.

    Args:
        folder: a model that export wrote for an engine, or the run that has it.
        engine: one of ENGINES.
        python: an interpreter that can import it; empty for this one.

    Raises:
        JobError: when there is no model or no reference, or the engine does not run.
        StorageError: when the folder's files are not those that export wrote.
        TrainingError: when the engine computes another model.
    """
    from raytrain_adv.driver.commands.use.source import find
    from raytrain_adv.export.reference import REFERENCE, agreement, changed_files, read_reference
    from raytrain_adv.export.verify import most_divergence

    folder = find(str(folder))[0].folder
    if not (folder / REFERENCE).is_file():
        fix = "export it again: float8 activations are compared on a GPU alone"
        raise JobError(f"{folder} was not compared with training", f"no {REFERENCE}", fix)
    _refuse_other_format(folder, engine)
    known, most = read_reference(folder), most_divergence(folder)
    if changed := list(changed_files(folder, known)):
        fix = "copy them again from where export wrote them, or export again"
        raise StorageError(f"{folder} is not as it was exported", "\n".join(changed), fix)
    answer = ask(folder, engine, python)
    found = agreement(known, answer.logprobs)
    print(f"{engine:<10} {folder}")
    print(f"           {describe(found, most)}")
    print(f"           {answer.engine} decodes {answer.tokens_per_s:.3g} tokens/s, one sequence")
    if not found.kl <= most:
        fix = "do not serve this folder by this engine here: docs/serve.md names what it takes "
        fix += "and on which processors; else report it with the engine's version"
        what = f"{engine} computes another model than was trained"
        raise TrainingError(what, describe(found, most), fix)


def _refuse_other_format(folder: Path, engine: str) -> None:
    """Raise JobError if the folder is in a format that the engine does not read."""
    from raytrain_adv.ops.fake_quant.targets import COMPRESSED, GGUF, stored_as

    stored, _ = stored_as(json.loads((folder / "config.json").read_text()))
    form = GGUF if (folder / "model.gguf").is_file() else stored
    engines = {GGUF: ["llamacpp"], COMPRESSED: ["vllm", "transformers"]}
    taken = engines.get(form, [one for one in ENGINES if one != "llamacpp"])
    if engine not in taken:
        fix = f"--engine {' or '.join(taken)}; another format: raytrain-adv export --format NAME"
        raise JobError(f"{engine} does not read {folder}", f"it holds {form} tensors", fix)


def describe(found: Agreement, most: float) -> str:
    """Return the figures in words; `most` is the divergence that is allowed."""
    return (
        f"{found.num_tokens} positions: the same most likely token in {found.top1:.1%}, mean "
        f"difference of log-probabilities {found.difference:.3g}, KL {found.kl:.2g} nats (at most "
        f"{most})"
    )


@dataclass(frozen=True)
class Answer:
    """What an engine answered."""

    logprobs: list[dict[int, float]]
    """By token id, for each position but the first."""
    engine: str
    """Its package and version."""
    tokens_per_s: float
    """Of decoding one sequence, by the clock."""
    tokens_per_cpu_s: float
    """The same, by the processor seconds of all threads, which other programs change less."""


def ask(folder: Path, engine: str, python: str) -> Answer:
    """Return what an engine answers about the folder's tokens. Raises JobError if it does not."""
    from raytrain_adv.ops.fake_quant.targets import unpacking

    given = [json.dumps(unpacking(folder))] if engine == "transformers" else []
    ran = run_script(f"ask_{engine}.py", folder, python, *given)
    marked = [line.partition(" ")[::2] for line in ran.stdout.splitlines()]
    lines = {mark: json.loads(text) for mark, text in marked if mark in ("FOUND", "SPEED")}
    if len(lines) < 2:
        said = (ran.stderr or ran.stdout).strip()
        fix = f"name an interpreter that has it: --python /path/to/{engine}/bin/python"
        if "ModuleNotFoundError" not in said.rpartition("\n")[2]:
            fix = "it started: docs/serve.md names the targets and processors that it takes"
        raised = re.findall(r"^.*\w(?:Error|Exception): .*$", said[:-TAIL], re.MULTILINE)
        parts = [*(line[:TAIL] for line in raised[-1:]), *filter(None, [said[-TAIL:]])]
        if ran.returncode < 0 or not said:  # killed, or silent
            parts.append(f"exit status {ran.returncode}")
        raise JobError(f"{engine} did not answer", "\n".join(parts), fix)
    found = [{int(token): value for token, value in at.items()} for at in lines["FOUND"]]
    return Answer(found, **lines["SPEED"])


def run_script(
    name: str, folder: Path, python: str, *given: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of export/engines on a folder, with more arguments. Raises JobError if `python`
    does not start.
    """
    from raytrain_adv.export import engines

    script = Path(engines.__file__).parent / name
    command = [python or sys.executable, str(script), str(folder), *given]
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        fix = "name the file of a Python interpreter: --python /path/to/bin/python"
        raise JobError(f"{command[0]} does not start", str(error), fix) from error


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN|FOLDER")
@click.option("--engine", type=click.Choice(ENGINES), required=True)
@click.option("--python", default="", metavar="FILE", help="Python that has the engine.")
def verify_folder(folder: Path, engine: str, python: str) -> None:
    """Ask an engine for an exported folder's answers; compare them with training's.

    RUN stands for its model, of two for the one to be served.
    """
    run(folder, engine, python)
