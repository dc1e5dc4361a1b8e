"""What `raytrain-adv doctor` finds in a real run's folder that was damaged, and how it mends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
import yaml

from raytrain_adv import cli
from raytrain_adv.checkpoint.folders import newest
from raytrain_adv.config import JobConfig, load
from raytrain_adv.driver.commands.doctor import show
from raytrain_adv.driver.output.output_dir import Output, held, open_output
from raytrain_adv.errors import EXIT_DONE, EXIT_JOB_FILE, EXIT_NOT_MENDED, JobError, Stopped
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.report import record
from raytrain_adv.report.build import started
from raytrain_adv.run.run import Reporter, Run, SilentReporter
from raytrain_adv.storage.storage import Storage
from raytrain_adv.worker.train import train
from tests.conftest import tiny_keys
from tests.workers import losses

ATTEMPT = "checkpoints/out_001"
LAST = f"{ATTEMPT}/step_00000006"


def trained(job: JobConfig, reporter: Reporter | None = None) -> tuple[Output, int | None]:
    """Train here, without Ray, what a launch would; return the step it resumed from."""
    output = open_output(job)
    assert not output.finished
    run = Run(
        torch.device("cpu"),
        output.storage,
        output.attempt,
        reporter or SilentReporter(),
        resume=output.resume,
    )
    figures = train(job, run, export_model)
    run.close()
    record.write(started(job, "out"), output.folder)
    output.note(job, "done", int(output.attempt.rpartition("_")[2]))
    return output, figures["resumed_from_step"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of six steps: checkpoints of steps 4 and 6, as Ray names them."""
    folder = tmp_path_factory.mktemp("doctor")
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "use_cpu": True}
    (folder / "job.yaml").write_text(yaml.safe_dump({**tiny_keys(folder), **saving}))
    trained(load(folder / "job.yaml"))
    results = [
        {"version": 0, "checkpoint_dir_name": f"step_0000000{step}", "metrics": {"step": step}}
        for step in (2, 4, 6)  # Ray goes on naming the one that was pruned
    ]
    snapshot = {"checkpoint_results": results, "checkpoint_report_indices": [0, 1, 2]}
    path = folder / "out" / ATTEMPT / "checkpoint_manager_snapshot.json"
    path.write_text(json.dumps({"ray_version": "2.60.0", **snapshot}))
    return folder / "out"


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "out"))


def again(sound: Path, out: Path, *changes: str) -> JobConfig:
    """Return the job that resumes in the copy."""
    changed = [f"output_dir={out}", "resume_from_checkpoint=true", *changes]
    return load(sound.parent / "job.yaml", changed)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def unfolded(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, without its line breaks."""
    return " ".join(capsys.readouterr().out.split())


def cut(name: str) -> Callable[[Path], None]:
    """Return the damage of a file that is half there."""

    def damage(out: Path) -> None:
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[: len(data) // 2])

    return damage


def changed(name: str) -> Callable[[Path], None]:
    """Change a byte of a file; its size stays."""

    def damage(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (out / name).write_bytes(content)

    return damage


def removed(name: str) -> Callable[[Path], None]:
    """Return the damage of a file or folder that somebody has removed."""

    def damage(out: Path) -> None:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink()

    return damage


def written(name: str, text: str) -> Callable[[Path], None]:
    """Return the damage of a file that holds something else."""

    def damage(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text(text)

    return damage


def overwritten(out: Path) -> None:
    """Leave a checkpoint's metadata with its size, and other bytes."""
    path = out / LAST / ".metadata"
    path.write_bytes(b"\0" * len(path.read_bytes()))


def rows(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Return the damage of a metrics.jsonl whose rows are changed so."""

    def damage(out: Path) -> None:
        path = out / "metrics.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return damage


def without(first: int, last: int) -> Callable[[list[str]], list[str]]:
    """Return the change that leaves out the training rows of these steps."""

    def change(lines: list[str]) -> list[str]:
        found = [json.loads(line) for line in lines]
        lost = [r["kind"] == "train" and first <= r["step"] <= last for r in found]
        return [line for line, is_lost in zip(lines, lost, strict=True) if not is_lost]

    return change


def noted(**changed: object) -> Callable[[Path], None]:
    """Return the damage of a run.json with these entries changed."""

    def damage(out: Path) -> None:
        found = json.loads((out / "run.json").read_text())
        for key, value in changed.items():
            found["job" if key in found["job"] else key] = (
                {**found["job"], key: value} if key in found["job"] else value
            )
        (out / "run.json").write_text(json.dumps(found))

    return damage


def sharded(out: Path) -> None:
    """Leave a model of two files, one of which is missing."""
    (out / "model" / "model.safetensors").rename(out / "model" / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = out / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))


DONE = "one without is refused."
SIX, FOUR = "resumes from step 6", "resumes from step 4"
DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "file cut": (cut(f"{LAST}/__0_0.distcp"), "were written", DONE),
    "bytes changed": (changed(f"{LAST}/__0_0.distcp"), "the bytes that were written", DONE),
    "file removed": (removed(f"{LAST}/__0_0.distcp"), "__0_0.distcp is missing", DONE),
    "killed mid-save": (removed(f"{LAST}/manifest.json"), "still being written", DONE),
    "manifest torn": (cut(f"{LAST}/manifest.json"), "its manifest.json is torn", DONE),
    "no manifest": (written(f"{LAST}/manifest.json", '{"format": 1}'), "not a checkpoint's", DONE),
    "other format": (written(f"{LAST}/manifest.json", '{"format": 9}'), "of format 9", DONE),
    "metadata": (overwritten, ".metadata", DONE),
    "removed by hand": (removed(LAST), "names step_00000006, which something other", DONE),
    "snapshot torn": (cut(f"{ATTEMPT}/checkpoint_manager_snapshot.json"), "it is torn", DONE),
    "beyond the limit": (noted(save_total_limit=1), "save_total_limit: 1 keeps newer", DONE),
    "last line torn": (rows(lambda r: [*r, '{"kind": "tra']), "its last line is torn", DONE),
    "bad line": (rows(lambda r: [*r[:3], "\0\0\n", *r[3:]]), "lines that hold no row: 4", DONE),
    "steps twice": (rows(lambda r: [*r, *r]), "more than once: 1, 2, 3, 4, 5 and 1 more", DONE),
    "rows lost": (rows(without(3, 4)), "steps 3 to 4 have no row", DONE),
    "last rows lost": (rows(without(5, 6)), "steps 5 to 6 have no row", DONE),
    "no metrics": (removed("metrics.jsonl"), "it is missing", DONE),
    "report cut": (cut("report.json"), "Invalid JSON", SIX),
    "report missing": (removed("report.json"), "it is missing", SIX),
    "run.json cut": (cut("run.json"), "torn, or lacks", SIX),
    "run.json missing": (removed("run.json"), "it is missing", SIX),
    "killed": (noted(status="running"), "it was killed", SIX),
    "leftovers": (written(".model.partial/config.json", "{"), "still being written", DONE),
    "asked to stop": (written("stop_after_step", ""), "asked the run to stop", DONE),
    "no weights": (removed("model/model.safetensors"), "holds no weights", SIX),
    "weights cut": (cut("model/model.safetensors"), "cannot be read", SIX),
    "shard missing": (sharded, "model-00002-of-00002.safetensors", SIX),
    "no model": (removed("model"), "it is missing", SIX),
}


def test_a_whole_run_is_healthy_and_left_as_it_is(out, capsys):
    before = contents(out)
    assert show(out, fix=True)
    said = capsys.readouterr().out
    assert "nothing is wrong" in said and DONE in said
    assert contents(out) == before


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_and_mended_and_nothing_is_deleted(name, out, capsys):
    damage, words, verdict = DAMAGES[name]
    damage(out)
    before = contents(out)
    assert not show(out, fix=False)
    said = unfolded(capsys)
    assert words in said and verdict in said and "Nothing was changed" in said
    assert contents(out) == before
    assert show(out, fix=True), capsys.readouterr().out
    assert words in unfolded(capsys)
    after = contents(out)
    lost = {path for path, data in before.items() if data not in after.values()}
    assert lost <= {"metrics.jsonl"} and (not lost or name in ("rows lost", "last rows lost"))
    assert show(out, fix=False)
    assert "nothing is wrong" in capsys.readouterr().out


def test_a_rerun_goes_on_after_the_mending_where_it_broke_off_or_did_nothing_before(
    sound, out, tmp_path, capsys
):
    """A manifest that is none is passed over; a finished run without weights does nothing, and
    says that it is done.
    """
    expected = losses(out)
    (out / "model" / "model.safetensors").unlink()
    assert open_output(again(sound, out)).finished
    (out / LAST / "manifest.json").write_text('{"format": 1}')
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    noted(status="failed")(broken)
    assert trained(again(sound, broken))[1] == 4
    assert show(out, fix=True)
    assert FOUR in unfolded(capsys)
    output, resumed_from = trained(again(sound, out))
    assert resumed_from == 4 and output.attempt == "out_002"
    assert losses(out) == expected
    assert (out / "model" / "model.safetensors").exists()
    assert show(out, fix=False), capsys.readouterr().out


class StopAfterFive(SilentReporter):
    """Asks the run to stop in its fifth step, if it begins with that."""

    def stop_requested(self) -> bool:
        return True


def test_a_damaged_checkpoint_no_longer_costs_the_whole_ones(sound, out):
    """Counted by save_total_limit: 1, it has those deleted that are older, the new one too."""
    noted(status="failed", save_total_limit=1)(out)
    (out / LAST / "__0_0.distcp").unlink()
    assert show(out, fix=True)
    with pytest.raises(Stopped, match="after step 5"):
        trained(again(sound, out, "save_total_limit=1"), StopAfterFive())
    found = newest(Storage.at(str(out / "checkpoints")))
    assert found is not None and found.progress.step == 5


def test_a_run_that_is_alive_is_not_touched(out):
    cut("report.json")(out)
    before = contents(out)
    with held(out), pytest.raises(JobError, match="still active"):
        show(out, fix=True)
    assert contents(out) == before


def test_what_no_checkpoint_can_bring_back_is_said_and_left(out, capsys):
    shutil.rmtree(out / "checkpoints")
    (out / "model" / "model.safetensors").unlink()
    assert not show(out, fix=True)
    said = unfolded(capsys)
    assert "bring it back from a copy" in said and "Not repaired" in said
    assert (out / "model" / "config.json").exists()


def test_the_exit_code_shows_whether_something_is_wrong(out, tmp_path, capsys):
    cut("report.json")(out)
    assert cli.main(["doctor", str(out)]) == EXIT_NOT_MENDED
    assert cli.main(["doctor", str(out), "--fix"]) == EXIT_DONE
    assert cli.main(["doctor", str(tmp_path / "nowhere")]) == EXIT_JOB_FILE
    assert cli.main(["doctor"]) == EXIT_JOB_FILE
    assert "no run is named" in capsys.readouterr().err


def test_a_run_with_one_row_is_examined(out, capsys):
    """It was stopped after its first step."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if '"kind": "train"' in line)
    path.write_text("".join(lines[: first + 1]))
    shutil.rmtree(out / "checkpoints")
    show(out, fix=False)
    assert "have no row" not in capsys.readouterr().out


def test_a_folder_that_holds_no_run_is_refused_and_a_sweeps_names_its_trials(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JobError, match="neither run"):
        show(tmp_path, fix=True)
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "trials" / "lr_1").mkdir(parents=True)
    with pytest.raises(JobError, match="lr_1"):
        show(tmp_path, fix=True)


def test_a_trial_whose_model_its_sweep_has_deleted_is_healthy(sound, tmp_path):
    """keep_models: best keeps one trial's."""
    trial = Path(shutil.copytree(sound, tmp_path / "trials" / "lr_1"))
    shutil.rmtree(trial / "model")
    assert show(trial, fix=False)


def test_checkpoints_on_other_storage_are_set_aside_there(sound, out, tmp_path):
    shutil.move(out / "checkpoints", tmp_path / "storage" / "out")
    noted(ray_storage_path=str(tmp_path / "storage"))(out)
    shard = tmp_path / "storage" / "out" / "out_001" / "step_00000006" / "__0_0.distcp"
    shard.write_bytes(b"")
    assert show(out, fix=True)
    assert not shard.exists() and not (out / "set-aside").exists()
    assert list((tmp_path / "storage" / "out" / "set-aside").glob("*/out_001/step_00000006"))


def test_a_folder_moves_on_storage_that_renames_none(tmp_path):
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    written("a/step_1/x", "1")(tmp_path)
    Storage(remote, "aside").make()
    Storage(remote, "a").move("step_1", "aside/step_1")
    assert contents(tmp_path) == {"aside/step_1/x": b"1"}
