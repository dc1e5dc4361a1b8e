import json
from itertools import islice

import pytest
from transformers import AutoTokenizer

from raytrain_adv.data.read import orders
from tests.conftest import ROOT

MODEL = ROOT / "jobs" / "models" / "orders-llama"


def test_orders_are_the_same_on_every_machine():
    first, again = (list(islice(orders.rows(), 50)) for _ in range(2))
    assert first == again
    assert len({row.values["instruction"] for row in first}) == 50


def test_an_order_says_what_its_json_has():
    for row in islice(orders.rows(), 200):
        order, text = json.loads(row.values["output"]), row.values["instruction"]
        assert all(order[key] in text for key in ("customer", "color", "city", "day"))
        assert orders._ITEMS[order["item"]] in text
        count = order["quantity"]
        assert f" {count} " in text or f" {orders._NUMBERS[count - 1]} " in text.replace(",", " ")


def test_hardly_any_order_occurs_twice():
    """So held-out orders are new to the model; a few among ten thousand may be drawn twice."""
    answers = [row.values["output"] for row in orders.rows()]
    assert len(set(answers)) > 0.999 * len(answers)


def test_each_value_of_an_answer_is_one_token_of_its_model():
    """That is why the task is learned in minutes: a value is found and copied, not spelled."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for row in islice(orders.rows(), 200):
        assert len(tokenizer.encode(row.values["output"], add_special_tokens=False)) == 14


@pytest.mark.parametrize("text", ["Zürich, 千 boxes\n\tfor <you>", '{"x": [1, 2.5]}', ""])
def test_its_tokenizer_keeps_any_text(text):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
