"""From a job to sequences: masks, cuts, splits, the cache, and many processes at once."""

import html
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets as hugging_face
import numpy as np
import pytest

from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.shown import shown_rows
from raytrain_adv.data.tokens import datasets, processes, tokenize
from raytrain_adv.data.tokens.templates import TEMPLATES
from raytrain_adv.data.tokens.tokenizer import load_tokenizer
from raytrain_adv.driver.commands.data import show
from raytrain_adv.errors import JobError, StorageError, TrainingError
from raytrain_adv.ops.loss import IGNORE
from tests.ranks import run_ranks
from tests.unit.data.sample_rows import pairs

CHAT = {
    "conversations": [
        {"from": "human", "value": "One?"},
        {"from": "gpt", "value": "First."},
        {"from": "human", "value": "Two?"},
        {"from": "gpt", "value": "Second."},
    ]
}


def ready(job, **options):
    said: list[str] = []
    return prepare(job, said.append, **options), said


def trained_text(job, sequence):
    """Return what the loss is taken on, runs of it joined by a bar."""
    tokenizer = load_tokenizer(job)
    parts, run = [], []
    for label in [*sequence.labels.tolist(), IGNORE]:
        if label != IGNORE:
            run.append(label)
        elif run:
            parts.append(tokenizer.decode(run))
            run = []
    return "|".join(parts)


def flat(sequences):
    return [(s.input_ids.tolist(), s.labels.tolist(), s.segments) for s in sequences]


def test_loss_is_on_every_answer_with_its_end_and_on_nothing_else(make_job, write_rows):
    job = make_job(dataset=write_rows([CHAT]))
    assert trained_text(job, ready(job)[0].train[0]) == "First.<|end|>|Second.<|end|>"


def test_mask_history_leaves_the_last_answer_only(make_job, write_rows):
    job = make_job(dataset=write_rows([CHAT]), mask_history=True)
    assert trained_text(job, ready(job)[0].train[0]) == "Second.<|end|>"


def test_train_on_prompt_takes_every_token_that_has_one_before_it(make_job, write_rows):
    job = make_job(dataset=write_rows([CHAT]), train_on_prompt=True)
    sequence = ready(job)[0].train[0]
    assert sequence.labels.tolist() == [*sequence.input_ids[1:].tolist(), IGNORE]


def test_labels_are_the_next_tokens(make_job, write_rows):
    sequence = ready(make_job(dataset=write_rows([CHAT])))[0].train[0]
    at = np.flatnonzero(sequence.labels != IGNORE)
    assert (sequence.labels[at] == sequence.input_ids[at + 1]).all()


def test_there_is_one_bos(make_job, write_rows, marked_model):
    for keys in ({}, {"model_name_or_path": marked_model, "template": "llama3"}):
        job = make_job(dataset=write_rows([CHAT]), **keys)
        ids = ready(job)[0].train[0].input_ids.tolist()
        assert ids.count(load_tokenizer(job).bos_token_id) == 1


def test_tokens_are_those_of_the_chat_template(make_job, write_rows):
    job = make_job(dataset=write_rows([CHAT]))
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[m["from"]], "content": m["value"]} for m in CHAT["conversations"]]
    expected = load_tokenizer(job).apply_chat_template(messages, return_dict=False)
    assert ready(job)[0].train[0].input_ids.tolist() == expected


def test_tokenizer_that_puts_a_space_before_texts_is_read_as_a_whole(
    make_job, write_rows, spacing_model
):
    job = make_job(
        dataset=write_rows([{"instruction": "What is it?", "output": " It is a test."}]),
        model_name_or_path=spacing_model,
        template="default",
    )
    tokenizer = load_tokenizer(job)
    assert not tokenize.joins_cleanly(tokenizer)
    sequence = ready(job)[0].train[0]
    whole = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": " It is a test."},
        ],
        return_dict=False,
    )
    assert sequence.input_ids.tolist() == whole
    assert trained_text(job, sequence).strip().startswith("It is a test.</s>")


def test_both_ways_of_tokenizing_agree_on_a_byte_level_tokenizer(make_job, write_rows, monkeypatch):
    rows = [*pairs(20), {"instruction": "Ünï 漢字 🙂", "output": "é\n\n  ok 🙂"}]
    job = make_job(dataset=write_rows(rows))
    apart = flat(ready(job, rebuild=True)[0].train)
    monkeypatch.setattr(tokenize, "joins_cleanly", lambda tokenizer: False)
    assert flat(ready(job, rebuild=True)[0].train) == apart


def test_answer_that_would_merge_with_the_prompt_begins_where_generation_begins(
    make_job, write_rows, marked_model
):
    job = make_job(
        dataset=write_rows([{"instruction": "Q", "output": "\n\nA"}]),
        model_name_or_path=marked_model,
        template="chatml",
    )
    tokenizer = load_tokenizer(job)
    data, _ = ready(job)
    prompt = data.prompts(1, tokenizer)[0]
    text = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.input_ids == tokenizer.encode(text, add_special_tokens=False)
    assert trained_text(job, data.train[0]) == "\n\nA<|im_end|>\n"


def test_unicode_survives(make_job, write_rows):
    answer = "Grüße, 漢字, 🙂, \u200f, e\u0301"
    job = make_job(dataset=write_rows([{"instruction": "Q", "output": answer}]))
    assert trained_text(job, ready(job)[0].train[0]) == answer + "<|end|>"


def test_long_row_is_cut_and_counted(make_job, write_rows):
    rows = [{"instruction": "Q", "output": "word " * 100_000}, *pairs(2)]
    data, said = ready(make_job(dataset=write_rows(rows), cutoff_len=32))
    assert data.train.lengths.max() == 32 and data.stats["rows"]["truncated"] == 1
    assert "1 row cut at cutoff_len (32)" in said


def test_long_prompt_is_shortened_and_its_answer_kept(make_job, write_rows, tiny_tokenizer):
    file = write_rows([{"instruction": "long " * 200, "output": "A short answer."}, *pairs(2)])
    data, _ = ready(make_job(dataset=file, cutoff_len=32))
    assert data.stats["rows"]["cut_examples"][0]["where"] == f"{file}:1"
    answer = data.prompts(1, tiny_tokenizer)[0].reference
    assert answer == "A short answer." and data.train.lengths.max() == 32


def test_row_without_room_for_an_answer_is_unusable_with_its_line(make_job, write_rows):
    file = write_rows([*pairs(2), {"instruction": "long " * 2000, "output": "A " * 20}])
    data, said = ready(make_job(dataset=file, cutoff_len=16))
    assert data.stats["rows"]["used"] == 2
    assert any(f"{file}:3: within cutoff_len (16) there is no room" in line for line in said)


def test_a_row_whose_answers_all_weigh_zero_is_left_out_with_that_reason(make_job, write_rows):
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First.", "loss_weight": 0},
    ]
    job = make_job(dataset=write_rows([{"messages": messages}], "a.json"))
    with pytest.raises(JobError, match="the loss_weight of each is 0"):
        prepare(job, lambda text, **facts: None)


def test_loss_weight_zero_takes_an_answer_out_of_the_loss(make_job, write_rows):
    messages = [
        {"role": "user", "content": [{"type": "text", "value": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "First."}], "loss_weight": 0.0},
        {"role": "user", "content": [{"type": "text", "value": "Two?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "Second."}], "loss_weight": 1},
    ]
    job = make_job(dataset=write_rows([{"messages": messages}]))
    assert trained_text(job, ready(job)[0].train[0]) == "Second.<|end|>"


def test_unusable_rows_are_counted_and_the_first_are_named(make_job, write_rows):
    file = write_rows([{"instruction": "Q", "output": ""}] * 9 + pairs(1))
    data, said = ready(make_job(max_unusable_share=1.0, dataset=file))
    line = next(s for s in said if "cannot be used" in s)
    assert f"9 of 10 rows cannot be used: {file}:1: no answer" in line and "and 4 more" in line
    assert data.stats["rows"]["unusable_reasons"] == {"no answer: output is empty or missing": 9}


def test_unusable_rows_are_named_again_when_the_cache_is_opened(make_job, write_rows):
    job = make_job(
        max_unusable_share=1.0, dataset=write_rows([{"instruction": "Q", "output": ""}, *pairs(1)])
    )
    assert ready(job)[1] == ready(job)[1]


def test_mostly_unusable_rows_stop_the_job_unless_allowed(make_job, write_rows):
    """A wrong column or template is the usual cause: 92 % were left out without a word."""
    rows = [{"instruction": "Say one.", "output": "One."}, *[{"instruction": "x"}] * 9]
    file = write_rows(rows)
    with pytest.raises(JobError, match="90% of the rows of dataset cannot be trained on") as caught:
        prepare(make_job(dataset=file), print)
    assert "9 x no answer" in caught.value.found
    assert "max_unusable_share: 0.9" in caught.value.fix
    said = []
    prepare(make_job(dataset=file, max_unusable_share=0.9), said.append)
    assert any(
        "read as alpaca, columns instruction (as prompt), output (as response)" in s for s in said
    )


def test_dataset_without_a_usable_row_is_an_error(make_job, write_rows):
    job = make_job(dataset=write_rows([{"instruction": "Q", "output": ""}]))
    with pytest.raises(JobError, match=r"No row of .* can be trained on"):
        prepare(job, print)


def test_datasets_follow_each_other_and_max_samples_holds_for_each(make_job, write_rows):
    first, second = write_rows(pairs(5)), write_rows([CHAT] * 5, "chat.json")
    data, _ = ready(make_job(dataset=[first, second], max_samples=2))
    assert len(data.train) == 4 and data.stats["rows"]["read"] == 4


def test_columns_that_only_late_rows_have_are_read(make_job, write_rows):
    """The layout is derived from the first 100 rows: system messages of later ones were lost."""
    file = write_rows([CHAT] * 120 + [{**CHAT, "system": "Be brief."}])
    train = ready(make_job(dataset=file))[0].train
    assert len({len(ids) for ids, *_ in flat(train)}) == 2


@pytest.mark.parametrize("max_samples", [None, 10])
def test_a_named_column_that_only_late_rows_have_is_there(
    make_job, write_rows, tmp_path, max_samples
):
    write_rows([CHAT] * 120 + [{**CHAT, "system": "Be brief."}], "chat.jsonl")
    columns = {"messages": "conversations", "system": "system"}
    info = {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": columns}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"late": info, "never": {**info, "columns": {**columns, "tools": "tool"}}})
    )
    keys = {"dataset_dir": str(tmp_path), "max_samples": max_samples}
    assert len(ready(make_job(dataset="late", **keys))[0].train) == (max_samples or 121)
    with pytest.raises(JobError, match=r"missing: tool; columns found: conversations, system"):
        ready(make_job(dataset="never", **keys))


def test_num_samples_draws_rows_and_repeats_them_where_there_are_too_few(
    make_job, write_rows, tmp_path
):
    write_rows(pairs(5), "five.jsonl")
    info = {n: {"file_name": "five.jsonl", "num_samples": k} for n, k in (("few", 3), ("many", 12))}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    few = ready(make_job(dataset="few", dataset_dir=str(tmp_path)))[0].train
    many = ready(make_job(dataset="many", dataset_dir=str(tmp_path)))[0].train
    counts = [flat(many).count(row) for row in flat(few)]
    assert len(few) == 3 and len(many) == 12 and set(counts) <= {2, 3}


@pytest.mark.parametrize(("val_size", "held"), [(3, 3), (0.25, 5), (1.0, 1)])
def test_val_size_is_a_number_or_a_share(make_job, write_rows, val_size, held):
    data, _ = ready(make_job(dataset=write_rows(pairs(20)), val_size=val_size))
    assert data.eval is not None and (len(data.eval), len(data.train)) == (held, 20 - held)


def test_held_out_rows_depend_on_the_seed_alone_and_are_not_trained_on(make_job, write_rows):
    rows = [{"instruction": f"Q{i}", "output": f"A{i}"} for i in range(30)]
    file = write_rows(rows)
    one = ready(make_job(dataset=file, val_size=5, seed=1))[0]
    packed = ready(make_job(dataset=file, val_size=5, seed=1, packing=True))[0]
    other = ready(make_job(dataset=file, val_size=5, seed=2))[0]
    held = {tuple(s.input_ids.tolist()) for s in one.eval}
    assert not held & {tuple(s.input_ids.tolist()) for s in one.train}
    assert sum(packed.eval.lengths) == sum(one.eval.lengths)
    assert held != {tuple(s.input_ids.tolist()) for s in other.eval}


@pytest.mark.parametrize("val_size", [20, 21, 0.99, 0.001])
def test_val_size_that_leaves_nothing_is_refused(make_job, write_rows, val_size):
    with pytest.raises(JobError, match="val_size leaves no rows"):
        prepare(make_job(dataset=write_rows(pairs(20)), val_size=val_size), print)


def test_eval_dataset_is_the_held_out_set(make_job, write_rows):
    job = make_job(dataset=write_rows(pairs(4)), eval_dataset=write_rows([CHAT], "e.jsonl"))
    data, _ = ready(job)
    assert len(data.train) == 4 and trained_text(job, data.eval[0]).startswith("First.")
    assert data.stats["eval_rows"]["read"] == 1


def test_one_row_is_enough(make_job, write_rows):
    data, _ = ready(make_job(dataset=write_rows(pairs(1)), neat_packing=True))
    assert len(data.train) == 1 and data.stats["train"]["lengths"]["max"] == data.train.lengths[0]


def test_labels_never_cross_the_border_of_packed_conversations(make_job, write_rows):
    rows = [{"instruction": "Q", "output": "A"}] * 8
    data, _ = ready(make_job(dataset=write_rows(rows), packing=True, train_on_prompt=True))
    assert len(data.train) == 1 and len(data.train[0].segments) == 8
    lasts = np.cumsum(data.train[0].segments) - 1
    assert (data.train[0].labels[lasts] == IGNORE).all()
    assert (data.train[0].labels == IGNORE).sum() == 8


def test_packed_and_unpacked_hold_the_same_tokens_and_labels(make_job, write_rows):
    file = write_rows(pairs(40))
    plain, packed = (ready(make_job(dataset=file, packing=p))[0].train for p in (False, True))
    assert len(packed) < len(plain)
    assert plain.label_counts.sum() == packed.label_counts.sum()
    assert sum((s.labels != IGNORE).sum() for s in packed) == packed.label_counts.sum()


def test_stats_are_json_and_add_up(make_job, write_rows):
    data, _ = ready(make_job(dataset=write_rows(pairs(40)), val_size=5, neat_packing=True))
    stats = json.loads(json.dumps(data.stats))
    assert stats["train"]["rows"] + stats["eval"]["rows"] == stats["rows"]["used"] == 40
    assert stats["train"]["tokens"] == data.train.lengths.sum()
    assert sum(stats["train"]["histogram"]["counts"]) == stats["train"]["rows"]
    assert 0 < stats["train"]["packing_efficiency"] <= 1
    assert Path(stats["cache_path"]).is_dir()


def test_prompts_are_held_out_questions_up_to_the_answer(make_job, write_rows):
    rows = [{"instruction": f"Q{i}", "output": f"A{i}"} for i in range(12)]
    job = make_job(dataset=write_rows(rows), val_size=4)
    tokenizer, data = load_tokenizer(job), ready(job)[0]
    prompts = data.prompts(3, tokenizer)
    assert len(prompts) == 3 and data.prompts(0, tokenizer) == []
    for ids, text, reference in prompts:
        asked = [{"role": "user", "content": text}]
        expected = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False
        )
        assert ids == expected and reference == text.replace("Q", "A")


def count_builds(monkeypatch):
    calls = []
    original = datasets.TokenizedDatasets.build
    monkeypatch.setattr(
        datasets.TokenizedDatasets,
        "build",
        lambda self, writer: calls.append(1) or original(self, writer),
    )
    return calls


def test_second_call_opens_the_cache(make_job, write_rows, monkeypatch):
    calls = count_builds(monkeypatch)
    job = make_job(dataset=write_rows(pairs(30)))
    assert flat(ready(job)[0].train) == flat(ready(job)[0].train) and len(calls) == 1


def test_cache_does_not_depend_on_where_the_file_lies_nor_on_packing_split_or_processes(
    make_job, write_rows, monkeypatch, tmp_path
):
    calls = count_builds(monkeypatch)
    file = write_rows(pairs(30))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(file).read_bytes())
    ready(make_job(dataset=file))
    ready(make_job(dataset=str(moved), preprocessing_num_workers=7))
    ready(make_job(dataset=file, packing=True, val_size=3, seed=9, ray_num_workers=4))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "keys",
    [{"cutoff_len": 64}, {"train_on_prompt": True}, {"default_system": "S"}, {"max_samples": 3}],
)
def test_cache_depends_on_the_keys_that_change_tokens(make_job, write_rows, monkeypatch, keys):
    calls = count_builds(monkeypatch)
    file = write_rows(pairs(30))
    ready(make_job(dataset=file))
    ready(make_job(dataset=file, **keys))
    assert len(calls) == 2


def test_a_template_that_another_version_writes_otherwise_is_tokenized_again(
    make_job, write_rows, monkeypatch
):
    calls = count_builds(monkeypatch)
    job = make_job(dataset=write_rows(pairs(30)), template="alpaca")
    ready(job)
    monkeypatch.setitem(TEMPLATES["alpaca"].values, "opening", "### Answer:\n")
    ready(job)
    assert len(calls) == 2


def test_changed_contents_are_tokenized_again(make_job, write_rows, monkeypatch):
    calls = count_builds(monkeypatch)
    before = ready(make_job(dataset=write_rows(pairs(30))))[0]
    after = ready(make_job(dataset=write_rows(pairs(29))))[0]
    assert len(calls) == 2 and (len(before.train), len(after.train)) == (30, 29)


def test_overwrite_cache_tokenizes_again_except_where_the_driver_did(
    make_job, write_rows, monkeypatch
):
    calls = count_builds(monkeypatch)
    job = make_job(dataset=write_rows(pairs(30)), overwrite_cache=True)
    ready(job), ready(job), ready(job, rebuild=False)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "meta", "remove"])
def test_damaged_cache_is_built_again(make_job, write_rows, monkeypatch, damage):
    calls = count_builds(monkeypatch)
    job = make_job(dataset=write_rows(pairs(30)))
    whole = ready(job)[0]
    expected, folder = flat(whole.train), Path(whole.stats["cache_path"])
    ids = folder / "ids.bin"
    if damage == "truncate":
        os.truncate(ids, 40)
    elif damage == "flip":
        content = bytearray(ids.read_bytes())
        content[8] ^= 1
        ids.write_bytes(content)
    elif damage == "meta":
        (folder / "meta.json").write_text('{"version": 1, "cr')
    else:
        ids.unlink()
    again, said = ready(job)
    assert flat(again.train) == expected and len(calls) == 2
    assert any("is damaged; it is built again" in line for line in said)


def test_failure_while_building_leaves_nothing_behind(make_job, write_rows, tmp_path):
    job = make_job(dataset=write_rows([*pairs(3), {"instruction": "Q", "output": "A"}]))
    with open(tmp_path / "rows.jsonl", "a") as opened:
        opened.write("{broken\n")
    with pytest.raises(JobError, match="line 5"):
        prepare(job, print)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def run_python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_full_disk_is_a_storage_error_and_leaves_nothing_behind(tmp_path):
    """A limit on the size of files makes the kernel refuse to write more, as a full disk does."""
    code = f"""
import pathlib, resource, signal
import numpy as np
from raytrain_adv.errors import StorageError
from raytrain_adv.data.tokens import cache
from raytrain_adv.data.tokens.tokenize import Chunk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
root = pathlib.Path({str(tmp_path)!r})
def build(writer):
    for _ in range(10):
        ids = np.zeros(10_000, np.int32)
        writer.append(Chunk(ids, ids > 0, np.array([10_000]), np.zeros(1, np.int32)))
    return {{}}
try:
    cache.open_or_build(root, "key", build, False, print)
except StorageError as error:
    print(error)
"""
    output = run_python(code).communicate(timeout=600)[0]
    assert "Tokenized data could not be written" in output and "File too large" in output
    assert "set tokenized_path" in output
    assert [p.name for p in tmp_path.iterdir()] in ([], ["key.lock"])


def test_cache_folder_that_cannot_be_made_is_a_storage_error(make_job, write_rows, tmp_path):
    (tmp_path / "file").write_text("")
    job = make_job(dataset=write_rows(pairs(3)), tokenized_path=str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="set tokenized_path"):
        prepare(job, print)


def num_rows(job, log):
    """Prepare a job's data slowly; return how many rows it has."""
    original = datasets.TokenizedDatasets.build

    def build(self, writer):
        with log.open("a") as opened:
            opened.write("built\n")
        time.sleep(2)
        return original(self, writer)

    datasets.TokenizedDatasets.build = build
    return len(prepare(job, print).train)


def test_processes_that_start_together_tokenize_once(make_job, write_rows, tmp_path):
    job, log = make_job(dataset=write_rows(pairs(3000))), tmp_path / "log"
    assert run_ranks(num_rows, 2, tmp_path, job, log) == [3000, 3000]
    assert log.read_text() == "built\n"


def test_threads_that_start_together_tokenize_once(make_job, write_rows, monkeypatch):
    calls = count_builds(monkeypatch)
    job, sizes = make_job(dataset=write_rows(pairs(300))), []
    threads = [
        threading.Thread(target=lambda: sizes.append(len(ready(job)[0].train))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [300] * 3 and len(calls) == 1


def test_tokenizing_in_processes_gives_the_same_bytes_without_torch(
    make_job, write_rows, monkeypatch, tmp_path
):
    """Importing PyTorch takes each of them longer than most datasets."""
    monkeypatch.setattr(datasets, "CHUNK", 20)
    monkeypatch.setattr(datasets, "ENOUGH_FOR_PROCESSES", 100)
    ask, loaded = processes._ask, []

    def noted(child, task):
        answer = ask(child, task)
        loaded.append(Path(f"/proc/{child.pid}/maps").read_text())
        return answer

    monkeypatch.setattr(processes, "_ask", noted)
    file = write_rows([*pairs(110), {"instruction": "Q", "output": ""}])
    stores = []
    for workers in (1, 2):
        cache = str(tmp_path / f"cache{workers}")
        job = make_job(dataset=file, preprocessing_num_workers=workers, tokenized_path=cache)
        folder = Path(ready(job)[0].stats["cache_path"])
        stores.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert stores[0] == stores[1]
    assert loaded and all("tokenizers" in one and "libtorch" not in one for one in loaded)


def test_error_in_a_tokenizing_process_reaches_the_user(make_job, write_rows, monkeypatch):
    monkeypatch.setattr(datasets, "CHUNK", 20)
    monkeypatch.setattr(datasets, "ENOUGH_FOR_PROCESSES", 100)
    file = write_rows(pairs(110))
    with open(file, "a") as opened:
        opened.write("{broken\n")
    with pytest.raises(JobError, match="line 111"):
        prepare(make_job(dataset=file, preprocessing_num_workers=2), print)


@pytest.mark.parametrize("killed", ["at its start", "at work"])
def test_a_killed_tokenizing_process_is_not_called_a_full_disk(
    make_job, write_rows, monkeypatch, killed
):
    monkeypatch.setattr(datasets, "CHUNK", 20)
    monkeypatch.setattr(datasets, "ENOUGH_FOR_PROCESSES", 100)
    popen, start = subprocess.Popen, processes._start

    def kill(child):
        child.kill()
        child.wait()
        return child

    if killed == "at its start":
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: kill(popen(*a, **k)))
    else:
        monkeypatch.setattr(processes, "_start", lambda opening: kill(start(opening)))
    job = make_job(dataset=write_rows(pairs(110)), preprocessing_num_workers=2)
    with pytest.raises(TrainingError, match="process that tokenizes ended") as caught:
        prepare(job, print)
    assert "exit code -9" in caught.value.found


@pytest.mark.parametrize("written", ["nothing", "half of what it is told first"])
def test_a_tokenizing_process_ends_in_silence_once_its_driver_was_killed(monkeypatch, written):
    """Its traceback would be the last thing on the console of a run that was killed."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: popen(*a, **{**k, "stderr": subprocess.PIPE})
    )
    opening = pickle.dumps(["a tokenizer"] * 1000)
    child = processes._start(opening[: 0 if written == "nothing" else len(opening) // 2])
    _, errors = child.communicate()
    assert child.returncode == 0 and errors.decode() == ""


def save(folder, **parts):
    """Save tokenized rows as LLaMA-Factory does: one dataset, or several by name."""
    made = {
        name: hugging_face.Dataset.from_list(
            [
                {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, **more}
                for ids, labels, *rest in rows
                for more in ([rest[0]] if rest else [{}])
            ]
        )
        for name, rows in parts.items()
    }
    whole = made[""] if "" in made else hugging_face.DatasetDict(made)
    whole.save_to_disk(folder)
    return str(folder)


TRAINED = ([5, 6, 7, 8], [-100, -100, 7, 8])
TWO_TURNS = ([5, 6, 7, 8, 9], [-100, 6, -100, -100, 9])


def test_rows_that_llama_factory_saved_are_trained_as_they_are(make_job, tmp_path):
    folder = save(tmp_path / "saved", train=[TRAINED, TWO_TURNS], validation=[TRAINED])
    printed = []
    data = prepare(make_job(dataset="none", tokenized_path=folder), printed.append)
    rows = [(s.input_ids.tolist(), s.labels.tolist()) for s in data.train]
    # Each label is that of the next token.
    assert sorted(rows) == sorted((i, [*k[1:], IGNORE]) for i, k in (TRAINED, TWO_TURNS))
    assert len(data.eval) == 1
    assert "dataset is not read" in printed[0]
    assert not list((tmp_path / "saved").glob("*.npy"))


def test_one_saved_dataset_is_trained_and_its_rows_can_be_held_out(make_job, tmp_path):
    folder = save(tmp_path / "saved", **{"": [TRAINED] * 4})
    data = prepare(make_job(dataset="none", tokenized_path=folder, val_size=1), print)
    assert len(data.train) == 3 and len(data.eval) == 1


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"validation": [TRAINED]}, "no part to train on"),
        ({"train": [([5, 6], [-100, 7])]}, "its labels are not its tokens"),
        ({"train": [([5, 6], [-100, -100])]}, "it has no label"),
        ({"train": [([5] * 200, [5] * 200)]}, "200 tokens, and cutoff_len is 128"),
        ({"train": [(*TRAINED, {"position_ids": [0, 1, 0, 1]})]}, "its rows are packed"),
    ],
)
def test_saved_rows_that_cannot_be_trained_are_refused_by_name(make_job, tmp_path, parts, words):
    folder = save(tmp_path / "saved", **parts)
    with pytest.raises(JobError) as caught:
        prepare(make_job(dataset="none", tokenized_path=folder), print)
    assert words in str(caught.value)


def test_data_command_shows_rows_and_what_is_trained(make_job, write_rows, tmp_path, capsys):
    job = make_job(dataset=write_rows([CHAT, {"conversations": []}]))
    show(job, 2, tmp_path / "rows.html")
    printed = capsys.readouterr().out
    assert "1 of 2 rows are left out" in printed and "First.<|end|>" in printed
    page = (tmp_path / "rows.html").read_text()
    trained = re.findall(r'<span class="trained[^>]*>([^<]*)</span>', page)
    assert html.unescape("".join(trained)) == "coloredFirst.<|end|>Second.<|end|>"
    row = shown_rows(job, 1)[0]
    assert "".join(token.text for token in row.tokens) == trained_on(job)


def trained_on(job):
    tokenizer = load_tokenizer(job)
    return tokenizer.decode(ready(job)[0].train.rows.tokens(0))
