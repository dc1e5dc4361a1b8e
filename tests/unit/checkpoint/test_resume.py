import json
import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from raytrain_adv.checkpoint import resume
from raytrain_adv.checkpoint.folders import FORMAT, MANIFEST, Progress, find, newest
from raytrain_adv.checkpoint.resume import to_resume
from raytrain_adv.checkpoint.save import CheckpointWriter
from raytrain_adv.config import load
from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.storage.storage import Storage
from tests.ranks import run_ranks


def write_checkpoint(root, attempt, step, *, manifest=True, size=3, fingerprint="f"):
    folder = Storage.at(str(root / attempt / f"step_{step:08d}"))
    folder.make()
    (root / attempt / f"step_{step:08d}" / "__0_0.distcp").write_bytes(b"abc")
    (root / attempt / f"step_{step:08d}" / ".metadata").write_bytes(b"m")
    if manifest:
        folder.write_json(
            MANIFEST,
            {
                "format": FORMAT,
                "progress": asdict(Progress(step, 4, 10, 0, 0.0, 0.0)),
                "fingerprint": fingerprint,
                "job": {},
                "optimizer": True,
                "files": {"__0_0.distcp": size},
            },
        )
    return folder


def test_the_newest_complete_checkpoint_is_found_over_attempts(tmp_path):
    write_checkpoint(tmp_path, "a_001", 10)
    write_checkpoint(tmp_path, "a_002", 20)
    write_checkpoint(tmp_path, "a_001", 30, manifest=False)
    found = newest(Storage.at(str(tmp_path)))
    assert found is not None and found.progress.step == 20


def test_a_checkpoint_with_a_torn_file_is_not_taken(tmp_path):
    folder = write_checkpoint(tmp_path, "a_001", 10, size=4)
    assert find(folder) is None


def test_a_torn_manifest_is_not_taken(tmp_path):
    folder = write_checkpoint(tmp_path, "a_001", 10)
    (tmp_path / "a_001" / "step_00000010" / MANIFEST).write_text('{"format": 1, "progr')
    assert find(folder) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer", None), ("progress", []), ("files", ["x"]), ("format", {}), ("fingerprint", 1)],
)
def test_a_manifest_of_another_form_is_not_taken(tmp_path, key, value):
    """KeyError and TypeError came out of a manifest in which one value was another."""
    folder = write_checkpoint(tmp_path, "a_001", 10)
    manifest = folder.read_json(MANIFEST)
    folder.write_json(MANIFEST, {**manifest, key: value})
    assert find(folder) is None
    (tmp_path / "a_001" / "step_00000010" / MANIFEST).write_text("[" * 20_000)
    assert newest(Storage.at(str(tmp_path))) is None


def test_no_checkpoint_is_found_in_an_empty_or_missing_folder(tmp_path):
    assert newest(Storage.at(str(tmp_path / "nowhere"))) is None


def test_a_restart_goes_on_from_the_named_checkpoint_until_there_is_a_newer_one(make_job, tmp_path):
    """Workers that die before their first checkpoint have not lost the one they came from."""
    job = make_job(per_device_train_batch_size=4)
    named = write_checkpoint(tmp_path / "other", "a_001", 10, fingerprint=job.fingerprint()).root
    run = Run(
        torch.device("cpu"), Storage.at(str(tmp_path / "own")), "b_001", SilentReporter(),
        restarts=1, resume=named,
    )  # fmt: skip
    arithmetic = resolve_arithmetic(job, num_sequences=10, world_size=1)
    found = to_resume(job, run, arithmetic)
    assert found is not None and found.path == named
    newer = write_checkpoint(tmp_path / "own", "b_001", 20, fingerprint=job.fingerprint()).root
    found = to_resume(job, run, arithmetic)
    assert found is not None and found.path == newer


def test_a_run_started_again_by_its_driver_goes_on_from_its_own_newest_checkpoint(
    make_job, tmp_path
):
    """As after its controller's death: steps since the checkpoint that the job names were lost."""
    job = make_job(per_device_train_batch_size=4)
    named = write_checkpoint(tmp_path / "other", "a_001", 10, fingerprint=job.fingerprint()).root
    own = Storage.at(str(tmp_path / "own"))
    run = Run(torch.device("cpu"), own, "b_002rr", SilentReporter(), resume=named)
    arithmetic = resolve_arithmetic(job, num_sequences=10, world_size=1)
    assert to_resume(job, run, arithmetic).path == named
    write_checkpoint(tmp_path / "own", "b_001", 60, fingerprint=job.fingerprint())
    newest_of_it = write_checkpoint(tmp_path / "own", "b_002", 50, fingerprint=job.fingerprint())
    assert to_resume(job, run, arithmetic).path == newest_of_it.root
    run.attempt = "b_003"
    assert to_resume(job, run, arithmetic).path == named


def test_a_checkpoint_in_a_bucket_is_looked_for_there(make_job, tmp_path, monkeypatch):
    """Its path without s3:// was looked for on this machine, and the run began at step 0."""
    job = make_job(per_device_train_batch_size=4)
    write_checkpoint(tmp_path / "bucket", "a_001", 10, fingerprint=job.fingerprint())
    bucket = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    opened = Storage.at

    def at(path):
        return Storage(bucket, path[5:]) if path.startswith("s3://") else opened(path)

    monkeypatch.setattr(Storage, "at", at)
    run = Run(
        torch.device("cpu"), opened(str(tmp_path / "own")), "b_001", SilentReporter(),
        resume="s3://bucket/a_001/step_00000010",
    )  # fmt: skip
    found = to_resume(job, run, resolve_arithmetic(job, num_sequences=10, world_size=1))
    assert found is not None and found.progress.step == 10


def test_a_checkpoint_that_not_all_workers_see_ends_the_run(make_job, tmp_path, monkeypatch):
    """The others began at step 0."""
    job = make_job(per_device_train_batch_size=4)
    named = write_checkpoint(tmp_path / "other", "a_001", 10, fingerprint=job.fingerprint()).root
    own = Storage.at(str(tmp_path / "own"))
    run = Run(torch.device("cpu"), own, "b_001", SilentReporter(), resume=named)
    monkeypatch.setattr(Run, "gather", lambda self, sees: [sees, False])
    with pytest.raises(JobError, match="Not all workers see") as refused:
        to_resume(job, run, resolve_arithmetic(job, num_sequences=10, world_size=1))
    assert "not seen by rank 1" in refused.value.found


def resumed(make_job, root, resume, said):
    """Return where a run resumes that finds checkpoints of 10, 20 and 30 steps in `root`."""
    job = make_job(per_device_train_batch_size=4)
    run = Run(torch.device("cpu"), Storage.at(str(root)), "b_001", SilentReporter(), resume=resume)
    run.fault = said.append
    return to_resume(job, run, resolve_arithmetic(job, num_sequences=10, world_size=1))


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_said_and_refused_by_name(
    make_job, tmp_path, damage
):
    fingerprint = make_job(per_device_train_batch_size=4).fingerprint()
    for step in (10, 20):
        write_checkpoint(tmp_path, "a_001", step, fingerprint=fingerprint)
    last = tmp_path / "a_001" / "step_00000020"
    manifest = json.loads((last / MANIFEST).read_text())
    manifest["crc32"] = {"__0_0.distcp": zlib.crc32(b"abc")}
    (last / MANIFEST).write_text(json.dumps(manifest))
    assert resumed(make_job, tmp_path, True, []).progress.step == 20

    file = last / "__0_0.distcp"
    {
        "flipped": lambda: file.write_bytes(b"abd"),
        "cut": lambda: file.write_bytes(b"ab"),
        "missing": file.unlink,
    }[damage]()
    with pytest.raises(JobError, match="is damaged") as error:
        resumed(make_job, tmp_path, str(last), [])
    assert "__0_0.distcp" in error.value.found and "resume_from_checkpoint: true" in error.value.fix
    said: list[str] = []
    assert resumed(make_job, tmp_path, True, said).progress.step == 10
    assert len(said) == 1 and f"{last} is damaged: __0_0.distcp" in said[0]
    again: list[str] = []
    assert resumed(make_job, tmp_path, True, again).progress.step == 10
    assert not again  # it no longer counts


def test_a_checkpoint_from_before_checksums_is_taken(make_job, tmp_path):
    fingerprint = make_job(per_device_train_batch_size=4).fingerprint()
    write_checkpoint(tmp_path, "a_001", 10, fingerprint=fingerprint)
    assert resumed(make_job, tmp_path, True, []).progress.step == 10


def test_a_step_is_saved_once(job_file, tmp_path):
    """Drained and told to end after one step, a run deleted its only checkpoint to write it again;
    killed meanwhile it had none.
    """
    ((first, second),) = run_ranks(saved_twice, 1, tmp_path, str(job_file()), str(tmp_path / "own"))
    assert first == second


def saved_twice(path, folder):
    """Return when the checkpoint of a step was written, after each of two saves, in ns."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    run = Run(torch.device("cpu"), Storage.at(folder), "a_001", SilentReporter(), dist.new_group())
    writer = CheckpointWriter(load(path), run, model, optimizer)
    times = []
    for _ in range(2):
        writer.save(Progress(3, 4, 10, 0, 0.0, 0.0), {})
        writer.finish()
        manifest = Path(folder, "a_001", "step_00000003", MANIFEST)
        times.append(manifest.stat().st_mtime_ns)
    writer.close()
    return times


def test_rank_0s_refusal_is_every_ranks_own(make_job, tmp_path, monkeypatch):
    """Storage that fails was a JobError, exit code 2, on all ranks."""

    def failing(root, attempt=None):
        raise StorageError("The bucket does not answer", "s3://b", "try again")

    monkeypatch.setattr(resume, "newest", failing)
    with pytest.raises(StorageError, match="does not answer"):
        resumed(make_job, tmp_path, True, [])
