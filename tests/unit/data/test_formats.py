"""Rows of the three layouts, by entry and by guess."""

import json

import pytest

from raytrain_adv.data.read.entries import Entry
from raytrain_adv.data.read.formats import UnusableRow, layout
from raytrain_adv.errors import JobError


def read(row, **entry):
    return layout(Entry("set", "files", "file", **entry), [row]).conversation(row)


def written(conversation):
    return [(m["role"], m["content"]) for m in conversation.messages]


QA = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"question": "Q", "answer": "A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {
            "conversations": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                {"role": "assistant", "content": "A"},
            ]
        },
    ],
)
def test_layout_of_a_plain_file_is_found_out(row):
    assert written(read(row)) == QA


def test_unknown_layout_is_an_error_that_lists_the_columns():
    with pytest.raises(JobError, match="columns: body, title"):
        read({"title": "a", "body": "b"})


def test_alpaca_joins_instruction_and_input_by_a_newline():
    row = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    assert written(read(row)) == [("user", "Sort.\nb a"), ("assistant", "a b")]


def test_alpaca_history_and_system_become_messages():
    row = {"instruction": "Q", "output": "A", "system": "S", "history": [["q", "a"]]}
    expected = [("system", "S"), ("user", "q"), ("assistant", "a"), *QA]
    assert written(read(row)) == expected


def test_columns_of_an_entry_are_exactly_those_that_are_read():
    row = {"ask": "Q", "input": "not named", "reply": "A"}
    columns = {"prompt": "ask", "response": "reply"}
    assert written(read(row, formatting="alpaca", columns=columns)) == QA


def test_column_that_no_row_has_is_an_error():
    with pytest.raises(JobError, match="missing: sistem"):
        columns = {"prompt": "instruction", "response": "output", "system": "sistem"}
        read({"instruction": "Q", "output": "A"}, formatting="alpaca", columns=columns)


def test_tags_of_an_entry_rename_roles_and_keys():
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "U", "assistant_tag": "B"}
    row = {"turns": [{"who": "U", "text": "Q"}, {"who": "B", "text": "A"}]}
    columns = {"messages": "turns"}
    assert written(read(row, formatting="sharegpt", columns=columns, tags=tags)) == QA


def test_system_message_stands_first_wherever_it_comes_from():
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    inside = {"conversations": [{"from": "system", "value": "S"}, *turns]}
    beside = {"conversations": turns, "system": "S"}
    assert written(read(inside)) == written(read(beside)) == [("system", "S"), *QA]


def test_sharegpt_function_calls_become_tool_calls_and_their_results_tool_messages():
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    turns = [("human", "Q"), ("function_call", call), ("observation", "2"), ("gpt", "A")]
    conversation = read({"conversations": [{"from": f, "value": v} for f, v in turns]})
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    function = conversation.messages[1]["tool_calls"][0]["function"]
    assert function == {"name": "add", "arguments": {"a": 1}}


def test_openai_tool_calls_are_kept_with_arguments_as_an_object():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "A"},
    ]
    conversation = read({"messages": messages, "tools": '[{"name": "add"}]'})
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert conversation.tools == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("key", ["loss_weight", "weight"])
def test_answers_with_a_weight_of_zero_are_not_trained(key):
    turns = [("user", "Q"), ("assistant", "A"), ("user", "Q"), ("assistant", "B")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1][key], messages[3][key] = 0, 1
    weights = [one.get("loss_weight") for one in read({"messages": messages}).messages]
    assert weights == [None, 0, None, None]
    with pytest.raises(UnusableRow, match=f"message 2 has {key} 0.5"):
        messages[1][key] = 0.5
        read({"messages": messages})


@pytest.mark.parametrize("key", ["loss_weight", "weight"])
def test_a_weight_that_would_train_a_question_is_not_ignored(key):
    answer = {"role": "assistant", "content": "A"}
    question = {"role": "user", "content": "Q", key: 0}
    assert len(read({"messages": [question, answer]}).messages) == 2
    with pytest.raises(UnusableRow, match=f"message 1 is not an answer and has {key} 1"):
        read({"messages": [{**question, key: 1.0}, answer]})


def test_a_call_under_openais_older_key_is_kept():
    call = {"name": "add", "arguments": '{"a": 1}'}
    answer = {"role": "assistant", "content": "Let me see.", "function_call": call}
    found = read({"messages": [{"role": "user", "content": "Q"}, answer]}).messages[1]
    assert found["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def results(ids, called=("a", "b")):
    """Return the results of two calls, as read from rows whose results have `ids`."""
    calls = [{"id": one, "function": {"name": f"f_{one}", "arguments": {}}} for one in called]
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": one, "content": f"of {one}"} for one in ids),
        {"role": "assistant", "content": "A"},
    ]
    return read({"messages": messages}).messages[2:-1]


@pytest.mark.parametrize("ids", [("a", "b"), ("b", "a")])
def test_results_are_in_the_order_of_the_calls_that_they_answer(ids):
    assert [one["content"] for one in results(ids)] == ["of a", "of b"]


def test_a_result_has_the_name_and_number_of_its_call():
    assert [(one["name"], one["call"]) for one in results(["b"])] == [("f_b", 1)]


@pytest.mark.parametrize(("ids", "called"), [(("x", "y"), ("a", "b")), (("a", "a"), ("a", "a"))])
def test_results_with_ids_of_no_call_stay_as_they_are(ids, called):
    assert [one["content"] for one in results(ids, called)] == [f"of {one}" for one in ids]
    assert not any("call" in one for one in results(ids, called))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"instruction": "Q", "output": ""}, "no answer: output is empty"),
        ({"instruction": "Q"}, "no answer: output is empty or missing"),
        ({"instruction": "Q", "output": None}, "no answer"),
        ({"instruction": "Q", "output": "  \n"}, "no answer"),
        ({"instruction": "Q", "output": 7}, "output is a int, not text"),
        ({"instruction": "", "output": "A"}, "the question is empty"),
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "not a pair"),
        ({"instruction": "Q", "output": "A", "history": 5}, "not a list"),
        (["Q", "A"], "the row is a list"),
    ],
)
def test_unusable_alpaca_row_reports_why(bad, reason):
    good = {"instruction": "Q", "output": "A", "history": []}
    with pytest.raises(UnusableRow, match=reason):
        layout(Entry("set", "files", "file"), [good]).conversation(bad)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no answer"),
        (None, "no answer"),
        ("human: hi", "no answer"),
        ([("human", "Q")], "last message is not the assistant's"),
        ([("gpt", "A")], "turn 1 is of role assistant, where a question was expected"),
        ([("human", "Q"), ("human", "Q")], "turn 2 is of role user, where an answer was expected"),
        ([("human", "Q"), ("gpt", "")], "the last message is empty"),
        ([("human", "Q"), ("bot", "A")], "unknown role 'bot'"),
        ([("system", "S")], "no answer"),
        ([("human", "Q"), ("system", "S"), ("gpt", "A")], "turn 2 is of role system"),
        ([("human", "Q"), ("function_call", "add(1)"), ("gpt", "A")], "not a function call"),
        ([("human", "\ud800"), ("gpt", "A")], "half a surrogate pair"),
        ([({}, "Q"), ("gpt", "A")], "unknown role"),
        ([("human", {"a": 1}), ("gpt", "A")], "is a dict, not text"),
    ],
)
def test_unusable_sharegpt_row_reports_why(turns, reason):
    good = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    if isinstance(turns, list):
        turns = [{"from": f, "value": v} for f, v in turns]
    with pytest.raises(UnusableRow, match=reason):
        layout(Entry("set", "files", "file"), [good]).conversation({"conversations": turns})
