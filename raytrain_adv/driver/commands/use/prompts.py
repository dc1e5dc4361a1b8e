"""Files of prompts: lines of text, or rows as in training data, with or without answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain_adv.data.read.entries import Entry
from raytrain_adv.data.read.formats import Conversation, Layout, UnusableRow, layout
from raytrain_adv.data.read.sources import data_files, read_files
from raytrain_adv.errors import JobError

QUESTIONS = {"instruction": "output", "prompt": "response", "question": "answer"}
"""Columns of a question, and of its answer."""
ANSWERS = ("output", "response", "completion", "answer")
TURNS = {"messages": ("role", "content", "user"), "conversations": ("from", "value", "human")}
_NO_ANSWER = "-"


@dataclass(frozen=True)
class PromptRow:
    """A conversation that a model is to continue."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    reference: str | None
    """The answer that the file has; none if it has none."""


def read_prompts(path: Path) -> list[PromptRow]:
    """Return every prompt of a file. Raises JobError if the file, or one of its rows, cannot be
    understood; it names the row.
    """
    rows, layouts = [], dict[tuple[str, ...], Layout]()
    for row in read_files(data_files(path)):
        values = row.values["text"] if path.suffix.lower() == ".txt" else row.values
        if path.suffix.lower() == ".txt" and not str(values).strip():
            continue
        try:
            completed, has_answer = _completed(values)
            columns = tuple(sorted(completed))
            if columns not in layouts:
                layouts[columns] = layout(Entry(str(path), "files", str(path)), [completed])
            found = layouts[columns].conversation(completed)
        except UnusableRow as error:
            raise _wrong(row.where, str(error)) from error
        except JobError as error:
            raise _wrong(row.where, error.found) from error
        rows.append(_row(row.where, found, has_answer))
    if not rows:
        raise JobError(f"{path} has no prompts", "every line is empty", "write one a line")
    return rows


def _row(where: str, found: Conversation, has_answer: bool) -> PromptRow:
    *before, last = found.messages
    reference = str(last["content"]) if has_answer else None
    return PromptRow(where, before, found.tools, reference)


def _completed(values: Any) -> tuple[dict[str, Any], bool]:
    """Return a row as training data has it, with a stand-in where it has no answer."""
    if isinstance(values, str):
        values = {"instruction": values}
    if not isinstance(values, dict):
        raise UnusableRow(f"a {type(values).__name__} is not a prompt")
    for column, (role, content, user) in TURNS.items():
        turns = values.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            if turns[-1].get(role if role in turns[-1] else "role") not in (user, "tool"):
                return values, True
            tag = role if role in turns[-1] else "role"
            told = content if content in turns[-1] else "content"
            answer = {tag: "gpt" if tag == "from" else "assistant", told: _NO_ANSWER}
            return {**values, column: [*turns, answer]}, False
    question = next((one for one in QUESTIONS if values.get(one)), None)
    if question is None:
        raise UnusableRow(f"no {', '.join(QUESTIONS)} or messages in {', '.join(values) or 'it'}")
    known = next((one for one in ANSWERS if values.get(one)), None)
    kept = {key: value for key, value in values.items() if key not in ANSWERS}
    stands = str(values[known]) if known is not None else _NO_ANSWER
    kept["instruction"] = kept.pop(question)
    return {**kept, "output": stands}, known is not None


def _wrong(where: str, found: str) -> JobError:
    fix = (
        "write a text a line (.txt), or rows (.json, .jsonl) with prompt, instruction and input, "
        "question, or messages of role and content"
    )
    return JobError(f"{where} is not a prompt", found, fix)
