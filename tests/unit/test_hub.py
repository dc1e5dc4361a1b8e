"""Without a Hub: one question, then an answer from the cache or a message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data.sample_rows import TINY_LLAMA

ASK = """
import json, time
slept, sleep = [], time.sleep
time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))
from raytrain_adv.config.job import SECTIONS
from raytrain_adv.errors import JobError
from raytrain_adv import hub
from raytrain_adv.data.read.entries import Entry
from raytrain_adv.data.read.sources import open_source
found, start = [], time.process_time()
for ask in (
    lambda: hub.require_model("org/model", "main", None, "here are org/moddel"),
    lambda: open_source(Entry("org/rows", "hub", "org/rows"), None),
):
    try:
        ask()
    except JobError as error:
        found.append(str(error))
print(json.dumps([time.process_time() - start + sum(slept), found]))
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_without_a_hub_the_message_comes_at_once(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    """Retries of the Hub's client alone take 23 s for each file."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    answer = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**inherited, **environment, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    seconds, (model, rows) = json.loads(answer.stdout.splitlines()[-1])
    assert reason in model and "org/model" in model and "HF_ENDPOINT" in model
    assert "here are org/moddel" in model
    assert reason in rows and "org/rows" in rows
    assert seconds < 10 and "Retry" not in answer.stderr


def test_a_cached_model_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytrain_adv import hub

    folder = tmp_path / "models--org--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    hub.why_unreachable.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.why_unreachable()
    hub.require_model("org/model", "main", str(tmp_path))
    hub.why_unreachable.cache_clear()


def test_a_cached_dataset_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytrain_adv import hub

    monkeypatch.setattr(hub, "why_unreachable", lambda: "no cable")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(hub.JobError, match="could not be loaded"):
        hub.require_dataset("Org/Some_rows", None)
    (tmp_path / "datasets--Org--Some_rows").mkdir()
    hub.require_dataset("Org/Some_rows", None)
    (tmp_path / "own" / "Org___some_rows").mkdir(parents=True)
    hub.require_dataset("Org/SomeRows", str(tmp_path / "own"))


def test_a_proxy_without_a_way_out_is_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from email.message import Message
    from urllib.error import HTTPError

    from raytrain_adv import hub

    def answer(*_: object, **__: object) -> None:
        raise HTTPError("http://hub", 502, "Bad Gateway", Message(), None)

    hub.why_unreachable.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert "a proxy answers HTTP Error 502" in hub.why_unreachable()
    hub.why_unreachable.cache_clear()


JOBS = {
    "a model": ({"model_name_or_path": "org/model"}, "There is no folder org/model"),
    "a dataset": ({"dataset": "org/rows"}, "The dataset org/rows could not be loaded"),
    "an evaluation set": ({"eval_dataset": "org/rows"}, "The dataset org/rows could not be loaded"),
    "a folder of data": ({"dataset_dir": "REMOTE:org/all"}, "REMOTE:org/all could not be fetched"),
}


COMMANDS = [*((job, "plan") for job in JOBS), ("a model", "data")]
RUN = """
import json, os, sys
import torch, transformers
from raytrain_adv import cli
told = []
for command, job, log in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        output = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        os._exit(cli.main([command, job]))
    _, status, used = os.wait4(child, 0)
    told.append([os.waitstatus_to_exitcode(status), used.ru_utime])
print(json.dumps(told))
"""
"""Each command in a process of its own, which has no packages to import."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, str]]:
    """Return of each command its exit code, seconds of CPU and output, where there is no Hub."""
    folder, commands = tmp_path_factory.mktemp("no-hub"), []
    rows = folder / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    for number, (job, command) in enumerate(COMMANDS):
        here = {"model_name_or_path": str(TINY_LLAMA), "dataset": str(rows)}
        written = {**here, "template": "alpaca", "output_dir": str(folder / "run"), **JOBS[job][0]}
        file = folder / f"job{number}.yaml"
        file.write_text(json.dumps(written))
        commands.append((command, str(file), str(folder / f"{number}.log")))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home = {"HF_HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    answer = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        env={**inherited, "HF_ENDPOINT": "http://127.0.0.1:9", **home},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout.splitlines()[-1])
    return [(*t, Path(log).read_text()) for t, (_, _, log) in zip(told, commands, strict=True)]


@pytest.mark.parametrize(("number", "job"), [(n, job) for n, (job, _) in enumerate(COMMANDS)])
def test_a_command_that_needs_the_hub_ends_with_one_message_and_no_retries(
    number: int, job: str, ended: list[tuple[int, float, str]]
) -> None:
    """A plan took 87 s: the Hub's client tried each file of a tokenizer for 23 s."""
    code, seconds, output = ended[number]
    assert code == 2
    assert output.count(JOBS[job][1]) == 1 and "http://127.0.0.1:9 cannot" in output
    assert "Retry" not in output and "Traceback" not in output
    assert seconds < 10
