"""A run's metrics for Prometheus: every rank exports its own through Ray, on its node's metrics
port, where Ray prefixes each name with `ray_`. driver/commands/board.json is Grafana's board.
"""

from collections.abc import Mapping
from contextlib import ExitStack

from ray.util.metrics import Gauge

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.watch.nodes import poll
from raytrain_adv.transforms.applied import Transforms

PREFIX = "raytrain_adv_"
FROM_ROW = {
    "step": ("step", "Optimizer steps done."),
    "loss": ("loss", "Training loss per label token, over the last logging interval, all ranks."),
    "learning_rate": ("learning_rate", "Learning rate of the last step."),
    "grad_norm": ("grad_norm", "Norm of the last step's gradient before clipping, all ranks."),
    "step_s": ("step_seconds", "Seconds per optimizer step, over the last logging interval."),
    "tokens_per_second_per_worker": ("tokens_per_second", "Tokens per second of this rank."),
    "mfu_bf16": ("mfu_bf16", "Share of the GPU's dense bf16 peak, if that is known."),
    "peak_memory_gib": ("peak_memory_gib", "Most GPU memory allocated so far; on a CPU, RSS."),
    "num_tokens": ("tokens", "Tokens trained on since the run began, all ranks."),
}
"""Key of a logging step's row -> exported name and meaning."""
DATA_WAIT = PREFIX + "data_wait_seconds"
RESTARTS = PREFIX + "restarts"
TRANSFORM_ON = PREFIX + "transform_on"
TAGS = ("run", "rank")
REPEAT_S = 5.0
"""Ray drops a value that is not set again within 20 s (ray 2.60); a logging step may be longer."""

EXPORTED = {PREFIX + name: meaning for name, meaning in FROM_ROW.values()} | {
    DATA_WAIT: "Seconds per step that this rank waited for data.",
    RESTARTS: "How often the run's workers were restarted.",
    TRANSFORM_ON: "1 while a feature of the job is on, else 0.",
}
"""Name, without Ray's prefix -> meaning."""


class RunMetrics:
    """One rank's exported metrics, until `close`."""

    def __init__(self, job: JobConfig, run: str, rank: int, restarts: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._logging_steps = job.output.logging_steps
        self._transforms = Transforms(job)
        self._gauges = {
            name: Gauge(name, meaning, (*TAGS, "transform") if name == TRANSFORM_ON else TAGS)
            for name, meaning in EXPORTED.items()
        }
        self._values: dict[tuple[str, str], float] = {(RESTARTS, ""): restarts}
        """Name and transform -> value; replaced as a whole, because two threads read it."""
        self._export()
        self._repeating = ExitStack()
        self._repeating.enter_context(poll("metrics", self._export, REPEAT_S))

    def take(self, row: Mapping[str, float]) -> None:
        """Export a logging step's row; metrics that it lacks keep their last value."""
        values = {
            (PREFIX + name, ""): row[key] for key, (name, _) in FROM_ROW.items() if key in row
        }
        steps = int(row["step"])
        in_row = steps % self._logging_steps or self._logging_steps
        values[DATA_WAIT, ""] = row["data_wait_s"] / in_row
        for transform in self._transforms:
            values[TRANSFORM_ON, transform.name] = float(transform.is_on(steps - 1))
        self._values = {**self._values, **values}
        self._export()

    def close(self) -> None:
        """Stop exporting."""
        self._repeating.close()

    def _export(self) -> None:
        for (name, transform), value in self._values.items():
            tags = {**self._tags, "transform": transform} if transform else self._tags
            self._gauges[name].set(value, tags)
