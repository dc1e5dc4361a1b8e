import json
from itertools import islice

from raytrain_adv.data.read import orders


def test_orders_are_the_same_on_every_machine():
    first, again = (list(islice(orders.rows(), 50)) for _ in range(2))
    assert first == again
    assert len({row.values["instruction"] for row in first}) == 50


def test_an_order_says_what_its_json_has():
    for row in islice(orders.rows(), 200):
        order, text = json.loads(row.values["output"]), row.values["instruction"]
        assert order["customer"] in text
        assert order["city"] in text
        assert order["date"][:4] in text
        assert str(order["quantity"]) in text or orders._NUMBERS[order["quantity"] - 1] in text


def test_hardly_any_order_occurs_twice():
    answers = [row.values["output"] for row in orders.rows()]
    assert len(set(answers)) > 0.999 * len(answers)
