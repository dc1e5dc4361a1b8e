"""The table of LLaMA-Factory's arguments: the same here, mapped, without effect, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import yaml

from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory.keys import LISTED, MAPPED, REFUSED, RENAMED, SAME
from raytrain_adv.config.llamafactory.sharding import SHARDING
from raytrain_adv.config.problems import show
from raytrain_adv.config.schema import SPREADS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "tests" / "unit" / "config" / "llamafactory" / "examples.yaml"
NAMES = Path(__file__).with_name("llamafactory_arguments.yaml")


DERIVED = {
    "block_diag_attn",
    "compute_dtype",
    "device_map",
    "megatron_bridge_args",
    "model_max_length",
}
"""What LLaMA-Factory computes from other arguments."""


def arguments() -> str:
    """Return a Markdown table of every argument, its verdict, and how or why."""
    rows = ["| argument | here | how, or why not |", "| --- | --- | --- |"]
    for name in names():
        verdict, how = fate(name)
        rows.append(f"| `{name}` | {verdict} | {how.replace('|', '/').replace('<', '&lt;')} |")
    return "\n".join(rows)


def names() -> list[str]:
    """Return every argument of a LLaMA-Factory training file."""
    # Imported by now: raytrain_adv.driver, which drops what libraries print while they load.
    from transformers import Seq2SeqTrainingArguments

    listed = yaml.safe_load(NAMES.read_text())
    inherited = {one.name for one in fields(Seq2SeqTrainingArguments) if one.init}
    every = {name for group in listed.values() for name in group} | inherited
    return sorted(name for name in every - DERIVED if not name.startswith("_"))


def fate(name: str) -> tuple[str, str]:
    """Return what happens to an argument: the verdict, and how or why."""
    ours = RENAMED.get(name, name)
    owner = next((kind for kind in section_types() if ours in kind.model_fields), None)
    how = list(_mapped(name))
    if owner is not None:
        verdict = "same" if ours == name else f"mapped to `{ours}`"
        return verdict, " ".join([owner.sentence(ours), *how])
    if name in SHARDING:
        return "mapped", SPREADS.removeprefix("LLaMA-Factory's key: ")
    if ours in SAME:
        values = ", ".join(f"`{show(value)}`" for value in SAME[ours].accepted)
        return "same", f"with {values}: {SAME[ours].why}"
    if ours in LISTED:
        return "no effect", LISTED[ours]
    if how:
        return "mapped", how[0]
    if ours in REFUSED:
        return "refused", f"{REFUSED[ours].why}; {REFUSED[ours].fix}"
    return "unknown", "no entry in keys.yaml"


def _mapped(name: str) -> Iterator[str]:
    if name in MAPPED:
        value, runs_as, why = MAPPED[name]
        keys = ", ".join(f"`{key}: {show(one)}`" for key, one in runs_as.items())
        yield f"`{show(value)}` runs as {keys}: {why}."


def examples() -> str:
    """Return a Markdown table of LLaMA-Factory's examples: which run, and what stops the others."""
    rows = ["| file | here | |", "| --- | --- | --- |"]
    for name, file in yaml.safe_load(EXAMPLES.read_text())["files"].items():
        refused = file.get("refused", ())
        why = "; ".join(dict.fromkeys(fate(key)[1] for key in refused[:1]))
        how = ["`" + key + "`" for key in file["keys"] if fate(key)[0].startswith("mapped")]
        rest = (
            f"`{refused[0]}`: {why}" if refused else ", ".join(how) and f"mapped: {', '.join(how)}"
        )
        rows.append(f"| `{name}` | {'refused' if refused else 'runs'} | {rest} |")
    return "\n".join(rows)
