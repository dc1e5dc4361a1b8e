"""Low-rank adapters (LoRA, rsLoRA, DoRA) through PEFT; the base model is frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from raytrain_adv.config.problems import Problem
from raytrain_adv.config.sections import LARGEST, Names
from raytrain_adv.errors import JobError
from raytrain_adv.transforms.modules import (
    ROUTERS,
    class_name,
    expert_notes,
    fqn_of,
    nearest,
    output_head,
    patterns,
    short,
)
from raytrain_adv.transforms.transform import Change, Context, Plan, Transform

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from raytrain_adv.config.job import JobConfig

ADAPTED = "peft.tuners.lora.layer.Linear"
ADAPTER = "default"
"""PEFT's name for the one adapter there is."""


class Lora(Transform):
    """Train low-rank adapters instead of the model's own weights."""

    name: ClassVar[str] = "lora"
    feature: ClassVar[str] = "LoRA"
    tried_with: ClassVar[dict[str, Any]] = {"finetuning_type": "lora"}
    stage: ClassVar[str] = "adapter"
    # 599 ms for 0.71 of the operations of full training, in pairs of runs: jobs/benchmarks/results.
    speed: ClassVar[float] = 0.885

    finetuning_type: Literal["lora", "full"] = "lora"
    """lora trains adapters on a frozen model, full trains all of its weights."""
    lora_rank: Annotated[int, Field(ge=1, le=LARGEST)] = 8
    """Rank of the adapters."""
    lora_alpha: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    """Scale of the adapters' output, divided by the rank; none means twice the rank."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapters' input."""
    lora_target: Names = "all"
    """Names of the linear modules that get adapters, comma separated or a list; all means every one
    but lm_head.
    """
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    use_dora: bool = False
    """Learn each weight's magnitude apart from its direction."""

    @property
    def enabled(self) -> bool:
        """Whether finetuning_type asks for adapters."""
        return self.finetuning_type == "lora"

    @property
    def targets(self) -> list[str]:
        """The names in lora_target, as a list."""
        return patterns(self.lora_target)

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse adapters on random weights, which would be lost, and in bfloat16."""
        default = "" if "finetuning_type" in self.model_fields_set else ", its default"
        if job.model.train_from_scratch:
            yield Problem(
                "adapters alone are saved, and random weights would be lost: "
                f"finetuning_type is lora{default}",
                "set finetuning_type: full",
                "train_from_scratch and finetuning_type",
            )
        if job.train.pure_bf16:
            yield Problem(
                f"adapters are always trained in float32: finetuning_type is lora{default}",
                "set bf16: true in the place of pure_bf16; the frozen model is then in bfloat16",
                "pure_bf16 and finetuning_type",
            )

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the linears that get adapters."""
        linears = {fqn: m for fqn, m in model.named_modules() if is_linear(m)}
        self._check_targets(model, linears)
        changes: dict[str, Change] = {}
        skipped: dict[str, str] = {}
        for fqn, module in linears.items():
            reason = self._reason_to_skip(fqn, module, model)
            if reason:
                skipped[fqn] = reason
            else:
                changes[fqn] = Change(class_name(module), ADAPTED)
        return Plan(self.name, changes, skipped, self._notes(model, linears, changes))

    def _reason_to_skip(self, fqn: str, module: nn.Module, model: nn.Module) -> str:
        if any(names(target, fqn) for target in self.targets):  # beside all, too
            return ""
        if "all" not in self.targets:
            return "not in lora_target"
        if module is output_head(model):
            return "the language-model head"
        return "it routes tokens to experts" if short(fqn) in ROUTERS else ""

    def _check_targets(self, model: nn.Module, linears: dict[str, nn.Module]) -> None:
        if not self.targets:
            raise JobError(
                "lora_target is empty", "no module names", "set lora_target: all, or name modules"
            )
        known = sorted({short(fqn) for fqn in linears})
        for target in self.targets:
            if target == "all" or any(names(target, fqn) for fqn in linears):
                continue
            named = [m for fqn, m in model.named_modules() if names(target, fqn)]
            if named:
                raise JobError(
                    f"lora_target {target} is not a linear module",
                    f"it is a {class_name(named[0])}",
                    f"choose among {', '.join(known)}",
                )
            close = nearest(target, known) or known
            raise JobError(
                f"lora_target {target} matches no module of {class_name(model).rpartition('.')[2]}",
                f"its linear modules are {', '.join(known)}",
                f"did you mean {', '.join(close[:3])}?",
            )
        head = output_head(model)
        tied = head is not None and any(
            p is getattr(head, "weight", None) and not fqn.startswith(head_name(model))
            for fqn, p in model.named_parameters(remove_duplicate=False)
        )
        if tied and any(
            names(target, head_name(model)) for target in self.targets if target != "all"
        ):
            raise JobError(
                f"lora_target names {head_name(model)}, whose weight is also the input embedding",
                "tie_word_embeddings is true in the model's config.json",
                f"take {head_name(model)} out of lora_target",
            )

    def _notes(
        self, model: nn.Module, linears: dict[str, nn.Module], changes: dict[str, Change]
    ) -> tuple[str, ...]:
        added = sum(self._added_parameters(linears[fqn]) for fqn in changes)
        total = sum(p.numel() for p in model.parameters())
        notes = [
            f"{added:,} trainable parameters in adapters on {total:,} frozen ones "
            f"({added / total:.2%})"
        ]
        notes += expert_notes(model, "they get no adapters")
        if self.use_dora:
            notes.append(
                "PEFT's DoRA does not trace into one graph: torch_compile gains less than with LoRA"
            )
        return tuple(notes)

    def _added_parameters(self, linear: nn.Module) -> int:
        rows, columns = linear.get_parameter("weight").shape
        magnitudes = (columns if is_transposed(linear) else rows) if self.use_dora else 0
        return self.lora_rank * (rows + columns) + magnitudes

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Freeze the model and put adapters in float32 on the planned linears; they have no values
        yet.
        """
        import torch
        from peft import inject_adapter_in_model

        with torch.device(next(model.parameters()).device):
            inject_adapter_in_model(self.peft_config(model, plan), model, ADAPTER)
        for fqn, parameter in list(model.named_parameters()):
            parameter.requires_grad_(is_adapter(fqn))
            if is_adapter(fqn):
                owner, _, name = fqn.rpartition(".")
                exact = torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))
                setattr(model.get_submodule(owner), name, exact)

    def peft_config(self, model: nn.Module, plan: Plan) -> LoraConfig:
        """Return PEFT's description of the adapters, by module names that match what was planned
        and no more.
        """
        from peft import LoraConfig

        linears = dict(model.named_modules())
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha or 2 * self.lora_rank,
            lora_dropout=self.lora_dropout,
            target_modules=shortest_targets(list(linears), set(plan.changes)),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            fan_in_fan_out=any(is_transposed(linears[fqn]) for fqn in plan.changes),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )

    def initialize(self, model: nn.Module, plan: Plan, seed: int) -> tuple[str, ...]:
        """Set the adapters so that they change nothing yet: A uniform (Kaiming), B zero, DoRA's
        magnitudes the norms.

        Each A is drawn whole from a generator seeded by its name: the values do not depend on the
        number of workers.
        """
        for fqn, module in model.named_modules():
            if class_name(module) == ADAPTED:
                self._initialize_one(fqn, module, seed)
        return ()

    def _initialize_one(self, fqn: str, module: nn.Module, seed: int) -> None:
        import torch

        from raytrain_adv.dtensor import copy_local, gather, local_region, plain_name, seed_of

        weights = {
            f"{part}.weight": module.get_parameter(f"{part}.{ADAPTER}.weight")
            for part in ("lora_A", "lora_B")
        }
        a, b = weights["lora_A.weight"], weights["lora_B.weight"]
        generator = torch.Generator(a.device).manual_seed(
            seed_of(seed, plain_name(f"{fqn}.lora_A"))
        )
        whole = torch.empty(a.shape, dtype=torch.float32, device=a.device)
        # Source: peft's reset_lora_parameters, which follows the paper's code.
        torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        copy_local(a, whole[local_region(a)])
        copy_local(b, torch.zeros(b.shape, device=b.device)[local_region(b)])
        if self.use_dora:
            base = module.get_submodule("base_layer")
            weight = gather(base.get_parameter("weight"))
            axis = 0 if is_transposed(base) else 1
            norms = torch.linalg.vector_norm(weight.float(), dim=axis)
            magnitude = module.get_parameter(f"lora_magnitude_vector.{ADAPTER}.weight")
            copy_local(magnitude, norms[local_region(magnitude)])


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that PEFT can adapt: PyTorch's, or GPT-2's Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear keeps its weight as [in, out], as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_adapter(fqn: str) -> bool:
    """Whether a parameter's name is one that LoRA added."""
    return any(part in fqn.split(".") for part in ("lora_A", "lora_B", "lora_magnitude_vector"))


def names(target: str, fqn: str) -> bool:
    """Whether an entry of lora_target names this module: its whole fqn, or the end of it."""
    return fqn == target or fqn.endswith(f".{target}")


def head_name(model: nn.Module) -> str:
    """Return the fqn of the module that makes logits."""
    return fqn_of(model, output_head(model)) or "lm_head"


def shortest_targets(every: list[str], chosen: set[str]) -> list[str]:
    """Return the last segments of the chosen names where those match nothing else, otherwise the
    whole names.
    """
    ends = {short(fqn) for fqn in chosen}
    return sorted(ends if {fqn for fqn in every if short(fqn) in ends} == chosen else chosen)
