"""A whole run as a user starts it, with secrets in its environment: what it leaves, says, and shows
through Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytrain_adv import launch
from tests.own_code import with_own_code

STEPS = 40
OWN = ("gcs_server", "raylet", "ray::Dashboard", "ray::RuntimeEnv")
"""Ray's processes that any machine could speak to where they listened for it."""


def listening(driver: psutil.Process) -> set[tuple[str, str]]:
    """Return (process, address) of every socket that Ray's own processes listen on."""
    found = set()
    for process in driver.children(recursive=True):
        try:
            name = process.name()
            if name.startswith(OWN) or "dashboard/dashboard.py" in " ".join(process.cmdline()):
                sockets = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
                found |= {(name, c.laddr.ip.removeprefix("::ffff:")) for c in sockets}
        except psutil.Error:
            continue  # it has ended
    return found


def shown_by_ray(output: str, home: Path) -> str:
    """Return what the dashboard's API says of jobs and training runs, as far as it is up."""
    url = next((w for w in output.split() if w.startswith("http://127.0.0.1")), None)
    token = home / ".ray" / "auth_token"
    headers = {"Authorization": f"Bearer {token.read_text()}"} if token.exists() else {}
    text = ""
    for path in ("/api/jobs/", "/api/train/v2/runs/v1") if url else ():
        try:
            request = urllib.request.Request(f"{url}{path}", headers=headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                text += answer.read().decode()
        except OSError:
            continue  # not up yet, or gone
    return text


def contents(*folders: str | Path) -> dict[str, bytes]:
    """Return path -> content of the files; some of Ray's processes may still delete theirs."""
    found = {}
    for folder in folders:
        for place, _, names in os.walk(folder):
            for path in (Path(place) / name for name in names):
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file() and not path.is_symlink():
                        found[str(path)] = path.read_bytes()
    return found


def require_complete(out: Path, said: str) -> dict[str, Any]:
    """Hold a run of two workers to what it should leave; return its report."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert report["status"] == "done" and report["error"] is None
    assert report["world_size"] == 2 and report["steps"] == STEPS and report["restarts"] == 0
    assert [step for step, _ in report["train_loss"]] == list(range(1, STEPS + 1))
    assert report["eval_loss"][-1][0] == STEPS
    assert report["samples"][0]["answer"] is not None
    assert (out / "report.html").read_text().startswith("<!")
    model = AutoModelForCausalLM.from_pretrained(report["model_dir"], trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(report["model_dir"])
    assert model.config.vocab_size >= len(tokenizer)
    assert str(out / "model") in said
    return report


def test_a_job_becomes_a_model_and_a_report_and_secrets_stay_where_they_are(
    job_file, keys, tmp_path, capsys
):
    """Ray listens on the loopback interface alone, and starts a process for each of five purposes:
    two workers, their controller, what they wait at, and what the dashboard asks. Training waits
    until the dashboard has told of it.
    """
    planted = {
        "HF_TOKEN": "hf_" + "Q7wE2rT9yU4iO6pA1sD3fG5hJ8kL0zXcVb",
        "AWS_ACCESS_KEY_ID": "AKIA" + "Q7WE2RT9YU4IO6PA",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI" + "K7MDENGbPxRfiCYzPlAnTeD",
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "76543210",
    }
    told = tmp_path / "told"
    until = f'dist.is_initialized() and not __import__("os").path.exists("{told}")'
    waits = f'while trains and {until}: __import__("time").sleep(0.1)'  # not as a plan counts
    with_own_code(Path(keys["model_name_or_path"]), before=waits)
    job = job_file(
        use_cpu=True,
        ray_num_workers=2,
        val_size=8,
        num_sample_answers=1,
        trust_remote_code=True,
        save_strategy="steps",
        save_steps=20,
        max_steps=STEPS,
    )
    # Sockets' paths must be short.
    session = tempfile.TemporaryDirectory(prefix="rt", dir="/tmp", ignore_cleanup_errors=True)
    log = tmp_path / "output.txt"
    sockets: set[tuple[str, str]] = set()
    shown = ""
    with session as folder, log.open("w") as file:
        home = tmp_path / "home"
        home.mkdir()
        environment = {**os.environ, **planted, "RAY_TMPDIR": folder, "HOME": str(home)}
        del environment["RAY_AUTH_MODE"]  # as a user starts it: Ray then asks for a token
        command = [sys.executable, "-m", "raytrain_adv.launch", str(job)]
        created = time.time()
        driver = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        end = time.monotonic() + 900
        while driver.poll() is None and time.monotonic() < end:
            sockets |= listening(psutil.Process(driver.pid))
            shown += shown_by_ray(log.read_text(), home)
            if "train_loop_config" in shown and sockets:
                told.touch()
            time.sleep(1)
        driver.kill()
        said = log.read_text()
        assert driver.returncode == 0, said
        text = contents(tmp_path, folder)
    for name, secret in planted.items():
        assert [n for n, content in text.items() if secret.encode() in content] == [], name
        assert secret not in said and secret not in shown, name
    assert any(name.endswith(".distcp") for name in text)
    workers = [name for name in map(os.path.basename, text) if name.startswith("worker-")]
    assert len({name for name in workers if name.endswith(".out")}) == 5
    assert "train_loop_config" in shown, "the dashboard's API was not reached"
    assert "asks for the token that `ray get-auth-token` prints" in said
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert {name for name, _ in sockets} >= {"gcs_server", "raylet"}
    assert {(name, ip) for name, ip in sockets if ip not in ("127.0.0.1", "::1")} == set()
    report = require_complete(tmp_path / "out", said)
    # The command begins before it imports PyTorch and Ray, and all its time has a name.
    assert 0.0 <= report["started_at"] - created < report["timeline"]["imports"]
    seconds = report["finished_at"] - report["started_at"]
    assert sum(report["timeline"].values()) == pytest.approx(seconds, rel=0.05)
    assert any("trust_remote_code" in note for note in report["notes"])
    assert "trust_remote_code: true ran" in said
    assert launch.main([str(job), "learning_rate=0.5"]) == 2
    assert "learning_rate" in capsys.readouterr().err
