"""What tests share: a job from keys, a tiny model folder, a small dataset."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

MODULES = tempfile.TemporaryDirectory(prefix="modules")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "RAY_AUTH_MODE", "disabled"
)  # a local ray.init would write a token into the home folder
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# transformers reads it once, as it is imported: code of models' own, which tests write.
os.environ["HF_MODULES_CACHE"] = MODULES.name

ROOT = Path(__file__).parent.parent
TINY_LLAMA = ROOT / "jobs" / "models" / "tiny-llama"

MakeJob = Callable[..., Any]


def pytest_configure() -> None:
    """Have Hypothesis draw the same examples each time, for as long as a busy machine takes."""
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=slow)
    settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Have a test draw the same numbers each time: PyTorch begins with a seed of the system's."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


def write_rows(path: Path, count: int = 64) -> Path:
    """Write an Alpaca file whose answers differ in length."""
    rows = [
        {
            "instruction": f"Count to {n % 9 + 1}, starting from {n}.",
            "input": "",
            "output": " ".join(str(n + k) for k in range(n % 9 + 1)) + ".",
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


def _has_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    """Undo what a test changed in the environment, as connecting to Ray does for its processes, and
    fail one that leaves a Ray which it did not find.
    """
    before, had_ray = dict(os.environ), _has_ray()
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    assert _has_ray() == had_ray, "the test started a Ray, or stopped one that others use"


@pytest.fixture(autouse=True)
def own_cache(left_as_found: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tokenized data of one test away from another's and from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """Keys of a tiny job, whose files are in the test's own folder."""
    return tiny_keys(tmp_path)


def tiny_keys(tmp_path: Path) -> dict[str, Any]:
    """Return keys of a job that trains the shipped tiny Llama, made tinier, on a few rows in a
    second or two.
    """
    model = tmp_path / "model-source"
    model.mkdir()
    for file in TINY_LLAMA.iterdir():
        if file.suffix in (".json", ".jinja"):
            (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config |= {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.1}
    (model / "config.json").write_text(json.dumps(config))
    return {
        "model_name_or_path": str(model),
        "train_from_scratch": True,
        "finetuning_type": "full",
        "dataset": str(write_rows(tmp_path / "rows.json")),
        "cutoff_len": 128,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_gradient_checkpointing": True,
        "num_sample_answers": 0,
        "tokenized_path": str(tmp_path / "tokenized"),
    }


@pytest.fixture
def job_file(tmp_path: Path, keys: dict[str, Any]) -> Callable[..., Path]:
    """Write a job file with these keys changed, and return its path."""

    def write(name: str = "job.yaml", **changed: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**keys, **changed}))
        return path

    return write


@pytest.fixture
def make_job(job_file: Callable[..., Path]) -> MakeJob:
    """Load a job with these keys changed."""
    from raytrain_adv.config import load

    return lambda **changed: load(job_file(**changed))
