"""The one renderer of tables: plain text in logs, color on terminals only."""

import pytest
from rich.console import Group

from raytrain_adv.tables import WIDTH, Fitting, Text, columns, pairs, plain, section, show


def test_plain_text_has_one_width_and_no_color():
    table = columns("node", "GPUs", right=["GPUs"])
    table.add_row(Text("10.0.0.1", "red"), "8 " * 100)
    lines = plain(table).splitlines()
    assert max(map(len, lines)) <= WIDTH and "\x1b" not in "".join(lines)
    assert lines[0].startswith("node") and lines[0].endswith("GPUs")
    assert all(line == line.rstrip() for line in lines)


def test_a_section_has_its_title_and_indented_pairs():
    text = plain(Group(*section("Batch", pairs([("data", "64 rows"), ("", "more")]))))
    assert text == "\nBatch\n  data  64 rows\n        more"


def test_what_is_shown_in_a_pipe_is_plain(capsys: pytest.CaptureFixture[str]):
    show(Text("fits", style="green"))
    assert capsys.readouterr().out == "fits\n"


def test_texts_of_others_do_not_move_the_cursor_or_turn_the_direction_of_writing():
    shown = plain(pairs([("name\x1b[2J", "\u202etxt.\x1b[31m é 测试 \u3000")]))
    assert "\x1b" not in shown and "\u202e" not in shown
    assert "é 测试" in shown


def test_a_long_name_continues_after_a_dot_or_slash_and_only_without_them_after_an_underscore():
    name = "model.layers.[0-31].self_attn.q_proj"
    assert plain(Text(name), 32).splitlines() == ["model.layers.[0-31].self_attn.", "q_proj"]
    path = plain(Text("saves/llama3-8b/lora/sft"), 16).splitlines()
    assert path == ["saves/llama3-8b/", "lora/sft"]
    key = plain(Text("set disable_gradient_checkpointing: false"), 24).splitlines()
    assert key == ["set disable_gradient_", "checkpointing: false"]
    assert plain(Text("0123456789" * 2), 12).splitlines() == ["0123456789" + "01", "23456789"]


def test_a_view_that_is_wider_than_a_line_is_replaced():
    view = Fitting(Text("a wide table", no_wrap=True), Text("narrow"))
    assert plain(view, 12) == "a wide table"
    assert plain(view, 11) == "narrow"
