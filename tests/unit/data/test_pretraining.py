"""Pretraining text, more kinds of files, and datasets that are read in turn."""

import csv
import json
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest

from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.read.sources import read_files
from raytrain_adv.data.shown import shown_rows
from raytrain_adv.data.tokens.datasets import interleave
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.driver.plan.data import measure
from raytrain_adv.errors import JobError

ROWS = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(5)]


def write_arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(("suffix", "write"), [("arrow", write_arrow), ("csv", write_csv)])
def test_rows_of_arrow_and_csv_are_those_of_json(tmp_path, suffix, write):
    path = tmp_path / f"rows.{suffix}"
    write(path, ROWS)
    found = list(read_files([path]))
    assert [row.values for row in found] == ROWS
    assert len({row.where for row in found}) == 5 and found[-1].progress == pytest.approx(1.0)


def test_a_csv_row_with_too_many_columns_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\na,b\na,b,c\n")
    with pytest.raises(JobError, match="line 3"):
        list(read_files([path]))


def prepared(make_job, tmp_path, lines, **keys):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    job = make_job(stage="pt", dataset=str(path), **keys)
    return job, prepare(job, lambda text, **facts: None)


def test_pretraining_trains_on_every_token_and_drops_none(make_job, tmp_path):
    """Lines longer than cutoff_len are split, not cut; sequences are packed by default."""
    lines = ["one two three " * 40, "", "four five"]
    job, data = prepared(make_job, tmp_path, lines, cutoff_len=32)
    tokenizer = load_tokenizer(job)
    expected = [
        tokenizer(line, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for line in lines
        if line
    ]
    rows = [data.train.rows.tokens(i).tolist() for i in range(len(data.train.rows))]
    found, wanted = list(chain.from_iterable(rows)), list(chain.from_iterable(expected))
    assert sorted(found) == sorted(wanted) and wanted[: len(rows[0])] == rows[0]
    assert max(map(len, rows)) == 32
    assert data.stats["train"]["packing_efficiency"] > 0.5
    total, starts = sum(map(len, rows)), len(rows)
    assert total - starts <= data.stats["train"]["label_tokens"] <= total


def test_packing_false_leaves_rows_of_pretraining_apart(make_job, tmp_path):
    _, data = prepared(make_job, tmp_path, ["a b", "c d"], packing=False)
    assert data.stats["train"]["sequences"] == 2 and "packing_efficiency" not in data.stats["train"]


COLUMNS = {"prompt": "instruction"}
NAMED = {"formatting": "alpaca", "columns": COLUMNS}


@pytest.mark.parametrize(
    ("entry", "trained", "left_out"),
    [
        ({}, "instruction, input", "output"),
        (NAMED, "instruction", "input, output"),
        ({**NAMED, "columns": {**COLUMNS, "query": "output"}}, "instruction, output", "input"),
    ],
)
def test_pretraining_joins_what_llamafactory_joins_and_names_the_rest(
    make_job, tmp_path, entry, trained, left_out
):
    """Source: LLaMA-Factory's AlpacaDatasetConverter and PretrainDatasetProcessor."""
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 4))
    info = {"sums": {"file_name": "rows.json", **entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    job, told = make_job(stage="pt", dataset="sums", dataset_dir=str(tmp_path)), list[str]()
    prepare(job, told.append)
    sentence = f"sums: stage pt trains the text in {trained}; not trained: {left_out}"
    assert sentence in told
    text = "\n".join(row[column] for column in trained.split(", "))
    assert text in "".join(token.text for token in shown_rows(job, 1)[0].tokens)
    again = list[str]()
    prepare(job, again.append)  # tokenized already
    assert sentence in again


def test_the_columns_of_a_large_dataset_are_named_in_its_plan(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr("raytrain_adv.driver.plan.data.COUNTED", 2)
    row = {"instruction": "Add.", "output": "3"}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 4))
    told: list[str] = []
    measure(make_job(stage="pt", dataset=str(tmp_path / "rows.json")), told.append)
    assert any("trains the text in instruction; not trained: output" in one for one in told)


def test_rows_without_text_are_refused(make_job, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"other": "x"}]))
    with pytest.raises(JobError, match="no text to pretrain on"):
        prepare(make_job(stage="pt", dataset=str(path)), lambda text, **facts: None)


def counts(strategy, shares=None):
    sets = [list(range(10)), list(range(40))]
    streams = [lambda rows=rows: iter(rows) for rows in sets]
    drawn = list(interleave(streams, strategy, shares, 0))
    return [[row for i, row in drawn if i == number] for number in range(2)], drawn


def test_interleaving_in_turn_ends_as_its_name_says():
    (short, long), drawn = counts("interleave_under")
    assert len(short) == 10 and len(long) == 10 and [i for i, _ in drawn[:4]] == [0, 1, 0, 1]
    (short, long), _ = counts("interleave_over")
    assert len(long) == 40 and abs(len(short) - 40) <= 1 and short[:12] == [*range(10), 0, 1]
    (short, long), _ = counts("interleave_once")
    assert short == list(range(10)) and long == list(range(40))


def test_interleaving_follows_the_shares():
    sets = [lambda: iter(range(4000))] * 2
    drawn = [i for i, _ in interleave(sets, "interleave_under", [0.8, 0.2], 0)]
    assert np.mean(drawn) == pytest.approx(0.2, abs=0.02)
    assert drawn == [i for i, _ in interleave(sets, "interleave_under", [0.8, 0.2], 0)]


def test_a_job_mixes_its_datasets(make_job, tmp_path):
    names = []
    for name, count in (("a", 4), ("b", 20)):
        path = tmp_path / f"{name}.json"
        path.write_text(
            json.dumps([{"instruction": name, "output": f"{name} {n}"} for n in range(count)])
        )
        names.append(str(path))
    job = make_job(dataset=names, mix_strategy="interleave_under")
    data = prepare(job, lambda text, **facts: None)
    assert data.stats["rows"]["used"] == 8


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_text_are_shown_and_all_but_the_first_token_is_trained(make_job, tmp_path, packing):
    path = tmp_path / "a.txt"
    path.write_text("one two three\nfour five six\n")
    rows = shown_rows(make_job(dataset=str(path), stage="pt", packing=packing), 5)
    assert [(row.where, row.roles) for row in rows] == [
        (f"{path}:1", ("text",)),
        (f"{path}:2", ("text",)),
    ]
    assert [one.num_trained for one in rows] == [one.num_tokens - 1 for one in rows]
    assert not rows[0].tokens[0].is_trained
