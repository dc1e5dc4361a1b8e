import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs as pafs
import pytest

from raytrain_adv.cli import main
from raytrain_adv.config import JobConfig
from raytrain_adv.driver.output.output_dir import (
    Output,
    decided,
    held,
    is_held,
    open_output,
    record_of,
)
from raytrain_adv.driver.output.replaced import storage_below
from raytrain_adv.driver.training.failures import take_restart_reason, write_restart_reason
from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.storage.storage import Storage


def start(job: JobConfig) -> Output:
    """Start a run that gets as far as to log a step."""
    output = open_output(job)
    (output.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    return output


def test_a_second_start_of_the_same_job_is_refused_and_names_the_next_step(make_job):
    job = make_job()
    start(job)
    with pytest.raises(JobError, match="resume_from_checkpoint: true"):
        open_output(job)


def test_another_job_in_the_folder_is_refused_naming_the_keys(make_job):
    start(make_job())
    with pytest.raises(JobError, match=r"learning_rate: 0\.01 then, 0\.02 now"):
        open_output(make_job(learning_rate=0.02))


def test_a_continuation_with_other_settings_is_refused(make_job):
    start(make_job())
    with pytest.raises(JobError, match="learning_rate"):
        open_output(make_job(learning_rate=0.02, resume_from_checkpoint=True))


def test_settings_that_change_no_result_may_differ_in_a_continuation(make_job):
    open_output(make_job())
    again = open_output(make_job(logging_steps=3, resume_from_checkpoint=True))
    assert again.attempt.endswith("_002")


def test_a_finished_job_is_not_run_again_by_resuming(make_job):
    job = make_job()
    open_output(job).note(job, "done", 1)
    assert open_output(make_job(resume_from_checkpoint=True)).finished


def test_a_lost_run_file_does_not_bring_an_attempts_name_back(make_job):
    """Ray's snapshot of it names checkpoints that save_total_limit has deleted since: its
    controller died as it started (ray 2.60).
    """
    output = open_output(make_job())
    output.storage.folder(output.attempt, "step_00000003").make()
    (output.folder / "run.json").unlink()
    assert open_output(make_job(resume_from_checkpoint=True)).attempt.endswith("_002")


def test_a_run_file_that_is_not_one_is_refused_with_the_command_that_mends_it(make_job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"status": "running"}')
    with pytest.raises(JobError, match=r"doctor .* --fix"):
        open_output(make_job())


@pytest.fixture
def old(make_job):
    """Leave a finished run with a model, a checkpoint and pinned kernels; return its folder."""
    output = start(make_job())
    output.note(make_job(), "done", 1)
    kernel = output.folder / "kernels" / "old-123"
    for folder in (
        output.folder / "model",
        output.folder / "model-quantized",
        output.folder / "checkpoints/out_001/step_1",
        kernel,
    ):
        folder.mkdir(parents=True)
        (folder / "file").write_text("old")
    (output.folder / "kernels.lock.json").write_text("old-123")
    (output.folder / "my-notes.txt").write_text("mine")
    return output.folder


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


ROWS = {"metrics.jsonl": b'{"kind": "train", "step": 1, "loss": 2.0}\n'}
OVERWRITES = {"overwrite_output_dir": True}
DELETES = {"overwrite_output_dir": True, "delete_previous_run": True}


def test_a_run_is_deleted_by_a_key_that_says_so_and_nothing_else_is(make_job, old):
    job = make_job(**DELETES, learning_rate=0.02)
    output, said = open_output(job), []
    assert output.attempt == "out_001"
    (old / "kernels" / "new-456").mkdir()
    (old / "kernels.lock.json").write_text("new-456")  # as the driver pins them for the plan
    output.begin(job, said.append)
    assert set(contents(old)) == {"run.json", "kernels.lock.json", "my-notes.txt"}
    assert [path.name for path in (old / "kernels").iterdir()] == ["new-456"]
    assert open_output(make_job(learning_rate=0.02)).number == 2
    (sentence,) = said
    for name in ("model", "checkpoints", "metrics.jsonl", "run.json"):
        assert name in sentence


def below(folder, contents):
    return {f"{folder}/{name}": data for name, data in contents.items()}


def test_an_overwritten_run_is_kept_whole_with_its_kernels(make_job, old):
    """The same command twice took checkpoints, model and report of the run before."""
    before, said = contents(old), []
    del before["my-notes.txt"], before["run.json"]
    for number, rate in ((1, 0.02), (2, 0.03)):
        job = make_job(**OVERWRITES, learning_rate=rate)
        output = open_output(job)
        assert output.attempt == "out_001"
        (old / "kernels" / "new-456").mkdir(parents=True, exist_ok=True)
        (old / "kernels.lock.json").write_text("new-456")  # as the driver pins them for the plan
        output.begin(job, said.append)
        kept = contents(old / "previous" / str(number))
        assert kept.pop("run.json")
        assert kept == (before if number == 1 else ROWS | {"kernels.lock.json": b"new-456"})
        (old / "metrics.jsonl").write_bytes(ROWS["metrics.jsonl"])
    assert below("previous/1", before).items() <= contents(old).items()
    assert (old / "my-notes.txt").read_text() == "mine"
    assert f"moved the earlier run in {old} to {old}/previous/1: model" in said[0]


@pytest.mark.parametrize("name", ["model-base", "model-quantized"])
def test_a_kept_adapter_belongs_to_the_base_that_is_kept_with_it(make_job, old, name):
    """model-base stayed where the next run replaced it, and adapters were loaded on that one."""
    (old / name).mkdir(exist_ok=True)
    (old / name / "config.json").write_text("{}")
    adapter = {"base_model_name_or_path": str((old / name).resolve()), "r": 8}
    (old / "model" / "adapter_config.json").write_text(json.dumps(adapter))
    open_output(make_job(**OVERWRITES)).begin(make_job(), print)
    kept = old / "previous" / "1"
    found = json.loads((kept / "model" / "adapter_config.json").read_text())
    assert found == {"base_model_name_or_path": str(kept / name), "r": 8}
    assert (kept / name / "config.json").is_file() and not (old / name).exists()


def test_the_base_of_an_adapter_elsewhere_is_left_as_it_is(make_job, old, tmp_path):
    adapter = {"base_model_name_or_path": str(tmp_path / "llama")}
    (old / "model" / "adapter_config.json").write_text(json.dumps(adapter))
    open_output(make_job(**OVERWRITES)).begin(make_job(), print)
    kept = old / "previous" / "1" / "model" / "adapter_config.json"
    assert json.loads(kept.read_text()) == adapter


def test_kernels_of_both_runs_are_in_both(make_job, old):
    output = open_output(make_job(**OVERWRITES))
    (old / "kernels.lock.json").write_text("old-123 new-456")
    output.begin(make_job(**OVERWRITES), print)
    assert (old / "kernels/old-123/file").is_file()
    assert (old / "previous/1/kernels/old-123/file").is_file()


def test_a_kept_run_can_be_continued_in_its_place(make_job, tmp_path):
    for keys in ({}, {"ray_storage_path": str(tmp_path / "store")}):
        folder = tmp_path / f"out{len(keys)}"
        job = make_job(**keys, output_dir=str(folder))
        first = start(job)
        first.storage.folder(first.attempt, "step_00000003").make()
        new = make_job(**keys, output_dir=str(folder), **OVERWRITES, learning_rate=0.02)
        open_output(new).begin(new, print)
        kept = Storage.at(str(folder / "previous/1")).read_json("run.json")["job"]
        again = make_job(
            output_dir=str(folder / "previous/1"),
            resume_from_checkpoint=True,
            ray_storage_path=kept["ray_storage_path"],
            ray_run_name=kept["ray_run_name"],
        )
        found = open_output(again)
        assert found.number == 2 and found.resume is True
        assert found.storage.folder(first.attempt).folders() == ["step_00000003"]
        assert open_output(new).number == 2


@pytest.fixture
def unfinished(make_job):
    """Leave a stopped run with a complete checkpoint of step 3; return its folder."""
    output = start(make_job())
    output.note(make_job(), "stopped", 1)
    return output.folder


@pytest.fixture
def step_3(monkeypatch):
    found = SimpleNamespace(progress=SimpleNamespace(step=3), optimizer=True)
    monkeypatch.setattr("raytrain_adv.checkpoint.folders.newest", lambda storage: found)
    return found


def test_an_unfinished_run_of_the_same_job_continues(make_job, unfinished, step_3):
    output = open_output(make_job(**OVERWRITES))
    assert output.resume is True and not output.replaced.is_there and output.number == 2
    assert "continues from step 3" in output.remark


def test_what_errors_advise_continues_it_too(make_job, unfinished, step_3):
    """Run again with resume_from_checkpoint: true, also where the job overwrites."""
    output = open_output(make_job(**OVERWRITES, resume_from_checkpoint=True))
    assert output.resume is True and not output.replaced.is_there and output.number == 2


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"resume_from_checkpoint": False}, True),
        ({"learning_rate": 0.02}, True),
        ({"delete_previous_run": True}, False),
    ],
)
def test_it_is_started_again_by_a_key_that_says_so(make_job, unfinished, step_3, changed, kept):
    job = make_job(**OVERWRITES, **changed)
    output = open_output(job)
    assert output.resume is False and output.replaced.is_there
    output.begin(job, print)
    assert (unfinished / "previous/1/metrics.jsonl").exists() is kept


def test_without_optimizer_states_there_is_nothing_to_continue(make_job, unfinished, step_3):
    step_3.optimizer = False
    assert open_output(make_job(**OVERWRITES)).resume is False


def test_only_what_a_run_owns_is_deleted(make_job, old):
    (old / "run.json").unlink()
    before = contents(old)
    with pytest.raises(JobError, match="deletes only what a run of this package has written"):
        open_output(make_job(**DELETES))
    assert contents(old) == before
    job = make_job(**OVERWRITES)
    open_output(job).begin(job, print)
    assert (old / "previous/1/model/file").is_file()


@pytest.mark.parametrize("ends", ["is refused", "is killed"])
@pytest.mark.parametrize("replaces", [OVERWRITES, DELETES])
def test_a_launch_that_does_not_begin_replaces_nothing(make_job, old, ends, replaces):
    """Refused by preflight or its plan, it had deleted the run before without a word."""
    before = contents(old)
    output = open_output(make_job(**replaces, learning_rate=0.02))
    assert output.replaced.is_there
    (old / "kernels.lock.json").write_text("new-456")
    if ends == "is refused":
        assert str(old) in output.replaced.keep()
    else:
        open_output(make_job(resume_from_checkpoint=True))
    assert contents(old) == before


def test_checkpoints_kept_elsewhere_are_deleted_too_and_named(make_job, tmp_path):
    keys = {"ray_storage_path": str(tmp_path / "elsewhere")}
    start(make_job(**keys)).storage.folder("out_001", "step_1").make()
    job, said = make_job(**keys, **DELETES), []
    open_output(job).begin(job, said.append)
    assert [path.name for path in (tmp_path / "elsewhere" / "out").iterdir()] == ["owner.json"]
    assert str(tmp_path / "elsewhere" / "out") in said[0]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model_name_or_path", "model"),
        ("kernels_lock", "kernels.lock.json"),
        ("compare_with", ""),
        ("resume_from_checkpoint", "checkpoints/out_001/step_1"),
    ],
)
def test_what_the_new_run_reads_is_not_deleted(make_job, old, key, name):
    (old / "report.json").write_text("{}")
    before = contents(old)
    extra = {"use_kernels": True, "kernel_name": "a/b"} if key == "kernels_lock" else {}
    with pytest.raises(JobError, match=f"{key}"):
        open_output(make_job(overwrite_output_dir=True, **{key: str(old / name)}, **extra))
    assert contents(old) == before


def test_checkpoints_of_another_output_dir_are_neither_used_nor_deleted(make_job, tmp_path):
    """Runs are kept by the last part of output_dir: two of them had one place."""
    keys = {"ray_storage_path": str(tmp_path / "store")}
    first = open_output(make_job(**keys, output_dir=str(tmp_path / "a" / "sft")))
    first.storage.folder(first.attempt, "step_00000003").make()
    for overwrites in (False, True):
        other = make_job(
            **keys, output_dir=str(tmp_path / "b" / "sft"), overwrite_output_dir=overwrites
        )
        with pytest.raises(JobError, match="another run of this name") as refused:
            open_output(other)
        assert str(tmp_path / "a" / "sft") in refused.value.found
    assert first.storage.folders() == ["sft_001"]
    own = make_job(**keys, output_dir=str(tmp_path / "b" / "sft"), ray_run_name="other")
    assert open_output(own).attempt == "other_001"


def test_a_checkpoint_named_by_a_uri_is_not_deleted_either(make_job, tmp_path):
    keys = {"ray_storage_path": str(tmp_path / "store")}
    storage = start(make_job(**keys)).storage.folder("out_001", "step_1")
    storage.make()
    resume = {"overwrite_output_dir": True, "resume_from_checkpoint": f"file://{storage.root}"}
    with pytest.raises(JobError, match="resume_from_checkpoint names what"):
        open_output(make_job(**keys, **resume))
    assert Path(storage.root).is_dir()


def test_a_runs_name_goes_into_the_path_of_a_uri():
    uri = "s3://bucket/runs/?region=us-east-1&endpoint_override=minio:9000"
    found = storage_below(Path("out"), uri, "sft")
    assert found == "s3://bucket/runs/sft?region=us-east-1&endpoint_override=minio:9000"
    assert storage_below(Path("out"), "s3://bucket", "sft") == "s3://bucket/sft"


@pytest.mark.parametrize("name", [".", "..", "a/b", "../x", " "])
def test_a_run_name_that_is_no_folder_of_its_own_is_refused(make_job, name):
    """overwrite_output_dir deletes the folder of that name below ray_storage_path."""
    with pytest.raises(JobError, match="ray_run_name"):
        make_job(ray_run_name=name)


def test_a_run_in_this_folder_has_the_folders_name(make_job, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert make_job(output_dir=".").run_name == "mine"


@pytest.mark.parametrize("name", ["saves_é", "测试", "тест"])
def test_an_attempt_has_an_ascii_name_for_ray(make_job, tmp_path, name):
    """Ray Train uses it as a tag of its metrics, and failed on anything but ASCII after minutes."""
    job = make_job(output_dir=str(tmp_path / name))
    assert job.run_name == name
    attempt = open_output(job).attempt
    assert attempt.isascii() and attempt.endswith("_001")


def test_a_deletion_that_fails_is_not_called_keeping(make_job, old, monkeypatch):
    output = open_output(make_job(**DELETES))
    monkeypatch.setattr("shutil.rmtree", lambda path, **kwargs: None)
    with pytest.raises(StorageError, match="delete_previous_run could not be followed"):
        output.begin(make_job(), print)
    assert not output.replaced.is_there


def test_a_single_run_does_not_move_into_a_sweeps_folder(make_job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    for overwrites in (False, True):
        with pytest.raises(JobError, match="holds a sweep"):
            open_output(make_job(overwrite_output_dir=overwrites))


def test_what_a_twins_main_job_is_refused_for_is_found_without_changing_anything(make_job, old):
    before = contents(old)
    with pytest.raises(JobError, match="learning_rate"):
        decided(make_job(learning_rate=0.02))
    decided(make_job(learning_rate=0.02, overwrite_output_dir=True))
    assert contents(old) == before


def test_a_first_launch_that_would_overwrite_leaves_the_report_of_its_refusal(make_job, tmp_path):
    output = open_output(make_job(overwrite_output_dir=True))
    assert not output.replaced.is_there
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_folder_with_someone_elses_model_is_refused(make_job, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    with pytest.raises(JobError, match="would overwrite"):
        open_output(make_job())


@pytest.mark.parametrize("changed", [{}, {"overwrite_output_dir": True}])
@pytest.mark.parametrize("name", ["model", "model/lora/sft", "checkpoints"])
def test_a_run_is_not_moved_by_one_in_the_folder_above(make_job, tmp_path, name, changed):
    """overwrite_output_dir took a run in saves/model for the model of one in saves."""
    output = start(make_job(output_dir=str(tmp_path / "saves" / name)))
    before = contents(output.folder)
    with pytest.raises(JobError, match="has another run where") as caught:
        open_output(make_job(output_dir=str(tmp_path / "saves"), **changed))
    assert str(output.folder) in caught.value.found
    assert contents(output.folder) == before


@pytest.mark.parametrize("name", ["model", "model/mine", "previous", "previous/1/model"])
def test_a_run_does_not_move_into_a_folder_that_another_run_writes(make_job, old, name):
    output = open_output(make_job(overwrite_output_dir=True, learning_rate=0.02))
    output.begin(make_job(), print)
    with pytest.raises(JobError, match="which is of another run"):
        open_output(make_job(output_dir=str(old / name), overwrite_output_dir=True))


def test_a_run_that_trained_nothing_is_not_in_the_way(make_job):
    """After a mistake that shows before the first step, the mended job starts as it is."""
    open_output(make_job()).note(make_job(), "failed", 1)
    assert open_output(make_job(learning_rate=0.02)).attempt.endswith("_002")


def test_a_folder_in_rays_copy_of_the_working_directory_is_refused(tmp_path):
    """Ray deletes what a submitted job leaves there."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "saves"
    with pytest.raises(JobError, match="absolute path"), held(folder):
        pass


def test_two_drivers_cannot_hold_one_folder(tmp_path):
    with held(tmp_path), pytest.raises(JobError, match="right now"), held(tmp_path):
        pass


def test_a_finished_job_that_is_started_again_reports_that_nothing_is_left_to_train(make_job):
    """It was told to go on from its last checkpoint, which trains nothing."""
    open_output(make_job()).note(make_job(), "done", 1)
    with pytest.raises(JobError, match="has run to its end") as refused:
        open_output(make_job())
    assert "nothing is left to train" in refused.value.found
    assert "resume_from_checkpoint" not in refused.value.fix


def test_word_for_the_next_start_holds_no_secret(tmp_path, monkeypatch):
    """An error that repeats a token goes into the checkpoints' storage, and to the console."""
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    storage = Storage.at(str(tmp_path / "attempt"))
    write_restart_reason(storage, "401 for hf_abcdefghijklmnop")
    assert "hf_abc" not in take_restart_reason(storage)


def test_no_command_prints_a_secret(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    assert main(["doctor", "/nowhere/hf_abcdefghijklmnop"]) == 2
    said = capsys.readouterr().err
    assert "/nowhere" in said and "hf_abc" not in said


def test_of_launches_at_once_into_one_storage_one_wins(make_job, tmp_path):
    """They would write their checkpoints among each other's."""
    storage = str(tmp_path / "shared")
    jobs = [
        make_job(output_dir=str(tmp_path / f"o{n}"), ray_storage_path=storage, ray_run_name="one")
        for n in range(8)
    ]
    outputs = [decided(job) for job in jobs]  # all of them have found no owner
    together = threading.Barrier(len(outputs))

    def claim(output):
        together.wait()
        try:
            output.own()
        except JobError as error:
            return error
        return None

    with ThreadPoolExecutor(len(outputs)) as pool:
        refusals = list(pool.map(claim, outputs))
    assert refusals.count(None) == 1
    assert all("of another run of this name" in str(e) for e in refusals if e is not None)


def test_a_claim_on_an_object_store_has_one_winner_too(tmp_path, monkeypatch):
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    together, written = (threading.Barrier(6, timeout=300) for _ in range(2))
    clock = SimpleNamespace(sleep=lambda seconds: written.wait())  # as long as the slowest takes
    monkeypatch.setattr("raytrain_adv.storage.storage.time", clock)

    def claim(n):
        together.wait()
        return Storage(store, "claims").claim("owner.json", {"n": n})["n"]

    assert not Storage(store, "claims").is_local
    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(claim, range(6)))) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_does_not_leave_a_run_running_for_ever(make_job, monkeypatch, code):
    output = open_output(make_job())

    def full(path, data):
        raise OSError(code, "full")

    monkeypatch.setattr("raytrain_adv.storage.storage.write_atomic", full)
    output.note(make_job(), "failed", 1)
    assert record_of(output.folder)["status"] == "failed"
    (output.folder / "run.json").write_text("")
    with pytest.raises(StorageError):
        output.note(make_job(), "failed", 1)


def test_a_folder_is_held_while_its_driver_runs(tmp_path):
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
