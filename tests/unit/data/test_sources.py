"""Names of datasets, and files of every kind of goodness."""

import json
import os
import struct
import sys

import pyarrow
import pyarrow.parquet
import pytest

from raytrain_adv.data.read import sources
from raytrain_adv.data.read.entries import Entry, resolve
from raytrain_adv.errors import JobError

ROWS = [{"instruction": f"Q{i}", "output": f"A{i}\nü"} for i in range(3)]


def read(path):
    return list(sources.open_source(Entry("set", "files", str(path)), None).rows())


def entries(make_job, tmp_path, info, names):
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    data = make_job(dataset=names, dataset_dir=str(tmp_path)).data
    return resolve(data.dataset, data, "dataset")


def test_a_dataset_info_that_is_a_pipe_is_refused_and_not_waited_for(make_job, tmp_path):
    os.mkfifo(tmp_path / "dataset_info.json")
    data = make_job(dataset="x", dataset_dir=str(tmp_path)).data
    with pytest.raises(JobError, match="is not a file"):
        resolve(data.dataset, data, "dataset")


def test_jsonl_json_and_parquet_hold_the_same_rows(tmp_path, write_rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    files = [write_rows(ROWS), write_rows(ROWS, "rows.json"), tmp_path / "rows.parquet"]
    assert [[r.values for r in read(file)] for file in files] == [ROWS] * 3


def test_rows_of_a_json_array_know_their_line(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[\n {"a": 1},\n\n {"a":\n 2},{"a": 3}\n]\n')
    assert [row.where for row in read(file)] == [f"{file}:{line}" for line in (2, 4, 5)]


def test_rows_of_jsonl_know_their_line_past_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}')
    assert [row.where for row in read(file)] == [f"{file}:1", f"{file}:3"]


def test_json_file_may_hold_objects_line_by_line(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('\ufeff{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert [row.values for row in read(file)] == [{"a": 1}, {"a": 2}]


def test_folder_is_read_file_by_file_in_order_of_names(tmp_path, write_rows):
    write_rows(ROWS[1:], "b.json")
    write_rows(ROWS[:1], "a.jsonl")
    (tmp_path / "notes.txt").write_text("not data")
    assert [row.values for row in read(tmp_path)] == ROWS


def test_progress_grows_to_one(tmp_path, write_rows):
    write_rows(ROWS, "a.jsonl")
    write_rows(ROWS, "b.json")
    shares = [row.progress for row in read(tmp_path)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "line 2"),
        ("a.json", '[\n{"a": 1},\n{"a": oops}\n]', "line 3"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}\n]', "line 3: expected a comma"),
        ("a.json", '[\n{"a": 1}\n', "the array is not closed"),
        ("a.json", '[\n{"a": 1},\n', "the file ends where a row was expected"),
        ("a.json", '[{"a": 1}]\nrest', "expected a comma or the end"),
        ("a.json", "[]", "an array without rows"),
        ("a.json", "", "0 bytes"),
        ("a.json", "  \n", "the file ends"),
        ("a.csv", "a,b\n", "a line of names without rows"),
        ("a.parquet", "PAR0", "not a readable Parquet file"),
    ],
)
def test_broken_file_is_an_error_that_names_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(JobError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and caught.value.fix


def test_deeply_nested_json_is_an_error_and_no_crash(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("[" * (sys.getrecursionlimit() * 200))
    with pytest.raises(JobError, match="line 1"):
        read(file)


def test_file_in_another_encoding_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "a.json").write_bytes('[\n{"a": "ü"}]'.encode("latin-1"))
    with pytest.raises(JobError, match=r"not UTF-8 text(.|\n)*line 2: byte 0xfc"):
        read(tmp_path / "a.json")


def test_missing_file_names_the_nearest(tmp_path, write_rows, make_job):
    write_rows(ROWS, "alpaca.jsonl")
    with pytest.raises(JobError, match=r"did you mean .*alpaca\.jsonl"):
        entries(make_job, tmp_path, {}, str(tmp_path / "alpca.jsonl"))
    with pytest.raises(JobError, match=r"did you mean .*alpaca\.jsonl"):
        read(entries(make_job, tmp_path, {"x": {"file_name": "alpca.jsonl"}}, "x")[0].target)


def test_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(JobError, match="contains no dataset"):
        read(tmp_path)


def test_a_damaged_arrow_file_is_an_error_and_does_not_end_the_process(tmp_path):
    """Offsets beyond the data: reading them was a segmentation fault."""
    table = pyarrow.table({"text": ["a", "bb", "ccc"]})
    file = tmp_path / "rows.arrow"
    with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table)
    data = file.read_bytes()
    offsets = struct.pack("<4i", 0, 1, 3, 6)
    assert data.count(offsets) == 1
    file.write_bytes(data.replace(offsets, struct.pack("<4i", 0, 1, 2**30, 6)))
    with pytest.raises(JobError, match="not a readable Arrow file"):
        list(sources.read_files([file]))


@pytest.mark.parametrize("text", ["[" * 20_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_dataset_info_beyond_what_json_reads_is_an_error(tmp_path, make_job, text):
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(JobError, match="is not valid JSON"):
        resolve("a", make_job(dataset="a", dataset_dir=str(tmp_path)).data, "dataset")


def test_rows_that_a_script_makes_are_missed_with_the_command_in_the_jobs_comment(
    tmp_path, make_job
):
    job = tmp_path / "job.yaml"
    job.write_text(
        "# Rows are made by a script:\n#   python make.py made/rows.json\n"
        "#   python make.py --out made/folder\n#   python -m raytrain_adv.launch job.yaml\n"
    )
    data = make_job(dataset="x").data
    with pytest.raises(JobError) as caught:
        resolve("made/rows.json", data, "dataset", str(job))
    assert caught.value.fix.endswith(
        "comment of the job's file has it: python make.py made/rows.json"
    )
    data = make_job(dataset="x", dataset_dir="made/folder").data
    with pytest.raises(JobError, match="--out made/folder"):
        resolve("rows", data, "dataset", str(job))
    with pytest.raises(JobError, match="correct the name"):
        resolve("other/rows.json", make_job(dataset="x").data, "dataset", str(job))


def test_unknown_name_names_the_nearest_entry(tmp_path, make_job):
    with pytest.raises(JobError, match="did you mean alpaca_en"):
        entries(make_job, tmp_path, {"alpaca_en": {"file_name": "a.json"}}, "alpaca_em")


def test_names_may_be_a_comma_list_or_a_yaml_list(tmp_path, make_job):
    info = {name: {"file_name": f"{name}.json"} for name in ("a", "b")}
    for names in ("a, b", ["a", "b"]):
        found = entries(make_job, tmp_path, info, names)
        assert [e.target for e in found] == [str(tmp_path / "a.json"), str(tmp_path / "b.json")]


def test_owner_slash_name_is_a_hub_dataset_with_subset_and_split_from_an_entry(tmp_path, make_job):
    info = {"x": {"hf_hub_url": "o/n", "ms_hub_url": "p/q", "subset": "s", "split": "t"}}
    plain, named = entries(make_job, tmp_path, info, ["o/n", "x"])
    assert (plain.kind, plain.target, plain.split) == ("hub", "o/n", "train")
    assert (named.kind, named.target, named.subset, named.split) == ("hub", "o/n", "s", "t")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "a.json", "ranking": True}, "ranking cannot be honored"),
        ({"file_name": "a.json", "columns": {"images": "i"}}, "columns.images cannot be honored"),
        ({"file_name": "a.json", "columns": {"kto_tag": "k"}}, "columns.kto_tag"),
        ({"ms_hub_url": "o/n"}, "ms_hub_url cannot be honored"),
        ({"script_url": "x.py"}, "script_url cannot be honored"),
        ({"file_nam": "a.json"}, "did you mean file_name"),
        ({"file_name": "a.json", "columns": {"promt": "p"}}, "did you mean prompt"),
        ({"file_name": "a.json", "tags": {"user": "p"}}, "did you mean user_tag"),
        ({"file_name": "a.json", "formatting": "chat"}, "Unknown dataset formatting"),
        ({"file_name": "a.json", "split": "test"}, "no subsets, splits"),
        ({"file_name": "a.json", "subset": "en"}, "no subsets, splits"),
        ({"file_name": "a.json", "folder": "en"}, "no subsets, splits"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples must be a number"),
        ({"builtin": "jokes"}, "Unknown built-in"),
        ({}, "names no source"),
        ("a.json", "must be an object"),
    ],
)
def test_entry_that_cannot_be_honored_is_refused_by_key(tmp_path, make_job, entry, message):
    with pytest.raises(JobError, match=message):
        entries(make_job, tmp_path, {"x": entry}, "x")


def test_bad_entry_of_another_dataset_does_not_matter(tmp_path, make_job):
    info = {
        "x": {"file_name": "a.json"},
        "pictures": {"file_name": "p", "columns": {"images": "i"}},
    }
    assert entries(make_job, tmp_path, info, "x")[0].name == "x"


def test_broken_dataset_info_is_an_error_that_names_the_line(tmp_path, make_job):
    (tmp_path / "dataset_info.json").write_text("{\n}}")
    data = make_job(dataset="x", dataset_dir=str(tmp_path)).data
    with pytest.raises(JobError, match="line 2"):
        resolve(data.dataset, data, "dataset")


def test_hub_dataset_is_read_and_named_by_row(monkeypatch, tmp_path):
    import datasets

    def load_dataset(path, name, data_dir, split, cache_dir):
        assert (path, name, data_dir, split) == ("o/n", "s", None, "train")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(sources.hub, "why_unreachable", lambda: "")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = sources.open_source(Entry("o/n", "hub", "o/n", subset="s"), None)
    assert [row.values for row in source.rows()] == ROWS
    assert next(source.rows()).where == "o/n row 1" and source.fingerprint


def test_hub_dataset_that_cannot_be_reached_is_a_job_error(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(sources.hub, "why_unreachable", lambda: "")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        JobError, match=r"could not be loaded from the Hugging Face Hub(.|\n)*no route"
    ):
        sources.open_source(Entry("o/n", "hub", "o/n"), None)


V1 = """
chat: {path: rows.jsonl, source: local}
other: {path: o/n, converter: alpaca, size: 5}
"""
NO_V1 = ("a: 1", "a: {path: p, also: 1}", "- a", "", "a: {path: [", "a: [1]")


def test_a_dataset_file_of_v1_names_the_entries_to_write(tmp_path):
    (tmp_path / "v1.yaml").write_text(V1)
    with pytest.raises(JobError, match="v1 are not read") as error:
        read(tmp_path / "v1.yaml")
    assert '"chat": {"file_name": "rows.jsonl", "formatting": "openai"}' in str(error.value)
    other = '"other": {"hf_hub_url": "o/n", "formatting": "alpaca", "num_samples": 5}'
    assert other in str(error.value)
    assert "dataset: chat,other" in str(error.value)


def test_an_entry_of_v1_names_the_entry_to_write(tmp_path, make_job):
    info = {"x": {"path": "rows.json", "source": "local", "converter": "sharegpt"}}
    with pytest.raises(JobError, match="v1 are not read") as error:
        entries(make_job, tmp_path, info, ["x"])
    assert '{"file_name": "rows.json", "formatting": "sharegpt"}' in str(error.value)


@pytest.mark.parametrize(
    "text", ["a: 1", "a: {path: p, also: 1}", "- a", "", "a: {path: [", "a: [1]"]
)
def test_another_yaml_file_is_of_a_type_that_is_not_read(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(JobError, match="of a type that is not read"):
        read(tmp_path / "a.yaml")


def test_only_files_that_are_read_are_meant(tmp_path, make_job, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.yaml").write_text("a: 1")
    with pytest.raises(JobError) as error:
        entries(make_job, tmp_path, {}, ["row"])
    assert "rows.yaml" not in str(error.value)
