"""Parse a sweep section, and find its problems."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytrain_adv.config.job import JobConfig, transform_types
from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.sweep import (
    CONVERTED_LOSS,
    MAX_TRIALS,
    SET_BY_THE_SWEEP,
    Axis,
    SweepOptions,
    axis,
    converts,
    count,
)
from raytrain_adv.config.yaml_source import Entry
from raytrain_adv.text import nearest

KEY = "sweep"
EXAMPLE = "write sweep: with lines as `learning_rate: [1e-5, 2e-5]` below it"
KNOWN_EARLY = ("eval_loss", CONVERTED_LOSS, "train_loss")
"""Metrics that are known, exactly or approximately, while a trial runs."""
ELSEWHERE = {
    "mode": "delete it: the metric decides whether lower or higher is better",
    "keys": "write the keys to sweep over directly below sweep:",
    "parameters": "write the keys to sweep over directly below sweep:",
}


@dataclass
class Parts:
    """A parsed sweep section."""

    options: dict[str, Any] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    """Key of the section -> its line."""
    problems: list[Problem] = field(default_factory=list)


def take_apart(section: Entry, fixed: Mapping[str, Entry], known: Collection[str]) -> Parts:
    """Parse a section into its options and its swept keys.

    Args:
        section: the value of `sweep`.
        fixed: the other keys of the job.
        known: every key that a job may have.
    """
    parts = Parts()
    if not isinstance(section.value, dict):
        text = f"{show(section.value)} is not a list of keys with values"
        parts.problems.append(Problem(text, EXAMPLE, KEY, section.where))
        return parts
    for key, value in section.value.items():
        where = section.inner.get(str(key), section.where)
        parts.places[key] = where
        if key in SweepOptions.model_fields:
            parts.options[key] = value
        elif problem := _refused(key, where, fixed, known):
            parts.problems.append(problem)
        else:
            try:
                parts.axes.append(axis(key, value, where))
            except ValueError as error:
                fix = "give a list, or one of {choice: [...]}, {uniform: [low, high]}, "
                fix += "{loguniform: [low, high]}, {randint: [low, high]}"
                parts.problems.append(Problem(str(error), fix, f"{KEY}.{key}", where))
    if not parts.axes and not parts.problems:
        parts.problems.append(Problem("no key is swept over", EXAMPLE, KEY, section.where))
    return parts


def _refused(
    key: str, where: str, fixed: Mapping[str, Entry], known: Collection[str]
) -> Problem | None:
    name = f"{KEY}.{key}"
    if key in SET_BY_THE_SWEEP:
        text = "it belongs to the sweep as a whole, not to a trial"
        return Problem(text, "write it outside of sweep", name, where)
    if key not in known:
        near = nearest(str(key), [*known, *SweepOptions.model_fields], 0.7)
        fix = f"did you mean {near}?" if near else "`raytrain-adv schema` lists the keys"
        return Problem("there is no such key", ELSEWHERE.get(key, fix), name, where)
    if key in fixed:
        both = ", ".join(dict.fromkeys((fixed[key].where, where)))
        text = f"fixed to {show(fixed[key].value, key)} by the one, swept over by the other"
        return Problem(text, "delete one of the two lines", f"{key} and {name}", both)
    return None


def option_problems(parts: Parts, options: SweepOptions) -> Iterable[Problem]:
    """Find options without effect, and too many trials."""
    number = count(parts.axes, options.num_samples)
    if number > MAX_TRIALS:
        fix = "list fewer values, or draw from them: {choice: [...]} with num_samples"
        yield _at(parts, KEY, f"{number} trials; at most {MAX_TRIALS} can be run", fix)
    drawn = any(a.distribution is not None for a in parts.axes)
    if "num_samples" in options.model_fields_set and not drawn:
        text = "it changes nothing: every value is listed, none is drawn"
        yield _at(parts, "num_samples", text, "delete it, or give a distribution")
    for key in ("grace_steps", "reduction_factor"):
        if key in options.model_fields_set and options.scheduler != "asha":
            text = "it changes nothing: scheduler is none"
            yield _at(parts, key, text, "set scheduler: asha, or delete it")


def metric_problems(
    parts: Parts, options: SweepOptions, metric: str, jobs: Sequence[JobConfig]
) -> Iterable[Problem]:
    """Find a metric that a trial lacks, or reports too late for the scheduler."""
    held_out = all(j.data.eval_dataset is not None or j.data.val_size > 0 for j in jobs)
    asked = "" if options.metric is not None else ", the default"
    if metric in ("eval_loss", CONVERTED_LOSS) and not held_out:
        text = f"{metric}{asked}, is the loss on held-out rows, and none are held out"
        yield _at(parts, "metric", text, "hold rows out with val_size, or choose another metric")
    if metric == CONVERTED_LOSS and not all(map(converts, jobs)):
        kind = next(kind for kind in transform_types() if kind.converts)
        text = f"a trial without {kind.feature} has no {kind.converts} model"
        key = next(iter(kind.model_fields))
        yield _at(parts, "metric", text, f"set {key}: true, or metric: eval_loss")
    resumes = {str(j.output.resume_from_checkpoint) for j in jobs}
    if resumes - {"None", "True", "False"}:
        fix = "set resume_from_checkpoint: true: each trial continues from its own checkpoints"
        yield Problem("a sweep cannot start from a checkpoint", fix, "resume_from_checkpoint")
    if any(j.ray.ends for j in jobs):
        text = "trials that run at the same time need a fixed number of workers each"
        yield Problem(text, "give one number, the workers of each trial", "ray_num_workers")
    if any(j.flat().get("compare") for j in jobs):
        fix = "set compare: false; the sweep has PTQ among its trials"
        yield Problem("every trial would train its own twin", fix, "compare")
    if options.scheduler == "asha":
        if metric not in KNOWN_EARLY:
            text = f"{metric} is known only at a trial's end, too late to stop it"
            fix = f"choose one of {', '.join(KNOWN_EARLY)}, or scheduler: none"
            yield _at(parts, "scheduler", text, fix)
        elif metric != "train_loss" and any(j.output.eval_strategy == "no" for j in jobs):
            text = "asha needs evaluations during a run, and eval_strategy is no"
            yield _at(parts, "scheduler", text, "set eval_strategy: steps and eval_steps")


def _at(parts: Parts, key: str, text: str, fix: str) -> Problem:
    name = key if key == KEY else f"{KEY}.{key}"
    return Problem(text, fix, name, parts.places.get(key, ""))
