import importlib.util
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sections import (
    DataConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    RayConfig,
)
from raytrain_adv.config.training import TrainConfig
from raytrain_adv.errors import JobError
from raytrain_adv.run import trackers
from raytrain_adv.run.trackers import Trackers, check, names, open_trackers

MOST_S = 300.0  # after which a test that waits in vain fails
ROW = {"kind": "train", "step": 3, "loss": 2.5, "mfu_bf16": None, "time": 1.0}


def job_with(report_to: str | list[str], output_dir: Path, **ray: object) -> JobConfig:
    return JobConfig(
        model=ModelConfig(model_name_or_path="m"),
        data=DataConfig(),
        train=TrainConfig(),
        parallel=ParallelConfig(),
        output=OutputConfig(output_dir=str(output_dir), report_to=report_to),
        ray=RayConfig(**ray),
    )


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found += [
                (event.step, v.tag, v.simple_value)
                for v in event.summary.value
                if v.HasField("simple_value")
            ]
    return found


class Flaky:
    name = "flaky"
    failures = (ConnectionError,)

    def __init__(self, fails_at: set[int], may_log: threading.Event | None = None) -> None:
        self.fails_at, self.may_log = fails_at, may_log
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, figures: dict[str, float], step: int) -> None:
        if self.may_log is not None:
            self.may_log.wait(MOST_S)
        if step in self.fails_at:
            raise ConnectionError("server is away")
        self.logged.append((step, dict(figures)))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ("none", ()),
        ([], ()),
        ("tensorboard", ("tensorboard",)),
        (["none"], ()),
        (["wandb", "mlflow"], ("wandb", "mlflow")),
    ],
)
def test_report_to_is_read_as_names(report_to, expected):
    assert names(report_to) == expected


def test_missing_package_is_a_job_error_that_reports_what_to_install(monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(JobError, match="wandb, whose package is not installed") as caught:
        check("wandb")
    assert "pip install wandb" in caught.value.fix


def test_tensorboard_gets_the_numbers_of_each_row(tmp_path):
    opened = open_trackers(job_with("tensorboard", tmp_path))
    opened.log(ROW, 3)
    opened.log({"kind": "eval", "step": 3, "loss": 2.0, "perplexity": 7.4}, 3)
    opened.close()
    (folder,) = (tmp_path / "trackers" / "tensorboard").iterdir()
    assert folder.name == tmp_path.name  # TensorBoard's name of the run
    assert scalars(folder) == [
        (3, "train/loss", 2.5),
        (3, "eval/loss", 2.0),
        (3, "eval/perplexity", pytest.approx(7.4)),
    ]


def test_a_failing_tracker_is_told_once_and_tried_again():
    events: list[tuple[str, str]] = []
    flaky = Flaky(fails_at={1, 2})
    opened = Trackers((flaky,), lambda slug, message: events.append((slug, message)))
    for step in (1, 2, 3):
        opened.log({**ROW, "step": step}, step)
    opened.close()
    assert [step for step, _ in flaky.logged] == [3]
    assert flaky.closed
    assert [slug for slug, _ in events] == ["tracker_failed", "tracker_lost_rows"]
    assert "server is away" in events[0][1]
    assert "2 rows" in events[1][1]


def test_a_slow_tracker_does_not_hold_up_training():
    may_log = threading.Event()
    slow = Flaky(set(), may_log)
    opened = Trackers((slow,), lambda slug, message: None)
    for step in range(10):
        opened.log({**ROW, "step": step}, step)
    assert slow.logged == []
    may_log.set()
    opened.close()
    assert len(slow.logged) == 10


def test_a_tracker_that_hangs_is_left_behind_and_told(monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 0.1)
    events: list[tuple[str, str]] = []
    may_log = threading.Event()
    opened = Trackers((Flaky(set(), may_log),), lambda *event: events.append(event))
    opened.log(ROW, 3)
    opened.close()
    may_log.set()
    assert events[0][0] == "tracker_lost_rows"


def test_a_bug_in_a_tracker_is_not_taken_for_a_failure_of_the_network():
    assert not issubclass(AttributeError, Flaky.failures)


class FakeWandb(SimpleNamespace):
    """The part of wandb's interface that is used; records what it is asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(errors=SimpleNamespace(Error=RuntimeError), calls=[])
        self.error = error

    def init(self, **arguments: object) -> "FakeWandb":
        if self.error is not None:
            raise self.error
        self.calls.append(("init", arguments))
        self.id = arguments["id"] or "abc"
        return self

    def define_metric(self, *args: object, **kwargs: object) -> None: ...

    def log(self, figures: dict[str, float]) -> None:
        self.calls.append(("log", figures))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def fake_wandb(monkeypatch, error: Exception | None = None) -> FakeWandb:
    fake = FakeWandb(error)
    monkeypatch.setattr(trackers, "_is_installed", lambda package: True)
    monkeypatch.setattr(trackers, "_module", lambda name: fake)
    return fake


def test_wandb_goes_on_in_the_run_that_is_resumed(tmp_path, monkeypatch):
    fake = fake_wandb(monkeypatch)
    open_trackers(job_with("wandb", tmp_path)).close()
    resumed = open_trackers(job_with("wandb", tmp_path), resume_step=2)
    resumed.log(ROW, 3)
    resumed.close()
    inits = [arguments for call, arguments in fake.calls if call == "init"]
    assert [(i["id"], i["resume"]) for i in inits] == [(None, None), ("abc", "allow")]
    assert ("log", {"train/loss": 2.5, "step": 3}) in fake.calls
    assert json.loads((tmp_path / "trackers" / "runs.json").read_text()) == {"wandb": "abc"}


def test_a_tracker_that_cannot_be_opened_stops_the_job(tmp_path, monkeypatch):
    fake_wandb(monkeypatch, RuntimeError("api_key not configured"))
    with pytest.raises(JobError, match="wandb cannot be opened") as caught:
        open_trackers(job_with("wandb", tmp_path))
    assert "WANDB_API_KEY" in caught.value.fix


def test_secrets_of_the_job_do_not_reach_a_tracker(tmp_path, monkeypatch):
    fake = fake_wandb(monkeypatch)
    env = {"runtime_env": {"env_vars": {"WANDB_API_KEY": "s3cret"}}}
    open_trackers(job_with("wandb", tmp_path, ray_init_kwargs=env)).close()
    assert "s3cret" not in str(fake.calls)
    assert "WANDB_API_KEY" in str(fake.calls)


@needs("wandb")
def test_wandb_offline_writes_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    opened = open_trackers(job_with("wandb", tmp_path))
    opened.log(ROW, 3)
    opened.close()
    assert list(tmp_path.glob("trackers/wandb/offline-run-*/*.wandb"))


@needs("mlflow")
def test_mlflow_writes_metrics_and_resumes_its_run(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    for resume_step in (0, 3):
        opened = open_trackers(job_with("mlflow", tmp_path), resume_step=resume_step)
        opened.log({**ROW, "step": resume_step + 1}, resume_step + 1)
        opened.close()
    run_id = json.loads((tmp_path / "trackers" / "runs.json").read_text())["mlflow"]
    history = MlflowClient().get_metric_history(run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 2.5), (4, 2.5)]
