"""The sweep section: values for keys of the job, all resulting trials, and their problems."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from raytrain_adv.config.hub import HubConfig
from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.section import Section
from raytrain_adv.text import nearest

if TYPE_CHECKING:
    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.config.yaml_source import Entry

SWITCH = "fake_quant_after_n_steps"
NEVER = "never"
"""Value of the switch that trains in bf16 and quantizes at the end: PTQ."""
MAX_TRIALS = 500
MAX_NAME = 120
CONVERTED_LOSS: Literal["quantized_eval_loss"] = "quantized_eval_loss"
"""Held-out loss of the converted model that is exported."""
DISTRIBUTIONS = ("choice", "uniform", "loguniform", "randint")
MetricName = Literal[
    "eval_loss",
    "quantized_eval_loss",
    "train_loss",
    "tokens_per_second_per_worker",
    "step_seconds",
    "peak_memory_gib",
    "mfu_bf16",
]
METRICS: Mapping[str, Literal["min", "max"]] = {
    name: "max" if name in ("tokens_per_second_per_worker", "mfu_bf16") else "min"
    for name in get_args(MetricName)
}
"""Metric to compare trials by -> whether the lowest or the highest value is best."""
KNOWN_EARLY = ("eval_loss", CONVERTED_LOSS, "train_loss")
"""Metrics that are known, exactly or approximately, while a trial runs."""
SET_BY_THE_SWEEP = frozenset([
    "output_dir", "overwrite_output_dir", "delete_previous_run", "resume_from_checkpoint",
    "run_name", "ray_run_name",
    "ray_storage_path", "ray_init_kwargs", "overwrite_cache",
])  # fmt: skip
"""Keys of the whole sweep, or that it sets for each trial."""
KEY = "sweep"
EXAMPLE = "write sweep: with lines as `learning_rate: [1e-5, 2e-5]` below it"
A_LIST = (
    "give a list, or one of {choice: [...]}, {uniform: [low, high]}, {loguniform: [low, high]}, "
    "{randint: [low, high]}"
)
ELSEWHERE = {
    "mode": "delete it: the metric decides whether lower or higher is better",
    **dict.fromkeys(("keys", "parameters"), "write the keys to sweep over directly below sweep:"),
}


class SweepOptions(Section):
    """How a sweep runs; its other keys are keys of the job, with lists of values."""

    metric: MetricName | None = None
    """The metric that ranks finished trials, a loss that of the model each exports; null means
    quantized_eval_loss if every trial exports a converted model, else eval_loss."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials early that perform worse than the others; none runs each to its end."""
    num_samples: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 8
    """Draws from the distributions; the same ones for each combination of the listed values."""
    max_concurrent_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | Literal["auto"] = "auto"
    """Trials at the same time, at most as many as fit the cluster; auto means that many."""
    grace_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """asha first judges a trial after this many steps, counted from the trial's
    fake_quant_after_n_steps; null means a tenth of all steps."""
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 3
    """asha compares trials at grace_steps, and at each multiple by this factor; about one in this
    many continues."""
    keep_models: Literal["all", "best"] = "all"
    """best deletes the models and checkpoints of all trials but the best so far; reports stay."""


@dataclass(frozen=True)
class Axis:
    """A swept key."""

    key: str
    where: str
    """Its line in the file, as `line 12`."""
    values: tuple[Any, ...]
    """The listed values; of a distribution its choices, or its lowest and its highest value."""
    distribution: str = ""
    """One of DISTRIBUTIONS; empty for listed values."""
    note: str = ""
    """For the user: how the values were changed."""

    def draw(self, rng: random.Random) -> Any:
        """Return one value; numbers that are not whole have four significant digits."""
        if self.distribution == "choice":
            return rng.choice(self.values)
        low, high = self.values
        if self.distribution == "randint":
            return rng.randint(low, high)
        share = rng.random()
        value = low + (high - low) * share
        if self.distribution == "loguniform":
            value = low * (high / low) ** share
        return min(max(float(f"{value:.4g}"), low), high)


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


@dataclass
class Parts:
    """A parsed sweep section."""

    options: dict[str, Any] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    """Key of the section -> its line."""
    problems: list[Problem] = field(default_factory=list)

    def problem(self, key: str, text: str, fix: str) -> Problem:
        """Return a problem of one of the section's keys, with its line if it was given."""
        return Problem(text, fix, f"{KEY}.{key}", self.places.get(key, ""))


def take_apart(section: Entry, fixed: Mapping[str, Entry], known: Collection[str]) -> Parts:
    """Parse a section; `fixed` are the job's other keys, `known` all that a job may have."""
    parts = Parts()
    if not isinstance(section.value, dict):
        text = f"{show(section.value)} is not a list of keys with values"
        parts.problems.append(Problem(text, EXAMPLE, KEY, section.where))
        return parts
    for key, value in section.value.items():
        parts.places[key] = where = section.inner.get(str(key), section.where)
        if key in SweepOptions.model_fields:
            parts.options[key] = value
        elif problem := _refused(parts, key, fixed, known):
            parts.problems.append(problem)
        else:
            try:
                parts.axes.append(axis(key, value, where))
            except ValueError as error:
                parts.problems.append(parts.problem(key, str(error), A_LIST))
    if not parts.axes and not parts.problems:
        parts.problems.append(Problem("no key is swept over", EXAMPLE, KEY, section.where))
    return parts


def _refused(
    parts: Parts, key: str, fixed: Mapping[str, Entry], known: Collection[str]
) -> Problem | None:
    if key in SET_BY_THE_SWEEP:
        text = "it belongs to the sweep as a whole, not to a trial"
        return parts.problem(key, text, "write it outside of sweep")
    if key not in known:
        near = nearest(str(key), [*known, *SweepOptions.model_fields], 0.7)
        fix = f"did you mean {near}?" if near else "`raytrain-adv schema` lists the keys"
        return parts.problem(key, "there is no such key", ELSEWHERE.get(key, fix))
    if key in fixed:
        both = ", ".join(dict.fromkeys((fixed[key].where, parts.places[key])))
        text = f"fixed to {show(fixed[key].value, key)} by the one, swept over by the other"
        return Problem(text, "delete one of the two lines", f"{key} and {KEY}.{key}", both)
    return None


def axis(key: str, value: Any, where: str) -> Axis:
    """Return the values of a swept key, or raise a ValueError that names what is wrong with them.

    Of null and 0, which both begin with fake quantization, one is kept; and the trial without it
    (PTQ) is added to those that begin it at some listed step.
    """
    kind, values = _distribution(value) if isinstance(value, dict) else ("", _listed(key, value))
    if key != SWITCH:
        return Axis(key, where, values, kind)
    note = ""
    if None in values and any(type(v) is int and v == 0 for v in values):
        values = tuple(v for v in values if v is not None)
        note = f"{SWITCH}: null and 0 are one trial: fake quantization begins with either"
    never = () if kind or NEVER in values else (NEVER,)
    return Axis(key, where, values + never, kind, note)


def _listed(key: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{show(value, key)} is one value; a sweep takes a list of values")
    if not value:
        raise ValueError("the list of values is empty")
    return _distinct(value)


def _distribution(value: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    if len(value) != 1 or next(iter(value)) not in DISTRIBUTIONS:
        raise ValueError(f"{show(value)} is not a distribution")
    kind, of = next(iter(value.items()))
    if kind == "choice":
        if not isinstance(of, list) or not of:
            raise ValueError(f"choice takes a list of values, not {show(of)}")
        return kind, _distinct(of)
    wanted = ""
    is_pair = isinstance(of, list) and len(of) == 2 and all(map(_is_number, of))
    if not is_pair or of[0] >= of[1]:
        wanted = "the lowest value and the highest, as [1, 8]"
    elif kind == "loguniform" and of[0] <= 0:
        wanted = "values above 0"
    elif kind == "randint" and not all(isinstance(end, int) for end in of):
        wanted = "whole numbers"
    if wanted:
        raise ValueError(f"{kind} takes {wanted}; this is {show(of)}")
    return kind, tuple(of)


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
    Each draw has its own seed, so that more draws begin with the same ones.
    """
    listed = [a for a in axes if not a.distribution]
    drawn = [a for a in axes if a.distribution]
    draws = [
        {a.key: a.draw(random.Random(f"{seed} {number} {a.key}")) for a in drawn}
        for number in range(num_samples if drawn else 1)
    ]
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
    return any(a.key == SWITCH and a.distribution and NEVER not in a.values for a in axes)


def count(axes: Sequence[Axis], num_samples: int) -> int:
    """Return the number of trials, without creating them."""
    draws = num_samples if any(a.distribution for a in axes) else 1
    listed = math.prod(len(a.values) for a in axes if not a.distribution)
    return listed * (draws + _draws_the_switch(axes))


def extremes(axes: Sequence[Axis], first: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the first trial's values with each distribution at its ends."""
    for a in axes:
        for value in a.values if a.distribution else ():
            yield {**first, a.key: value}


def names(all_values: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a unique folder name for each trial, from its values alone: more values keep them."""
    found: list[str] = []
    for values in all_values:
        name = ",".join(f"{key}={_plain(value)}" for key, value in values.items())
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
    output = job.output
    keys = {
        "output_dir": str(Path(output.output_dir) / "trials" / name),
        "overwrite_output_dir": False,
        "delete_previous_run": False,
        "resume_from_checkpoint": not output.save_only_model,
        "run_name": f"{output.run_name}-{name}" if output.run_name is not None else None,
    }
    return dataclasses.replace(
        job,
        notes=(),
        hub=HubConfig(),
        output=output.model_copy(update=keys),
        ray=job.ray.model_copy(update={"ray_run_name": f"{job.run_name}-{name}"}),
        data=job.data.model_copy(update={"overwrite_cache": False}),
    )


def converts(job: JobConfig) -> bool:
    """Whether a job exports a converted model, so that this has a loss of its own."""
    return any(t.enabled and t.converts for t in job.transforms)


def default_metric(jobs: Iterable[JobConfig]) -> MetricName:
    """Return the metric of a sweep section that names none."""
    return CONVERTED_LOSS if all(map(converts, jobs)) else "eval_loss"


def option_problems(parts: Parts, options: SweepOptions) -> Iterator[Problem]:
    """Find options without effect, and too many trials."""
    number = count(parts.axes, options.num_samples)
    if number > MAX_TRIALS:
        fix = "list fewer values, or draw from them: {choice: [...]} with num_samples"
        yield Problem(f"{number} trials; at most {MAX_TRIALS} can be run", fix, KEY)
    if "num_samples" in options.model_fields_set and not any(a.distribution for a in parts.axes):
        text = "it changes nothing: every value is listed, none is drawn"
        yield parts.problem("num_samples", text, "delete it, or give a distribution")
    for key in ("grace_steps", "reduction_factor"):
        if key in options.model_fields_set and options.scheduler != "asha":
            text = "it changes nothing: scheduler is none"
            yield parts.problem(key, text, "set scheduler: asha, or delete it")


def metric_problems(
    parts: Parts, options: SweepOptions, metric: str, jobs: Sequence[JobConfig]
) -> Iterator[Problem]:
    """Find a metric that a trial lacks, or reports too late for the scheduler."""
    if metric in ("eval_loss", CONVERTED_LOSS) and not all(j.data.holds_rows_out for j in jobs):
        default = "" if options.metric is not None else ", the default"
        text = f"{metric}{default}, is the loss on held-out rows, and none are held out"
        fix = "hold rows out with val_size, or choose another metric"
        yield parts.problem("metric", text, fix)
    if metric == CONVERTED_LOSS and not all(map(converts, jobs)):
        kind = next(type(t) for t in jobs[0].transforms if t.converts)
        text = f"a trial without {kind.feature} has no {kind.converts} model"
        fix = f"set {next(iter(kind.model_fields))}: true, or metric: eval_loss"
        yield parts.problem("metric", text, fix)
    if any(isinstance(j.output.resume_from_checkpoint, str) for j in jobs):
        fix = "set resume_from_checkpoint: true: each trial continues from its own checkpoints"
        yield Problem("a sweep cannot start from a checkpoint", fix, "resume_from_checkpoint")
    if any(j.ray.ends for j in jobs):
        text = "trials that run at the same time need a fixed number of workers each"
        yield Problem(text, "give one number, the workers of each trial", "ray_num_workers")
    if any(j.flat().get("compare") for j in jobs):
        fix = "set compare: false; the sweep has PTQ among its trials"
        yield Problem("every trial would train its own twin", fix, "compare")
    if options.scheduler == "asha" and metric not in KNOWN_EARLY:
        text = f"{metric} is known only at a trial's end, too late to stop it"
        fix = f"choose one of {', '.join(KNOWN_EARLY)}, or scheduler: none"
        yield parts.problem("scheduler", text, fix)
    unevaluated = metric != "train_loss" and any(j.output.eval_strategy == "no" for j in jobs)
    if options.scheduler == "asha" and metric in KNOWN_EARLY and unevaluated:
        text = "asha needs evaluations during a run, and eval_strategy is no"
        yield parts.problem("scheduler", text, "set eval_strategy: steps and eval_steps")
