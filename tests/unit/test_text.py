"""Numbers, lists and names as people read them."""

import pytest
import yaml

from raytrain_adv import text
from raytrain_adv.text import as_yaml, ascii_name, clean, first_line, listed, nearest, split_names


def test_a_long_list_shows_how_many_more_there_are():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(n) for n in range(1007)]) == "0, 1, 2, 3, 4 and 1,002 more"


@pytest.mark.parametrize("given", ["a,b", " a , b, ", ["a ", "", "b"]])
def test_names_are_the_same_with_commas_and_in_a_list(given):
    assert split_names(given) == ["a", "b"]
    assert split_names(None) == split_names("") == []


def test_the_nearest_name_is_found_and_a_far_one_is_not():
    assert nearest("learning_rte", ["seed", "learning_rate"]) == "learning_rate"
    assert nearest("zzz", ["seed"]) is None


def test_an_error_without_a_message_is_named_by_its_type():
    assert first_line(ValueError("  one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize(
    "value", [None, True, 1e-5, "a: b", "null", [1, 2], {"a": [1]}, "", "x" * 200]
)
def test_a_value_as_yaml_is_one_line_that_reads_back(value):
    assert yaml.safe_load(as_yaml(value)) == value and "\n" not in as_yaml(value)


NAMES = [
    "saves_é",
    "测试",
    "тест",
    "ทดสอบ",
    "テスト-1",
    "בדיקה",
    "🚀",
    "a\udcff",
    "\uff26\uff30\uff18",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_any_script_has_an_ascii_form(name):
    plain = ascii_name(name)
    assert plain.isascii() and plain.isprintable() and plain == ascii_name(name)
    assert not set(plain) & set("/\\ ") and len(plain) <= len(name) + 10


def test_ascii_names_are_unchanged_and_others_stay_apart():
    assert ascii_name("run_1") == "run_1"
    assert len({ascii_name(name) for name in (*NAMES, "saves_e")}) == len(NAMES) + 1


def test_what_changes_a_terminal_is_taken_out_and_scripts_stay_whole():
    kept = "測試\u3000क्\u200cष 👩\u200d💻 é\u00a0\n\t\udcff"
    assert clean(kept) == kept
    assert clean("a\x1b[2J\u202e\u2066\x07\r") == "a\ufffd[2J\ufffd\ufffd\ufffd\ufffd"


def test_small_losses_are_told_apart():
    """A model that answers all is at 0.0006: its rounded one's 0.0012 was printed as 0.001."""
    assert [text.loss(value) for value in (0.000612, 0.00123, 0.05, 2.34567, 0.0)] == [
        "0.000612", "0.00123", "0.0500", "2.3457", "0.0000",
    ]  # fmt: skip
