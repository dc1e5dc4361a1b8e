"""Load a YAML file and key=value overrides into a JobConfig, or report all problems at once."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from raytrain_adv.config import rules, sweep
from raytrain_adv.config.job import SECTIONS, JobConfig, SectionType, section_types, transform_types
from raytrain_adv.config.llamafactory import translate
from raytrain_adv.config.llamafactory.keys import RENAMED, WRITTEN_AS
from raytrain_adv.config.problems import ON_COMMAND_LINE, Problem, job_error, show
from raytrain_adv.config.schema import describe, field_schemas
from raytrain_adv.config.section import Section, unknown_user
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.config.sweep import Sweep, SweepOptions, Trial
from raytrain_adv.config.yaml_source import MAX_DEPTH, Document, Entry, read_file, read_value
from raytrain_adv.redaction import secrets_in
from raytrain_adv.text import nearest

COMMAND_LINE = "command line"
Checked = tuple[JobConfig, list[Problem]]
_STAND_IN = "?"
"""Value of a missing or wrong required key, so that the rules between other keys still apply."""


def load(path: str | Path, overrides: Iterable[str] | None = None) -> JobConfig:
    """Return the job of a YAML file, with `key=value` overrides applied. Raises JobError listing
    every problem of the file and the overrides, with line numbers; if they contain secrets, listing
    only those, because other problems could repeat them.
    """
    overrides, source = list(overrides or ()), str(path)
    document = read_file(Path(path))
    _refuse_secrets(source, document.entries, overrides)
    if document.problems and not document.entries:
        raise job_error(source, document.problems)
    if other := translate.other_file({key: one.value for key, one in document.entries.items()}):
        raise job_error(source, [other])
    _override(document, overrides)
    section = document.entries.pop(sweep.KEY, None)
    if section is not None and section.value is not None:
        return _valid(source, document, *_check_sweep(source, document, section))
    job, found = _check(source, document)
    if left_out := _left_out(document, job):
        job, found = _check(source, document)
        job = replace(job, notes=(*job.notes, *left_out))
    return _valid(source, document, job, found)


def _left_out(document: Document, job: JobConfig) -> list[str]:
    """Take out the file's keys of features that the command line turns off; return a note of each.
    In a file alone they are refused: there they can be deleted.
    """
    entries, notes = document.entries, []
    for transform, switches, key in list(rules.unused(job)):
        switches = [next(iter(type(transform).model_fields)), *switches]
        by = [one for one in switches if one in entries and entries[one].where == COMMAND_LINE]
        if by and key in entries and entries[key].where != COMMAND_LINE:
            off = f"{by[0]}={show(entries[by[0]].value, by[0])}"
            where = entries.pop(key).where
            notes.append(f"{where}: {key} is left out: {off} turns its feature off")
    return sorted(notes)


def load_keys(
    keys: Mapping[str, Any], source: str, overrides: Iterable[str] | None = None
) -> JobConfig:
    """Return the job of keys as JobConfig.flat returns them, with `key=value` overrides applied.

    Keys at their defaults count as not given; `source` is the keys' origin, for messages. Raises
    JobError listing every problem.
    """
    defaults = {key: kind.default(key) for kind in section_types() for key in kind.model_fields}
    given = {k: v for k, v in keys.items() if k not in defaults or v != defaults[k]}
    document = Document({key: Entry(value, source) for key, value in given.items()})
    overrides = list(overrides or ())
    _refuse_secrets(source, {}, overrides)
    _override(document, overrides)
    return _valid(source, document, *_check(source, document))


def _valid(source: str, document: Document, job: JobConfig, found: list[Problem]) -> JobConfig:
    problems = [*document.problems, *found]
    if problems:
        raise job_error(source, sorted(problems, key=_place))
    return job


def _check_sweep(source: str, document: Document, section: Entry) -> Checked:
    """Check the job of every trial, and return the first one's with the sweep."""
    owned = {key for kind in section_types() for key in kind.model_fields}
    known = owned | {key for key, ours in RENAMED.items() if ours in owned}
    parts = sweep.take_apart(section, document.entries, known)
    options, wrong = _section(SweepOptions, parts.options, set())
    problems = [
        *parts.problems,
        *(parts.problem(p.key, p.text, p.fix) for p in wrong),
        *sweep.option_problems(parts, options),
    ]
    seed = _check(source, document)[0].train.seed
    every = [] if problems else sweep.combinations(parts.axes, options.num_samples, seed)
    to_check = every or [{a.key: a.values[0] for a in parts.axes}]
    jobs = []
    for values in (*to_check, *sweep.extremes(parts.axes, to_check[0])):
        swept = {a.key: Entry(values[a.key], a.where) for a in parts.axes}
        job, found = _check(source, Document({**document.entries, **swept}))
        jobs.append(job)
        problems += found
    del jobs[len(to_check) :]
    metric = options.metric or sweep.default_metric(jobs)
    if not problems:
        late = sweep.metric_problems(parts, options, metric, jobs)
        problems = [p.at(_where(p, document) or section.where) for p in late]
    trials = tuple(
        Trial(name, values, sweep.as_trial(job, name))
        for name, values, job in zip(sweep.names(every), every, jobs, strict=False)
    )
    whole = Sweep(options, tuple(a.key for a in parts.axes), metric, trials)
    notes = [*(a.note for a in parts.axes if a.note), *(note for job in jobs for note in job.notes)]
    if jobs[0].hub.push_to_hub:
        notes.append(
            "push_to_hub: models of trials are not uploaded; the best job, run by itself, is"
        )
    job = replace(jobs[0], sweep=whole, notes=tuple(dict.fromkeys(notes)))
    return job, list(dict.fromkeys(problems))


def _check(source: str, document: Document) -> Checked:
    kinds = section_types()
    owned = frozenset(key for kind in kinds for key in kind.model_fields)
    values = {key: entry.value for key, entry in document.entries.items()}
    translated = translate.translate(values, owned)
    problems = [*translated.problems, *(_unknown(key, owned) for key in translated.unknown)]
    refused = {translated.names.get(p.key, p.key) for p in problems}
    meant = {name for key in translated.unknown if (name := _meant(key, owned))}
    refused |= meant
    sections: dict[type[Section], Section] = {}
    for kind in kinds:
        given = {key: value for key, value in translated.keys.items() if key in kind.model_fields}
        sections[kind], wrong = _section(kind, given, refused)
        refused |= {problem.key for problem in wrong}
        problems += wrong
    for kind in transform_types():
        if meant & set(list(kind.model_fields)[:1]):  # its switch is misspelled: it is not off
            refused |= set(kind.model_fields)
    job = JobConfig(
        **{name: sections[kind] for name, kind in SECTIONS.items()},  # type: ignore[arg-type]  # one kind per name
        transforms=tuple(sections[kind] for kind in transform_types()),
        source=source,
    )
    contradictions = [p for section in job.sections() for p in section.contradictions()]
    contradictions += rules.contradictions(job)
    problems += [p for p in contradictions if not refused & set(p.keys)]
    names = translated.names
    named = [replace(p, key=" and ".join(names.get(k, k) for k in p.keys)) for p in problems]
    notes = [*translated.notes, *(() if problems else rules.notes(job))]
    return replace(job, notes=tuple(notes)), [p.at(_where(p, document)) for p in named]


def _section(
    kind: type[SectionType], given: Mapping[str, Any], refused: set[str]
) -> tuple[SectionType, list[Problem]]:
    """Return the section with the correct values, and a problem for each of the others."""
    values = {key: _as_written(kind, key, value) for key, value in given.items()}
    problems = {key: _bool_for_number(kind, key, value) for key, value in values.items()}
    wrong = {key: problem for key, problem in problems.items() if problem is not None}
    try:
        whole = kind.model_validate({k: v for k, v in values.items() if k not in wrong})
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            key = str(detail["loc"][0])
            if key not in values:
                missing = f"missing: {kind.sentence(key)}"
                wrong[key] = Problem(missing, f"add {key}: ...", key)
            elif key not in wrong:
                wrong[key] = _wrong_value(kind, key, values[key])
        right = {key: value for key, value in values.items() if key not in wrong}
        stand_ins = {k: _STAND_IN for k in wrong if kind.model_fields[k].is_required()}
        whole = kind.model_validate(right | stand_ins)
    return whole, [problem for key, problem in wrong.items() if key not in refused]


def with_keys(section: SectionType, given: Iterable[str]) -> SectionType:
    """Return a section with key=value arguments applied. Raises JobError naming each wrong one."""
    kind, problems, values = type(section), list[Problem](), dict[str, Any]()
    for item in given:
        key, equals, text = item.partition("=")
        if equals and key in kind.model_fields:
            values[key] = _value_or_text(text)
        else:
            near, known = nearest(key, kind.model_fields), ", ".join(kind.model_fields)
            fix = f"did you mean {near}?" if near else f"there are {known}"
            problems.append(Problem(f"{show(item)} is not one of the keys", fix))
    whole, wrong = _section(kind, {**section.model_dump(), **values}, set())
    if problems := problems + wrong:
        raise job_error(ON_COMMAND_LINE, problems)
    return whole


def _as_written(kind: type[Section], key: str, value: Any) -> Any:
    """Parse a mapping in quotes, as LLaMA-Factory's ray_init_kwargs: '{"address": "auto"}'."""
    annotation = str(kind.model_fields[key].annotation)
    is_mapping = isinstance(value, str) and value.lstrip().startswith("{")
    return _value_or_text(value) if is_mapping and "dict[" in annotation else value


def _value_or_text(text: str) -> Any:
    try:
        return read_value(text)
    except ValueError:
        return text


def _bool_for_number(kind: type[Section], key: str, value: Any) -> Problem | None:
    """Refuse true and false for numbers, which pydantic would read as 1 and 0."""
    annotation = kind.model_fields[key].annotation
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = any(isinstance(one, bool) for one in (value, *inner))
    if found and not _mentions(annotation, bool) and not _mentions(annotation, Any):
        return _wrong_value(kind, key, value)
    return None


def _mentions(annotation: Any, kind: Any) -> bool:
    return annotation is kind or any(_mentions(part, kind) for part in get_args(annotation))


def _wrong_value(kind: type[Section], key: str, value: Any) -> Problem:
    field, schema = kind.model_fields[key], field_schemas(kind)[key]
    accepted = describe(schema)
    fix = f"give {accepted}"
    if value is None:
        if not field.is_required():
            fix += f", or delete the line for the default, {show(kind.default(key))}"
        return Problem("it has no value", fix, key)
    parts = list(_parts(schema))
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value > LARGEST and any(part.get("maximum") == LARGEST for part in parts):
            fix += f", at most {LARGEST}"
        if _mentions(field.annotation, str):
            fix += f"; as text it is written {key}: '{show(value)}'"
    choices = [o for part in parts for o in (*part.get("enum", ()), part.get("const"))]
    strings = [choice for choice in choices if isinstance(choice, str)]
    if isinstance(value, str) and (meant := nearest(value, strings, 0.5)):
        fix = f"did you mean {meant}? It takes {accepted}"
    reason = kind.why_not(key, value) or unknown_user(value)
    text = f"{show(value, key)} is not accepted" + (f": {reason}" if reason else "")
    return Problem(text, fix, key)


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a schema, its alternatives and the items of its list."""
    yield schema
    for inner in (*schema.get("anyOf", ()), schema.get("items", {})):
        yield from _parts(inner) if inner else ()


def _meant(key: str, owned: frozenset[str]) -> str | None:
    """Return the key that was probably meant."""
    normal = key.strip().lower().replace("-", "_").lstrip("_")
    near = WRITTEN_AS.get(normal) or nearest(normal, sorted(owned), 0.7)
    # A key that would be refused must be almost the same to be worth naming.
    return near or nearest(normal, sorted(translate.known_keys()), 0.85)


def _unknown(key: str, owned: frozenset[str]) -> Problem:
    if not key.strip():
        return Problem("a key without a name", "delete the line, or name the key")
    near = _meant(key, owned)
    fix = f"did you mean {near}?" if near else "delete it; `raytrain-adv schema` lists the keys"
    return Problem("there is no such key", fix, key)


def _refuse_secrets(source: str, entries: Mapping[str, Entry], overrides: Iterable[str]) -> None:
    """Refuse secrets in values, at any depth, and in overrides: the error never shows them."""
    given = [(key, entry.value, entry.where) for key, entry in entries.items()]
    for item in overrides:
        key, _, text = item.lstrip("-").partition("=")
        given.append((key, _value_or_text(text), COMMAND_LINE))
    found: dict[Problem, None] = {}
    for key, value, where in given:
        for place, kind in secrets_in(key, value):
            fix = f"remove it, and put it where it is not shown: {kind.place}"
            found[Problem(f"{kind.name}, which a job must not contain", fix, place, where)] = None
    if found:
        raise job_error(source, found)


def _override(document: Document, overrides: Iterable[str]) -> None:
    for item in overrides:
        key, equals, text = item.partition("=")
        try:
            problem = _misspelled(key, bool(equals), item) or _put(document, key, read_value(text))
        except ValueError as error:
            fix = f"put the value in quotes: '{key[:80]}=\"...\"'"
            problem = Problem(str(error), fix, key[:80])
        if problem:
            document.problems.append(problem.at(COMMAND_LINE))


def _misspelled(key: str, has_value: bool, item: str) -> Problem | None:
    if item.startswith("-"):
        plain = item.lstrip("-").replace("-", "_", item.partition("=")[0].count("-"))
        fix = f"write {plain if has_value else 'key=value'}"
        return Problem(f"{show(item)}: keys are written without dashes", fix)
    if not has_value or not key.strip():
        return Problem(f"{show(item)} is not key=value", "write key=value, as learning_rate=1e-4")
    names = key.split(".")
    if not all(name.strip() for name in names) or len(names) > MAX_DEPTH:
        fix = "write key=value, or for a place inside a mapping key.name=value"
        return Problem(f"{show(key)} is not a key, or a key with a dot and a name", fix)
    return None


def _put(document: Document, key: str, value: Any) -> Problem | None:
    """Set a key, or with dots a place inside a mapping; refuse a place inside any other value."""
    head, *rest = key.split(".")
    if not rest:
        document.entries[head] = Entry(value, COMMAND_LINE)
        return None
    old = document.entries.get(head, Entry({}, COMMAND_LINE))
    if old.value is not None and not isinstance(old.value, dict):
        text = f"{head} is {show(old.value, head)}, not a mapping, so it has no {'.'.join(rest)}"
        return Problem(text, f"write {head}=value", key)
    for name in reversed(rest):
        value = {name: value}
    places = {**old.inner, rest[0]: COMMAND_LINE}
    document.entries[head] = Entry(_merge(old.value or {}, value), COMMAND_LINE, places)
    return None


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = _merge(inner, value) if both else value  # type: ignore[arg-type]  # both are dicts
    return result


def _where(problem: Problem, document: Document) -> str:
    """Return the places of a problem's keys, as `line 3, line 8`; missing keys have none."""
    places = [document.entries[key].where for key in problem.keys if key in document.entries]
    return ", ".join(dict.fromkeys(places))


def _place(problem: Problem) -> int:
    """Sort by line; problems without a line first, the command line last."""
    if problem.where.startswith(COMMAND_LINE):
        return 10**9
    number = re.search(r"\d+", problem.where)
    return int(number.group()) if number else 0
