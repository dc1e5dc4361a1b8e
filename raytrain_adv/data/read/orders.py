"""The quickstart's dataset: orders as a customer writes them, and the same orders as JSON.

Made by drawing: a model of a few million parameters learns the task from scratch in minutes, and
hardly any held-out order was trained on, as there are more than ten million of them.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from raytrain_adv.data.read.sources import Row

NUM_ROWS = 10_000
SEED = 0


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "Anna Ben Carla David Emma Felix Grace Hugo Iris Jonas Karin Liam Mara Nils Olga Paul "
    "Rosa Simon Tara Victor"
)
_LAST = _words(
    "Berg Costa Dahl Evans Fischer Garcia Haas Ito Jansen Keller Lopez Meyer Novak Olsen "
    "Patel Rossi Silva Tanaka Vogel Weber"
)
_COLORS = _words("red green blue black white yellow brown gray orange purple")
_CITIES = _words("Oslo Berlin Madrid Paris Rome Vienna Dublin Prague Lisbon Athens Zurich Warsaw")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")

_ITEMS = {
    "shirt": "shirts", "chair": "chairs", "lamp": "lamps", "bag": "bags", "box": "boxes",
    "knife": "knives", "shelf": "shelves", "brush": "brushes", "cup": "cups", "table": "tables",
    "pen": "pens", "watch": "watches",
}  # fmt: skip
_FORMS = (
    "{customer} orders {many} {color} {items}, to {city}, by {day}.",
    "Please send {many} {color} {items} to {customer} in {city} before {day}.",
    "{customer} in {city} needs {many} {items} in {color} on {day}.",
    "By {day}, {city}: {many} {color} {items} for {customer}.",
    "Hello, this is {customer}. I would like {many} {items}, {color}, in {city} on {day}.",
    "Deliver to {city} on {day}: {items}, {color}, {many} of them. {customer}",
)


def fingerprint() -> str:
    """Hash the program the rows are made by."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def rows() -> Iterator[Row]:
    """Yield NUM_ROWS alpaca rows, the same on every machine."""
    draw = random.Random(SEED)
    for number in range(1, NUM_ROWS + 1):
        question, order = _order(draw)
        values = {"instruction": question, "output": json.dumps(order)}
        yield Row(f"orders row {number}", values, number / NUM_ROWS)


def _order(draw: random.Random) -> tuple[str, dict[str, str | int]]:
    """Draw an order: its sentence, and what it says."""
    item, count = draw.choice(list(_ITEMS)), draw.randint(2, 60)
    order: dict[str, str | int] = {
        "customer": f"{draw.choice(_FIRST)} {draw.choice(_LAST)}",
        "item": item,
        "color": draw.choice(_COLORS),
        "quantity": count,
        "city": draw.choice(_CITIES),
        "day": draw.choice(_DAYS),
    }
    many = _NUMBERS[count - 1] if count <= len(_NUMBERS) and draw.random() < 0.5 else str(count)
    words = {"many": many, "items": _ITEMS[item]}
    return draw.choice(_FORMS).format(**{**order, **words}), order
