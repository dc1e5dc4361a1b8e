"""Write questions that one of a few functions answers, and the calls that a model should make.

    python jobs/data/make_tool_calls.py saves/tool_calls.json

The rows are in the form of OpenAI's messages, each with the function that it may call. The values
in questions are drawn at random: held-out questions have other ones than the trained rows.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Paris", "Tokyo", "Accra", "Rome", "Hanoi")
NAMES = ("Ana", "Ben", "Carla", "Dev", "Elif", "Finn", "Gita", "Hugo", "Ines", "Jon")
CODES = ("USD", "EUR", "JPY", "INR", "NOK", "PEN")
FUNCTIONS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "get_weather": (
        "Weather of a day",
        {"city": "string", "day": "string"},
        ("What is the weather in {city} {day}?", "Will it rain in {city} {day}?"),
    ),
    "convert": (
        "Convert money",
        {"amount": "integer", "to": "string"},
        ("How much is {amount} dollars in {to}?", "Change {amount} dollars to {to}."),
    ),
    "send_mail": (
        "Send a mail",
        {"name": "string", "city": "string"},
        ("Write to {name} that I am in {city}.", "Tell {name} by mail that I arrived in {city}."),
    ),
}


def row(draw: random.Random) -> dict[str, Any]:
    """Return a question, its call, and the function that is offered."""
    name, (about, arguments, questions) = draw.choice(list(FUNCTIONS.items()))
    values = {
        "city": draw.choice(CITIES),
        "day": draw.choice(("today", "tomorrow", "on Monday", "on Friday")),
        "amount": draw.randint(2, 999),
        "to": draw.choice(CODES),
        "name": draw.choice(NAMES),
    }
    chosen = {key: values[key] for key in arguments}
    properties = {key: {"type": kind, "description": key} for key, kind in arguments.items()}
    schema = {"type": "object", "properties": properties, "required": list(arguments)}
    function = {"name": name, "description": about, "parameters": schema}
    call = {"type": "function", "function": {"name": name, "arguments": json.dumps(chosen)}}
    return {
        "messages": [
            {"role": "user", "content": draw.choice(questions).format(**values)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": function}],
    }


def main(path: Path, count: int = 240) -> None:
    """Write the rows to a file."""
    draw = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row(draw) for _ in range(count)], indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
