"""What the live view knows of a run, from the rows of metrics.jsonl; and its lines for a log."""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytrain_adv import text

Row = Mapping[str, Any]
NUM_SHOWN = 8


@dataclass
class Progress:
    """The run so far. Times are unix seconds."""

    total_steps: int | None = None
    step: int = 0
    """Last finished optimizer step."""
    started: float = field(default_factory=time.time)
    phase: str = "starting"
    phase_started: float = field(default_factory=time.time)
    shown: deque[Row] = field(default_factory=lambda: deque(maxlen=NUM_SHOWN))
    """The last train and eval rows; each train row has its `wait_share`."""
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))
    """Time and step of the last train rows of this start of the workers."""
    step_s: float | None = None

    def begin_phase(self, name: str) -> None:
        """Note that the run is now at something else."""
        self.phase, self.phase_started = name, time.time()

    def take(self, row: Row) -> Row:
        """Take in one row of metrics.jsonl; return it, a train row with its `wait_share`."""
        if row["kind"] == "event":
            self._take_event(row)
            return row
        if row["kind"] == "train":
            row = {**row, "wait_share": wait_share(row, self.step)}
            self.step = row["step"]
            self.pace.append((row.get("time") or time.time(), self.step))
            self.step_s = row.get("step_s")
        self.shown.append(row)
        return row

    def eta_s(self) -> float | None:
        """Return the seconds until the last step at the recent pace, evaluations included."""
        if self.total_steps is None or not self.pace:
            return None
        left = self.total_steps - self.step
        paces = [
            (t - t_before) / (step - step_before)
            for (t_before, step_before), (t, step) in zip(
                self.pace, list(self.pace)[1:], strict=False
            )
            if step > step_before
        ]
        per_step = statistics.fmean(paces) if paces else self.step_s
        return None if per_step is None else max(left * per_step, 0.0)

    def _take_event(self, row: Row) -> None:
        match row.get("event"):
            case "plan":
                self.total_steps = row.get("total_steps") or self.total_steps
                self.step = row.get("resumed_from_step") or self.step
            case "resume":
                self.step = row.get("step") or 0
                self.pace.clear()
            case "phase":
                self.begin_phase(str(row.get("message")))


def wait_share(row: Row, previous_step: int) -> float | None:
    """Return the share of the time since the previous train row that went into waiting for data.

    data_wait_s is the sum over these steps, step_s their mean.
    """
    waited, step_s = row.get("data_wait_s"), row.get("step_s")
    if waited is None or not step_s:
        return None
    num_steps = max(int(row["step"]) - previous_step, 1)
    return min(float(waited) / (float(step_s) * num_steps), 1.0)


def value(row: Row, key: str) -> float | None:
    """Return a number of the row; also NaN and infinity, which it has under non_finite."""
    number = row.get(key)
    if number is None and key in row.get("non_finite", {}):
        return float(row["non_finite"][key])
    return None if number is None else float(number)


def of_total(step: int, total_steps: int | None) -> str:
    """Return the step as ` 20/600`, aligned."""
    return str(step) if total_steps is None else f"{step:>{len(str(total_steps))}}/{total_steps}"


def log_line(row: Row, progress: Progress) -> str:
    """Return a train or eval row as one aligned line for a log; cut and grep take it apart."""
    step = of_total(row["step"], progress.total_steps)
    if row["kind"] == "eval":
        perplexity = text.compact(value(row, "perplexity"))
        parts = [
            f"eval {step}",
            f"loss {text.loss(value(row, 'loss'))}",
            f"perplexity {perplexity}",
            f"{text.count(row.get('num_label_tokens'))} label tokens",
            text.seconds(row.get("seconds")),
            str(row.get("how", "")),
        ]
        return "  ".join(filter(None, parts))
    epoch = value(row, "epoch")
    parts = [
        f"step {step}",
        f"epoch {text.MISSING if epoch is None else f'{epoch:.2f}'}",
        f"loss {text.loss(value(row, 'loss'))}",
        f"lr {text.learning_rate(value(row, 'learning_rate'))}",
        f"grad {text.compact(value(row, 'grad_norm')):>5}",
        f"{text.rate(value(row, 'tokens_per_second_per_worker')):>7} tok/s/worker",
        f"mfu {text.percent(value(row, 'mfu_bf16'))}",
        f"mem {text.gib(value(row, 'peak_memory_gib'))} GiB",
        f"wait {text.percent(row.get('wait_share'))}",
        f"eta {text.clock(progress.eta_s())}",
    ]
    return "  ".join(parts)
