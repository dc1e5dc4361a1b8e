"""Finished models beside each other."""

import json
import math
from pathlib import Path
from shutil import copytree, rmtree

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from raytrain_adv import cli
from raytrain_adv.config import load
from raytrain_adv.driver.commands.use.measures import exact_match, mean, score_named
from raytrain_adv.errors import JobError
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from tests.unit.driver.commands.use.conftest import finish, last_eval_loss
from tests.workers import run_workers


def evaluated(folder):
    return json.loads((folder / "evaluation.json").read_text())["models"]


def test_the_loss_is_that_of_the_run_with_each_form_of_its_weights(runs, capsys):
    assert cli.main(["evaluate", str(runs["qat"]), "--device", "cpu"]) == 0
    quantized, trained = evaluated(runs["qat"])
    wanted = last_eval_loss(runs["qat"])
    assert quantized["figures"]["held-out loss"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert quantized["loss_in_its_run"] == wanted and trained["loss_in_its_run"] is None
    loss = trained["figures"]["held-out loss"]
    assert loss["value"] != pytest.approx(wanted, rel=1e-6)
    difference = loss["value"] - quantized["figures"]["held-out loss"]["value"]
    assert loss["difference"] == pytest.approx(difference, abs=1e-9)
    assert 0 < loss["difference_error"] < loss["error"]
    out = capsys.readouterr().out
    assert "from the first" in out and "qat/model-quantized" in out and f"{wanted:.4f}" in out


def test_an_adapter_has_the_loss_of_its_run_and_answers_are_scored(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_score.py").write_text("def half(answer, reference):\n    return 0.5\n")
    rows = [{"prompt": "One?", "answer": "1"}, {"prompt": "Two?", "answer": "2"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--answers", "rows.json", "--score", "own_score:half", "max_new_tokens=3"]
    command = ["evaluate", str(runs["lora"]), str(runs["qat"] / "model"), *options]
    assert cli.main([*command, "-o", "e.json", "--device", "cpu"]) == 0
    adapter, other = json.loads((tmp_path / "e.json").read_text())["models"]
    loss = adapter["figures"]["held-out loss"]["value"]
    assert loss == pytest.approx(last_eval_loss(runs["lora"]), rel=2e-3)
    assert adapter["figures"]["score"]["value"] == 0.5
    assert other["figures"]["score"]["difference"] == 0.0


@pytest.mark.parametrize(
    "more",
    [
        {"pissa_init": True},
        {"pissa_init": True, "pissa_convert": True},
        {"adapter_name_or_path": "lora/model", "create_new_adapter": True},
    ],
    ids=["pissa", "converted", "merged"],
)
def test_an_adapter_on_another_base_than_the_jobs_has_the_loss_of_its_run(runs, tmp_path, more):
    """PiSSA's was added to a base that still had what it began with, others to one without what
    was merged into it: chat and evaluate took another model than was trained.
    """
    root = runs["lora"].parent
    keys = yaml.safe_load((root / "lora.yaml").read_text()) | more
    keys |= {"output_dir": str(tmp_path / "out"), "bf16": False, "learning_rate": 0.01}
    if "adapter_name_or_path" in more:
        keys["adapter_name_or_path"] = str(root / more["adapter_name_or_path"])
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(keys))
    run_workers(1, tmp_path / "job.yaml")
    finish(load(tmp_path / "job.yaml"))
    assert cli.main(["evaluate", str(tmp_path / "out"), "--device", "cpu"]) == 0
    (model,) = evaluated(tmp_path / "out")
    wanted = last_eval_loss(tmp_path / "out")
    assert model["figures"]["held-out loss"]["value"] == pytest.approx(wanted, rel=1e-5)


def test_an_adapter_is_not_used_on_a_model_that_changed_since(runs, tmp_path, capsys):
    """A run that trained its base again in the same folder made it another model, without a word:
    evaluate, chat, generate, and export with and without --merge.
    """
    keys = yaml.safe_load((runs["lora"].parent / "lora.yaml").read_text())
    base = copytree(keys["model_name_or_path"], tmp_path / "base")
    keys |= {"model_name_or_path": str(base), "output_dir": str(tmp_path / "out")}
    keys |= {"save_strategy": "steps", "save_steps": 2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(keys))
    run_workers(1, tmp_path / "job.yaml")
    finish(load(tmp_path / "job.yaml"))
    out = str(tmp_path / "out")
    commands = [["evaluate", out, "--device", "cpu"], ["export", out], ["export", out, "--merge"]]
    assert cli.main(commands[0]) == 0
    trained = {name: value + 0.01 for name, value in load_file(base / "model.safetensors").items()}
    save_file(trained, base / "model.safetensors", {"format": "pt"})
    for command in commands:
        capsys.readouterr()
        assert cli.main(command) == 2
        assert f"{base} has other weights than when the run was" in capsys.readouterr().err
    base.rename(tmp_path / "gone")
    assert cli.main(commands[0]) == 2
    assert f"correct model_name_or_path in {out}/run.json" in capsys.readouterr().err


def test_an_adapter_that_is_evaluated_rounded_is_named_so(runs, tmp_path, capsys):
    """Its `model` has QAT's rounding on, as in training, and was named an adapter on its base."""
    keys = yaml.safe_load((runs["lora"].parent / "lora.yaml").read_text())
    keys |= {"enable_qat": True, "qat_activation_dtype": "none", "output_dir": str(tmp_path / "q")}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(keys | {"qat_group_size": 32}))
    run_workers(1, tmp_path / "job.yaml")
    finish(load(tmp_path / "job.yaml"))
    assert cli.main(["evaluate", str(tmp_path / "q"), "--device", "cpu"]) == 0
    forms = {Path(one["folder"]).name: one["form"] for one in evaluated(tmp_path / "q")}
    base = Path(keys["model_name_or_path"]).name
    assert forms["model"] == f"an adapter on {base}, fake-quantized"
    assert "fake" not in forms["model-quantized"]
    assert "fake-quantized" in " ".join(capsys.readouterr().out.split())


def test_a_run_does_not_need_the_adapter_that_it_continued(runs, tmp_path):
    """Its own adapter is whole, and evaluate and export asked for the other one."""
    root = runs["lora"].parent
    before = copytree(runs["lora"] / "model", tmp_path / "before")
    keys = yaml.safe_load((root / "lora.yaml").read_text())
    keys |= {"adapter_name_or_path": str(before), "output_dir": str(tmp_path / "out")}
    keys |= {"bf16": False, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(keys))
    run_workers(1, tmp_path / "job.yaml")
    finish(load(tmp_path / "job.yaml"))
    rmtree(before)
    out = str(tmp_path / "out")
    assert cli.main(["evaluate", out, "--device", "cpu"]) == 0
    (model,) = evaluated(tmp_path / "out")
    wanted = last_eval_loss(tmp_path / "out")
    assert model["figures"]["held-out loss"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert cli.main(["export", out]) == 0
    assert cli.main(["export", out, "--merge"]) == 0
    (exported,) = (tmp_path / "out").glob("exported-*/model/adapter_model.safetensors")
    trained = (tmp_path / "out" / "model" / "adapter_model.safetensors").read_bytes()
    assert exported.read_bytes() == trained


def test_a_checkpoint_of_an_adapter_is_not_continued_on_a_model_that_changed(
    runs, tmp_path, capsys
):
    """It holds the adapter alone: the run went on with other frozen weights, and so did export of a
    run that was stopped before it wrote a model.
    """
    keys = yaml.safe_load((runs["lora"].parent / "lora.yaml").read_text())
    base = copytree(keys["model_name_or_path"], tmp_path / "base")
    keys |= {"model_name_or_path": str(base), "output_dir": str(tmp_path / "out"), "max_steps": 4}
    keys |= {"save_strategy": "steps", "save_steps": 2, "export_model": False}
    keys["compute_accuracy"] = False
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(keys))
    run_workers(1, job)
    finish(load(job))
    (step,) = (tmp_path / "out" / "checkpoints").glob("*/step_00000002")
    job.write_text(yaml.safe_dump({**keys, "resume_from_checkpoint": str(step)}))
    run_workers(1, job)
    trained = {name: value + 0.01 for name, value in load_file(base / "model.safetensors").items()}
    save_file(trained, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match="has other weights than when the checkpoint was"):
        run_workers(1, job)
    assert cli.main(["export", str(tmp_path / "out")]) == 2
    assert "has other weights than when the checkpoint was" in capsys.readouterr().err


def test_an_adapter_keeps_its_base_when_its_run_moves_and_in_the_next_job(runs, tmp_path):
    """A moved adapter was loaded on what stood where its base had been, and one that a job
    continued on the job's model.
    """
    root = runs["lora"].parent
    keys = yaml.safe_load((root / "lora.yaml").read_text())
    keys |= {"bf16": False, "learning_rate": 0.01, "output_dir": str(tmp_path / "out")}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(keys | {"pissa_init": True}))
    run_workers(1, job)
    finish(load(job))
    wanted, moved = last_eval_loss(tmp_path / "out"), tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    run_workers(1, job)  # its base is where the other one's was
    zeroed = load_file(tmp_path / "out" / "model-base" / "model.safetensors")
    zeroed = {name: value * 0 for name, value in zeroed.items()}
    save_file(zeroed, tmp_path / "out" / "model-base" / "model.safetensors", {"format": "pt"})
    assert cli.main(["evaluate", str(moved), "--device", "cpu"]) == 0
    (model,) = evaluated(moved)
    assert model["figures"]["held-out loss"]["value"] == pytest.approx(wanted, rel=1e-5)
    continues = {"adapter_name_or_path": str(moved / "model"), "output_dir": str(tmp_path / "on")}
    continues |= {"eval_on_start": True}
    job.write_text(yaml.safe_dump(keys | continues))
    with pytest.raises(JobError, match="belongs to another model than the job's") as refused:
        Transforms(load(job)).plan(build(load(job)))
    assert f"set model_name_or_path: {moved / 'model-base'}" in str(refused.value)
    continues["model_name_or_path"] = str(moved / "model-base")
    job.write_text(yaml.safe_dump(keys | continues))
    run_workers(1, job)
    rows = map(json.loads, (tmp_path / "on" / "metrics.jsonl").read_text().splitlines())
    first = next(row["loss"] for row in rows if row["kind"] == "eval")
    assert first == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--score", "a:b"], "--score has nothing to score"),
        (["--answers", "PROMPTS"], "lacks answers to compare with"),
        (["--answers", "ROWS", "--score", "json:nothing"], "cannot be used"),
        (["--tasks", "nothing_known"], "lm-evaluation-harness"),
        (["--job", "no.yaml"], "no.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    runs, tmp_path, capsys, monkeypatch, options, said
):
    monkeypatch.setattr("raytrain_adv.driver.commands.use.evaluate.load", None)
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "One?"}]))
    (tmp_path / "r.json").write_text(json.dumps([{"prompt": "One?", "answer": "1"}]))
    files = {"PROMPTS": str(tmp_path / "p.json"), "ROWS": str(tmp_path / "r.json")}
    assert cli.main(["evaluate", str(runs["lora"]), *(files.get(o, o) for o in options)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_no_run_needs_something_to_be_evaluated_on(runs, capsys):
    base = json.loads((runs["lora"] / "run.json").read_text())["job"]["model_name_or_path"]
    assert cli.main(["evaluate", base]) == 2
    assert "give --job FILE" in capsys.readouterr().err


def test_errors_are_those_of_independent_rows():
    generator = np.random.default_rng(0)
    weights = generator.integers(5, 50, 400).astype(float)
    draws = [mean(weights * generator.normal(2.0, 0.5, 400), weights, None) for _ in range(300)]
    spread = np.std([one.value for one in draws])
    assert np.mean([one.error for one in draws]) == pytest.approx(spread, rel=0.15)
    assert mean(np.array([3.0]), np.array([2.0])).error is None
    same = mean(weights * 2, weights, weights * 2)
    assert (same.difference, same.difference_error) == (0.0, 0.0)


def test_scores_are_exact_match_or_a_users_function(tmp_path, monkeypatch):
    assert (exact_match(" 7\n", "7"), exact_match("8", "7")) == (1.0, 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_score.py").write_text("def f(a, r):\n    return float('nan')\n")
    with pytest.raises(JobError, match="return a number"):
        score_named("bad_score:f")("a", "b")
    assert math.isclose(score_named("operator:eq")("a", "a"), 1.0)
