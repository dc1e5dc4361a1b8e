"""Compare a transform's plan with other plans and, afterwards, with the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.text import listed
from raytrain_adv.transforms.transform import Plan, Transform

if TYPE_CHECKING:
    from torch import nn


def kinds(model: nn.Module, transform: Transform) -> dict[str, str]:
    """Return the class of every module by fqn, as the transform names it."""
    return {fqn: transform.what_is(module) for fqn, module in model.named_modules()}


def refuse_empty(transform: Transform, plan: Plan) -> None:
    """Refuse a plan that changes nothing: the job would train without a feature it enables.

    Raises:
        JobError: with the reasons for which modules were skipped.
    """
    if plan.changes or plan.empty_because:
        return
    reasons = Counter(plan.skipped.values())
    raise JobError(
        f"{transform.name} is enabled but would not change any module",
        "\n".join(f"{count} modules: {reason}" for reason, count in reasons.most_common(4))
        or "no module of the model is of a kind it changes",
        f"turn it off, or change its keys: {', '.join(type(transform).model_fields)}",
    )


def give_way(plan: Plan, earlier: Mapping[str, Plan]) -> Plan:
    """Return the plan without the modules that it leaves to earlier transforms."""
    left = {
        fqn: f"computed by {name}"
        for name in sorted(plan.gives_way_to & earlier.keys())
        for fqn in plan.changes
        if _touches(fqn, earlier[name].changes)
    }
    kept = {fqn: change for fqn, change in plan.changes.items() if fqn not in left}
    return replace(plan, changes=kept, skipped={**plan.skipped, **left})


def refuse_conflict(transform: Transform, plan: Plan, earlier: Iterable[tuple[str, Plan]]) -> None:
    """Refuse to change a module that an earlier transform changed, or one that contains or is part
    of one.

    Args:
        transform: whose plan it is.
        plan: what it would change.
        earlier: stage and plan of each transform before it.

    Raises:
        JobError: naming both transforms and the modules, unless this transform stacks on the
            earlier one.
    """
    for stage, other in earlier:
        if {other.transform, stage} & transform.stacks_on:
            continue
        shared = [fqn for fqn in plan.changes if _touches(fqn, other.changes)]
        if shared:
            name = other.transform
            raise JobError(
                f"{transform.name} and {name} would both change the same modules",
                f"{len(shared)} of them: {listed(shared)}",
                f"turn one of the two off, or keep {transform.name} away from what {name} changes",
            )


def _touches(fqn: str, owned: Mapping[str, object]) -> bool:
    if fqn in owned or any(parent in owned for parent in _parents(fqn)):
        return True
    return fqn != "" and any(other.startswith(f"{fqn}.") for other in owned)


def _parents(fqn: str) -> Iterator[str]:
    while "." in fqn:
        fqn = fqn.rpartition(".")[0]
        yield fqn


def verify(transform: Transform, model: nn.Module, plan: Plan, before: Mapping[str, str]) -> None:
    """Compare the model with the plan: what was planned is there, and no other module has become
    one of the planned classes.

    Raises:
        TrainingError: naming the modules that differ.
    """
    now = kinds(model, transform)
    due = {
        fqn: change.after if change.part == "class" else change.before
        for fqn, change in plan.changes.items()
    }
    wrong = [
        f"{fqn} is {now.get(fqn, 'gone')}, planned {kind}"
        for fqn, kind in due.items()
        if now.get(fqn) != kind
    ]
    planned = {due[fqn] for fqn, change in plan.changes.items() if due[fqn] != change.before}
    stray = [
        f"{fqn} became {kind}, which was not planned"
        for fqn, kind in now.items()
        if kind in planned and fqn not in plan.changes and before.get(fqn) != kind
    ]
    _refuse_differences(plan, wrong + stray)


def own_forwards(model: nn.Module) -> dict[str, object]:
    """Return the function of each forward pass that is bound to a module instead of its class's."""
    found = {fqn: vars(module).get("forward") for fqn, module in model.named_modules()}
    return {fqn: getattr(f, "__func__", f) for fqn, f in found.items() if f is not None}


def verify_forwards(model: nn.Module, plan: Plan, before: Mapping[str, object]) -> None:
    """Check that the planned forward passes were replaced, and no others.

    Raises:
        TrainingError: naming the modules that differ.
    """
    now = own_forwards(model)
    planned = {fqn: c.after for fqn, c in plan.changes.items() if c.part == "forward"}
    wrong = [
        f"{fqn} has the forward pass it had, planned {after}"
        for fqn, after in planned.items()
        if now.get(fqn) is before.get(fqn) or now[fqn] is type(model.get_submodule(fqn)).forward
    ]
    stray = [
        f"{fqn} has another forward pass, which was not planned"
        for fqn in now.keys() | before.keys()
        if fqn not in planned and now.get(fqn) is not before.get(fqn)
    ]
    _refuse_differences(plan, wrong + sorted(stray))


def _refuse_differences(plan: Plan, lines: list[str]) -> None:
    if lines:
        raise TrainingError(
            f"{plan.transform} did not do what it had planned",
            f"{len(lines)} modules differ: {listed(lines)}",
            "this is a defect of raytrain_adv or of the versions installed: compare them with "
            "constraints.txt",
        )
