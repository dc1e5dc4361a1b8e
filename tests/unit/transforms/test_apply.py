"""What was planned happens, and only that; what contradicts it is refused by name."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.model.build import build
from raytrain_adv.report.parts import TransformReport
from raytrain_adv.transforms import Change, Plan, Transform
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import Lora
from raytrain_adv.transforms.modules import class_name
from raytrain_adv.transforms.transform import Context
from raytrain_adv.transforms.vocabulary import Vocabulary
from tests.tiny_models import job_for, write_checkpoint

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]


class Swapped(nn.Linear):
    """What the transforms below put in a linear's place."""


class SwapBase(Lora):
    """Swap the planned linears for Swapped.

    It derives from Lora for its keys alone, which worker.model asks every job for.
    """

    name: ClassVar[str] = "swap"
    stage: ClassVar[str] = "precision"
    planned: ClassVar[list[str]] = NAMES
    really: ClassVar[list[str]] = NAMES

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Plan what the class says."""
        change = Change("torch.nn.Linear", f"{__name__}.Swapped")
        return Plan(
            self.name, dict.fromkeys(self.planned, change), {"lm_head": "the head"}, ("A note.",)
        )

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Change the class alone."""
        for fqn in self.really:
            module = model.get_submodule(fqn)
            module.__class__ = Swapped


@pytest.fixture
def model_and_job(tmp_path: Path) -> tuple[PreTrainedModel, JobConfig]:
    job = job_for(write_checkpoint("llama", tmp_path / "m"), tmp_path)
    return build(job), job


def with_transforms(job: JobConfig, *transforms: Transform) -> JobConfig:
    others = tuple(t for t in job.transforms if type(t) in (Lora, Vocabulary))
    return replace(job, transforms=(*others, *transforms))


def test_planning_changes_nothing(model_and_job: tuple[PreTrainedModel, JobConfig]) -> None:
    model, job = model_and_job
    before = {fqn: class_name(m) for fqn, m in model.named_modules()}
    Transforms(with_transforms(job, SwapBase())).plan(model)
    assert {fqn: class_name(m) for fqn, m in model.named_modules()} == before


def test_what_is_planned_is_what_preparing_reports(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    model, job = model_and_job
    job = with_transforms(job, SwapBase())
    assert Transforms(job).plan(model) == Transforms(job).prepare(model)
    assert all(isinstance(model.get_submodule(fqn), Swapped) for fqn in NAMES)


def test_the_report_is_json_with_counts_classes_and_reasons(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    model, job = model_and_job
    plan = Transforms(with_transforms(job, SwapBase())).plan(model)["swap"]
    entry = json.loads(TransformReport.of(plan).model_dump_json())
    assert (entry["changed"], entry["skipped"]) == (2, 1)
    assert entry["changed_by_class"] == {f"torch.nn.Linear -> {__name__}.Swapped": 2}
    assert entry["skipped_reasons"] == {"the head": 1}
    assert entry["skipped_modules"] == {"the head": ["lm_head"]}
    assert entry["notes"][0] == "A note."


class ForgetsOne(SwapBase):
    """Do less than planned."""

    name: ClassVar[str] = "forgets"
    really: ClassVar[list[str]] = NAMES[:1]


class DoesMore(SwapBase):
    """Do more than planned."""

    name: ClassVar[str] = "more"
    really: ClassVar[list[str]] = [*NAMES, "lm_head"]


class Idle(SwapBase):
    """Plan nothing."""

    name: ClassVar[str] = "idle"
    planned: ClassVar[list[str]] = []


class Second(SwapBase):
    """Want what the first has changed."""

    name: ClassVar[str] = "second"


class Above(SwapBase):
    """Want a module that contains what the first has changed."""

    name: ClassVar[str] = "above"
    planned: ClassVar[list[str]] = ["model.layers.0.mlp"]


class Stacked(SwapBase):
    """Change again what the first has changed, and say so."""

    name: ClassVar[str] = "stacked"
    stacks_on: ClassVar[frozenset[str]] = frozenset({"swap"})


def test_a_module_that_was_planned_and_not_changed_is_named(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    model, job = model_and_job
    with pytest.raises(
        TrainingError, match=r"model.layers.0.mlp.down_proj is torch.nn.Linear, planned"
    ):
        Transforms(with_transforms(job, ForgetsOne())).prepare(model)


def test_a_module_that_was_changed_and_not_planned_is_named(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    model, job = model_and_job
    with pytest.raises(TrainingError, match=r"lm_head became .*Swapped, which was not planned"):
        Transforms(with_transforms(job, DoesMore())).prepare(model)


def test_a_plan_that_changes_nothing_is_refused_with_the_reasons(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    model, job = model_and_job
    with pytest.raises(JobError, match="idle is enabled but would not change any module") as caught:
        Transforms(with_transforms(job, Idle())).plan(model)
    assert "1 module: the head" in str(caught.value)


@pytest.mark.parametrize("later", [Second(), Above()])
def test_two_owners_of_a_module_or_of_its_parts_are_refused(
    later: Transform, model_and_job: tuple[PreTrainedModel, JobConfig]
) -> None:
    model, job = model_and_job
    with pytest.raises(JobError, match=f"{later.name} and swap would both change the same modules"):
        Transforms(with_transforms(job, SwapBase(), later)).plan(model)


def test_all_that_is_wrong_is_named_at_once(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    model, job = model_and_job
    with pytest.raises(JobError, match="2 features cannot be enabled") as caught:
        Transforms(with_transforms(job, SwapBase(), Idle(), Second())).plan(model)
    assert (
        "idle is enabled but would not change any module: 1 module: the head" in caught.value.found
    )
    assert "second and swap would both change the same modules" in caught.value.found
    assert "turn one of the two off" in caught.value.fix


def test_a_transform_may_stack_on_one_that_it_names(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    model, job = model_and_job
    plans: Mapping[str, Plan] = Transforms(with_transforms(job, SwapBase(), Stacked())).plan(model)
    assert list(plans) == ["swap", "stacked"]


def test_a_later_transform_sees_the_modules_an_earlier_one_made(tmp_path: Path) -> None:
    class OnBase(SwapBase):
        """Swap the linears inside adapters."""

        name: ClassVar[str] = "on_base"
        stacks_on: ClassVar[frozenset[str]] = frozenset({"lora"})
        planned: ClassVar[list[str]] = [f"{name}.base_layer" for name in NAMES]
        really: ClassVar[list[str]] = [f"{name}.base_layer" for name in NAMES]

    folder = write_checkpoint("llama", tmp_path / "m")
    job = with_transforms(job_for(folder, tmp_path, finetuning_type="lora"), OnBase())
    assert set(Transforms(job).plan(build(job))) == {"lora", "on_base"}


def test_a_transform_may_stack_on_the_stage_of_another(
    model_and_job: tuple[PreTrainedModel, JobConfig],
) -> None:
    class OnPrecision(Stacked):
        """Change again what any transform of a stage has changed."""

        stacks_on: ClassVar[frozenset[str]] = frozenset({"precision"})

    model, job = model_and_job
    assert len(Transforms(with_transforms(job, SwapBase(), OnPrecision())).plan(model)) == 2


def test_class_names_are_readable_and_see_through_fully_shard() -> None:
    class FSDPSwapped(Swapped):
        """What fully_shard makes."""

    assert class_name(nn.Linear(1, 1)) == "torch.nn.Linear"
    assert class_name(FSDPSwapped(1, 1)) == f"{__name__}.Swapped"
    with torch.device("meta"):
        assert class_name(nn.LayerNorm(2)) == "torch.nn.LayerNorm"
