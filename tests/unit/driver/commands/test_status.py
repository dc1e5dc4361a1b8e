import json
from pathlib import Path

import pytest

from raytrain_adv import cli
from raytrain_adv.driver.cluster import dashboard
from raytrain_adv.driver.commands.status import _ended, written
from raytrain_adv.driver.output.output_dir import runs_in
from raytrain_adv.storage.metrics_file import MetricsFile


def make_run(folder: Path, status="done", step=4):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": status, "job": {}}))
    with MetricsFile(folder / "metrics.jsonl", resume_step=None) as file:
        file.append({"kind": "train", "step": step, "loss": 2.5})


def make_checkpoint(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    counts = {"global_batch": 1, "num_sequences": 1, "num_tokens": 1, "window_loss": 0.0}
    progress = {"step": step, "window_tokens": 0.0, **counts}
    known = {"fingerprint": "", "job": {}, "optimizer": True, "files": {}}
    manifest = {"format": 1, "progress": progress, **known}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_status_names_the_committed_step_besides_the_logged_one(tmp_path, capsys):
    make_run(tmp_path / "run", "stopped", step=30)
    make_checkpoint(tmp_path / "run" / "checkpoints" / "run_001" / "step_00000035", 35)
    assert written(tmp_path / "run").committed == 35
    assert cli.main(["status", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "step      30" in said and "saved     step 35, the newest complete checkpoint" in said


def test_where_nothing_runs_the_last_runs_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(_ended()) == ["a run that has ended: raytrain-adv status OUTPUT_DIR"]
    make_run(tmp_path / "saves" / "mine")
    lines = list(_ended())
    assert lines[0].startswith("  saves/mine: done, step 4, loss 2.5000, ")
    assert lines[1] == "a run that has ended: raytrain-adv status saves/mine"


def test_doctor_without_a_run_names_the_last_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "saves" / "model" / "lora" / "sft")  # where LLaMA-Factory's jobs put it
    assert runs_in(Path()) == [Path("saves/model/lora/sft")]
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert "no run is named; the last ones: saves/model/lora/sft" in said
    assert "raytrain-adv doctor OUTPUT_DIR" in said


def test_a_folder_of_runs_leads_to_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "saves" / "llama" / "mine")
    make_run(tmp_path / "saves" / "llama" / "mine" / "previous" / "1")
    assert cli.main(["status", "saves"]) == 0
    shown = capsys.readouterr().out
    assert "saves/llama/mine: done, step 4" in shown and "previous" not in shown
    assert cli.main(["doctor", "saves"]) == 2
    assert "name one of the runs in it: saves/llama/mine" in " ".join(
        capsys.readouterr().err.split()
    )
    monkeypatch.setattr(dashboard, "of_this_machine", list)
    assert cli.main(["status", "elsewhere"]) == 2


def test_past_runs_are_listed_while_anothers_ray_runs_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "saves" / "mine")
    monkeypatch.setattr(dashboard, "of_this_machine", lambda: ["http://127.0.0.1:1"])
    assert cli.main(["status", "saves"]) == 0
    assert "saves/mine: done, step 4" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model", "model/lora/sft", "model-quantized", "checkpoints"])
def test_a_run_whose_folder_is_named_as_one_of_a_runs_is_led_to(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "saves" / name)
    for command in (["doctor", "saves"], ["doctor", "saves", "--fix"]):
        assert cli.main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"name one of the runs in it: saves/{name}" in said
    assert cli.main(["status", "saves"]) == 0
    assert f"saves/{name}: done, step 4" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "saves").iterdir()] == [name.partition("/")[0]]
