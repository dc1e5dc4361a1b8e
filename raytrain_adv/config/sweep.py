"""The sweep section: values for keys of the job, and all resulting trials, before any cluster is
contacted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from raytrain_adv.config.problems import show
from raytrain_adv.config.section import Section

if TYPE_CHECKING:
    from raytrain_adv.config.job import JobConfig

SWITCH = "fake_quant_after_n_steps"
NEVER = "never"
"""Value of the switch that trains in bf16 and quantizes at the end: PTQ."""
MAX_TRIALS = 500
MAX_NAME = 120
CONVERTED_LOSS: Literal["quantized_eval_loss"] = "quantized_eval_loss"
"""Held-out loss of the converted model that is exported."""
DISTRIBUTIONS = ("choice", "uniform", "loguniform", "randint")
METRICS: Mapping[str, Literal["min", "max"]] = {
    "eval_loss": "min",
    "quantized_eval_loss": "min",
    "train_loss": "min",
    "tokens_per_second_per_worker": "max",
    "step_seconds": "min",
    "peak_memory_gib": "min",
    "mfu_bf16": "max",
}
"""Metric to compare trials by -> whether the lowest or the highest value is best."""
MetricName = Literal[
    "eval_loss",
    "quantized_eval_loss",
    "train_loss",
    "tokens_per_second_per_worker",
    "step_seconds",
    "peak_memory_gib",
    "mfu_bf16",
]
SET_BY_THE_SWEEP = frozenset(
    [
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "run_name",
        "ray_run_name",
        "ray_storage_path",
        "ray_init_kwargs",
        "overwrite_cache",
    ]
)
"""Keys of the whole sweep, or that it sets for each trial."""


class SweepOptions(Section):
    """How a sweep runs; its other keys are keys of the job, with lists of values."""

    metric: MetricName | None = None
    """The metric that ranks finished trials; none means quantized_eval_loss if every trial
    exports a converted model, else eval_loss."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials early that perform worse than the others; none runs each to its end."""
    num_samples: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 8
    """Draws from the distributions; the same ones for each combination of the listed values."""
    max_concurrent_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | Literal["auto"] = "auto"
    """Trials at the same time, at most as many as fit the cluster; auto means that many."""
    grace_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """asha first judges a trial after this many steps, counted from the trial's
    fake_quant_after_n_steps; none means a tenth of all steps."""
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 3
    """asha compares trials at grace_steps, and at each multiple by this factor; about one in this
    many continues."""
    keep_models: Literal["all", "best"] = "all"
    """best deletes the models and checkpoints of all trials but the best so far; reports stay."""


@dataclass(frozen=True)
class Distribution:
    """Values to draw from: {loguniform: [1e-6, 1e-4]}."""

    kind: str
    of: tuple[Any, ...]
    """The choices, or the lowest and the highest value; both can be drawn."""

    def draw(self, rng: random.Random) -> Any:
        """Return one value; numbers that are not whole have four significant digits."""
        if self.kind == "choice":
            return rng.choice(self.of)
        low, high = self.of
        if self.kind == "randint":
            return rng.randint(low, high)
        share = rng.random()
        value = low + (high - low) * share
        if self.kind == "loguniform":
            value = low * (high / low) ** share
        return min(max(float(f"{value:.4g}"), low), high)


@dataclass(frozen=True)
class Axis:
    """A swept key."""

    key: str
    where: str
    """Its line in the file, as `line 12`."""
    values: tuple[Any, ...] = ()
    """The listed values."""
    distribution: Distribution | None = None
    """The source of values, instead of a list."""
    note: str = ""
    """For the user: how the values were changed."""

    @property
    def first(self) -> Any:
        """The first of the listed values, or a value that can be drawn."""
        return self.distribution.of[0] if self.distribution is not None else self.values[0]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    """Its folder's name below output_dir/trials: the swept keys with their values."""
    values: Mapping[str, Any]
    job: JobConfig


@dataclass(frozen=True)
class Sweep:
    """A valid sweep: every trial's job is loaded and checked."""

    options: SweepOptions
    keys: tuple[str, ...]
    metric: MetricName
    trials: tuple[Trial, ...]

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the lowest or the highest value of the metric is the best."""
        return METRICS[self.metric]


def axis(key: str, value: Any, where: str) -> Axis:
    """Return the values of a swept key.

    Raises:
        ValueError: naming what is wrong with them.
    """
    if isinstance(value, dict):
        distribution = _distribution(value)
        kept, note = _one_start(key, distribution.of)
        return Axis(key, where, distribution=Distribution(distribution.kind, kept), note=note)
    if not isinstance(value, list):
        raise ValueError(f"{show(value, key)} is one value; a sweep takes a list of values")
    if not value:
        raise ValueError("the list of values is empty")
    values, note = _one_start(key, _distinct(value))
    return Axis(key, where, values=_with_baseline(key, values), note=note)


def _one_start(key: str, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
    """Keep one of null and 0, which both begin with fake quantization, and return a note."""
    from_the_start = [v for v in values if v is None or (type(v) is int and v == 0)]
    if key != SWITCH or len(from_the_start) < 2:
        return values, ""
    kept = tuple(v for v in values if v is not None)
    return kept, f"{SWITCH}: null and 0 are one trial: fake quantization begins with either"


def _with_baseline(key: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Add the trial without fake quantization (PTQ) to those that begin it at some step."""
    if key != SWITCH or NEVER in values:
        return values
    return (*values, NEVER)


def _distribution(value: Mapping[str, Any]) -> Distribution:
    if len(value) != 1 or next(iter(value)) not in DISTRIBUTIONS:
        raise ValueError(f"{show(value)} is not a distribution")
    kind, of = next(iter(value.items()))
    if kind == "choice":
        if not isinstance(of, list) or not of:
            raise ValueError(f"choice takes a list of values, not {show(of)}")
        return Distribution(kind, _distinct(of))
    is_pair = isinstance(of, list) and len(of) == 2 and all(map(_is_number, of))
    if not is_pair or of[0] >= of[1]:
        text = "the lowest value and the highest, as [1, 8]"
        raise ValueError(f"{kind} takes {text}; this is {show(of)}")
    if kind == "loguniform" and of[0] <= 0:
        raise ValueError(f"loguniform takes values above 0; this is {show(of)}")
    if kind == "randint" and not all(isinstance(end, int) for end in of):
        raise ValueError(f"randint takes whole numbers; this is {show(of)}")
    return Distribution(kind, tuple(of))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    seen = set()
    for value in values:
        if (written := _written(value)) in seen:
            raise ValueError(f"{show(value)} is listed twice")
        seen.add(written)
    return tuple(values)


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def combinations(axes: Sequence[Axis], num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Return each trial's values: every combination of listed values with every distinct draw.

    If the step at which a feature begins is drawn, the trial in which it never begins is added.
    """
    listed = [a for a in axes if a.distribution is None]
    draws = _draws([a for a in axes if a.distribution is not None], num_samples, seed)
    if _draws_the_switch(axes):
        draws.append({**draws[0], SWITCH: NEVER})
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*(a.values for a in listed)):
        for draw in draws:
            both = {**dict(zip((a.key for a in listed), values, strict=True)), **draw}
            combination = {a.key: both[a.key] for a in axes}
            found.setdefault(_written(combination), combination)
    return list(found.values())


def _draws_the_switch(axes: Sequence[Axis]) -> bool:
    drawn = [a.distribution for a in axes if a.key == SWITCH and a.distribution is not None]
    return any(NEVER not in distribution.of for distribution in drawn)


def _draws(axes: Sequence[Axis], num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Draw with one seed for each draw, so that more draws begin with the same ones."""
    if not axes:
        return [{}]
    return [
        {
            a.key: a.distribution.draw(random.Random(f"{seed} {number} {a.key}"))
            for a in axes
            if a.distribution is not None
        }
        for number in range(num_samples)
    ]


def count(axes: Sequence[Axis], num_samples: int) -> int:
    """Return the number of trials, without creating them."""
    product = num_samples if any(a.distribution is not None for a in axes) else 1
    product += _draws_the_switch(axes)
    for a in axes:
        product *= len(a.values) if a.distribution is None else 1
    return product


def extremes(axes: Sequence[Axis], first: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the first trial's values with each distribution at its ends."""
    for a in axes:
        for value in a.distribution.of if a.distribution is not None else ():
            yield {**first, a.key: value}


def names(all_values: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a unique folder name for each trial, from its values alone, so that a sweep with more
    values finds the trials that it ran before.
    """
    found: list[str] = []
    for values in all_values:
        parts = [f"{key}={_plain(value)}" for key, value in values.items()]
        name = ",".join(parts)
        if len(name) > MAX_NAME or name in found:
            digest = hashlib.sha256(_written(values).encode()).hexdigest()[:8]
            name = f"{name[: MAX_NAME - 9]}-{digest}"
        found.append(name)
    return found


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else _written(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.") or "-"


def as_trial(job: JobConfig, name: str) -> JobConfig:
    """Return a trial's job: in its own folder, continuing a run that is already there."""
    output, ray = job.output, job.ray
    folder = str(Path(output.output_dir) / "trials" / name)
    tracked = {} if output.run_name is None else {"run_name": f"{output.run_name}-{name}"}
    keys = {
        "output_dir": folder,
        "overwrite_output_dir": False,
        "resume_from_checkpoint": not output.save_only_model,
    }
    return dataclasses.replace(
        job,
        output=output.model_copy(update=keys | tracked),
        ray=ray.model_copy(update={"ray_run_name": f"{job.run_name}-{name}"}),
        data=job.data.model_copy(update={"overwrite_cache": False}),
    )


def converts(job: JobConfig) -> bool:
    """Whether a job exports a converted model, so that this has a loss of its own."""
    return any(t.enabled and t.converts for t in job.transforms)


def default_metric(jobs: Iterable[JobConfig]) -> MetricName:
    """Return the metric of a sweep section that names none."""
    return CONVERTED_LOSS if all(map(converts, jobs)) else "eval_loss"
