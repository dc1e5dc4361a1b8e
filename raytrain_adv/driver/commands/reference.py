"""`raytrain-adv explain`, `schema` and `completion`: what the job file and the shell can know."""

import json
import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from raytrain_adv.config import compatibility
from raytrain_adv.config.explain import explain
from raytrain_adv.config.schema import schema
from raytrain_adv.errors import JobError, StorageError

VARIABLE = "_RAYTRAIN_ADV_COMPLETE"
"""The environment variable by which a shell asks click for completions."""
SHELLS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}


@click.command("explain")
@click.argument("name", nargs=-1, metavar="[KEY|FEATURE]...")
@click.option("--check", type=click.Path(path_type=Path), metavar="PAGE", help="Check that the "
              "compatibility matrix in a Markdown page is up to date.")  # fmt: skip
@click.option("--write", type=click.Path(path_type=Path), metavar="PAGE", help="Update it.")
def explain_command(name: tuple[str, ...], check: Path | None, write: Path | None) -> None:
    """Explain a key of the job file or a feature, or print the compatibility matrix."""
    page = check or write
    if page is None:
        print(explain(" ".join(name)) if name else compatibility.table())
        return
    try:
        old = page.read_text()
        new = compatibility.update_table(old)
        if write is not None:
            write.write_text(new)
            return
    except (OSError, ValueError) as error:
        raise StorageError("The page cannot be read or written", str(error), "name one") from None
    if new != old:
        found = "the features' rules have changed"
        fix = f"raytrain-adv explain --write {page}"
        raise JobError(f"The compatibility matrix in {page} is stale", found, fix)


@click.command("schema")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE")
def schema_command(output: Path | None) -> None:
    """Print the JSON schema of the job file."""
    text = json.dumps(schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text)
    except (OSError, ValueError) as error:
        fix = "name a file in a folder that can be written to"
        raise StorageError("The schema cannot be written", str(error), fix) from None


@click.command()
@click.argument("shell", required=False, type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print the script that completes commands and options in bash, zsh or fish.

    Without SHELL, that of the environment. Add it to the shell's own file:
    raytrain-adv completion bash >> ~/.bashrc
    """
    name = shell or Path(os.environ.get("SHELL", "bash")).name
    kind = get_completion_class(name)
    if kind is None or name not in SHELLS:
        found, fix = f"SHELL is {name}", f"name one: raytrain-adv completion {'|'.join(SHELLS)}"
        raise JobError("There is no completion for this shell", found, fix)
    group = context.find_root().command
    print(kind(group, {}, "raytrain-adv", VARIABLE).source())


REFERENCE = (explain_command, schema_command, completion)
