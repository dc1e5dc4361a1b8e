"""Adapters through PEFT on a frozen model: LoRA with its variants, and OFT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from raytrain_adv.config.problems import Problem
from raytrain_adv.config.section import Names, PathText
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.text import split_names
from raytrain_adv.transforms.modules import (
    ROUTES,
    class_name,
    output_head,
    short,
)
from raytrain_adv.transforms.targets import (
    STACKED_AS,
    check_bases,
    check_continued,
    check_targets,
    names,
    reason_against,
    reason_against_experts,
)
from raytrain_adv.transforms.transform import Change, Context, Plan, Transform

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig

ADAPTED = {kind: f"peft.tuners.{kind}.layer.Linear" for kind in ("lora", "oft")}
"""finetuning_type -> what a linear becomes."""
ADAPTED_EXPERTS = "raytrain_adv.ops.experts.adapted.AdaptedExperts"
ADAPTER = "default"
"""PEFT's name for the one adapter there is."""


PARTS = frozenset({"lora_A", "lora_B", "lora_magnitude_vector", "oft_R"})
"""Names of the modules and dictionaries that hold an adapter's parameters."""


class Lora(Transform):
    """Train low-rank adapters instead of the model's own weights."""

    name: ClassVar[str] = "lora"
    feature: ClassVar[str] = "LoRA"
    titles: ClassVar[dict[str, str]] = {"oft": "OFT"}
    tried_with: ClassVar[dict[str, Any]] = {"finetuning_type": "lora"}
    stage: ClassVar[str] = "adapter"
    covers: ClassVar[Literal["", "weights", "flops"]] = "flops"
    # 599 ms for 0.71 of the operations of full training, in pairs of runs: jobs/benchmarks/results.
    speed: ClassVar[float] = 0.885

    finetuning_type: Literal["lora", "oft", "full"] = "lora"
    """lora trains low-rank adapters on a frozen model, oft rotations of its linears' inputs
    (orthogonal fine-tuning), full all of its weights."""
    lora_rank: Annotated[int, Field(ge=1, le=LARGEST)] = 8
    """Rank of the adapters."""
    lora_alpha: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    """Scale of the adapters' output, divided by the rank; null means twice the rank."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapters' input."""
    lora_target: Names = "all"
    """Names of the linear modules and stacked experts that get adapters, comma separated or a list;
    all means every one but lm_head, routers and those whose weights are read without a call."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    use_dora: bool = False
    """Learn each weight's magnitude apart from its direction."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """LoRA+: the learning rate of the adapters' B matrices, over learning_rate; null means 1."""

    pissa_init: bool = False
    """PiSSA: adapters start as the largest singular vectors of the weights, and the frozen base
    keeps the rest."""
    pissa_iter: Annotated[int, Field(ge=-1, le=LARGEST)] = 16
    """Iterations of PiSSA's fast singular value decomposition; -1 computes the exact one."""
    pissa_convert: bool = False
    """Export PiSSA's adapter as one of twice the rank on the model as it was; false exports the
    trained adapter and the base it belongs to, output_dir/model-base."""

    oft_rank: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """OFT: rotated blocks per linear; 0 takes oft_block_size."""
    oft_block_size: Annotated[int, Field(ge=0, le=LARGEST)] = 32
    """OFT: inputs that are rotated together; 0 takes oft_rank. Where it does not divide a
    linear's inputs, PEFT takes the nearest divisor."""
    oft_target: Names = "all"
    """OFT: names of the linear modules that are rotated, as in lora_target."""
    module_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """OFT: share of the blocks that a training step leaves as they are."""

    adapter_name_or_path: PathText | list[PathText] | None = None
    """Folder of an adapter in PEFT's format to continue, of the same rank and modules. Of several
    folders, all but the last are first merged into the frozen model."""
    create_new_adapter: bool = False
    """Merge every adapter of adapter_name_or_path into the frozen model, and train a new one."""

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.finetuning_type != "full"

    @property
    def is_oft(self) -> bool:
        """Whether the adapters are rotations."""
        return self.finetuning_type == "oft"

    @property
    def merged(self) -> list[str]:
        """Folders of the adapters that are merged into the frozen model before training."""
        return self.folders if self.create_new_adapter else self.folders[:-1]

    @property
    def continued(self) -> str | None:
        """Folder of the adapter that training continues."""
        return None if self.create_new_adapter else next(reversed(self.folders), None)

    @property
    def folders(self) -> list[str]:
        """Folders of the adapters that are merged, and of the one that is continued."""
        return split_names(self.adapter_name_or_path)

    @property
    def changes_base(self) -> bool:
        """Whether an exported adapter belongs to another base than the job's model."""
        return bool(self.merged) or (self.pissa_init and not self.pissa_convert)

    def learning_rate_ratios(self, model: nn.Module) -> dict[float, list[nn.Parameter]]:
        """Return the trainable parameters by their learning rate divided by the schedule's."""
        found: dict[float, list[nn.Parameter]] = {}
        for fqn, parameter in model.named_parameters():
            is_b = "lora_B" in fqn.split(".")
            ratio = self.loraplus_lr_ratio if is_b and self.loraplus_lr_ratio else 1.0
            if parameter.requires_grad:
                found.setdefault(ratio, []).append(parameter)
        return found

    @property
    def _kept_in_files(self) -> dict[str, tuple[str, Any]]:
        """Entry of PEFT's adapter_config.json -> the key here, and its value."""
        oft = {"r": self.oft_rank, "oft_block_size": self._block_size}
        alpha = self.lora_alpha or 2 * self.lora_rank
        same = {"use_rslora": self.use_rslora, "use_dora": self.use_dora}
        found = oft if self.is_oft else {"r": self.lora_rank, "lora_alpha": alpha, **same}
        rank = "oft_rank" if self.is_oft else "lora_rank"
        return {name: (rank if name == "r" else name, value) for name, value in found.items()}

    @property
    def _target_key(self) -> str:
        return "oft_target" if self.is_oft else "lora_target"

    @property
    def targets(self) -> list[str]:
        """The names in lora_target, or oft_target, as a list."""
        return split_names(self.oft_target if self.is_oft else self.lora_target)

    def contradictions(self) -> Iterable[Problem]:
        """Refuse keys of the other kind of adapters, and starts that exclude each other."""
        keys = [*type(self).model_fields]
        low_rank = [key for key in keys if key.startswith(("lora", "pissa", "use_"))]
        rotating = [key for key in keys if key.startswith("oft") or key == "module_dropout"]
        for key in (low_rank if self.is_oft else rotating) if self.enabled else ():
            if self.is_changed(key):
                text = f"it is a key of finetuning_type: {'lora' if self.is_oft else 'oft'}"
                yield Problem(text, f"delete {key}", f"{key} and finetuning_type")
        size = "oft_block_size" in self.model_fields_set or not self.oft_rank
        if self.is_oft and bool(self.oft_rank) == bool(self.oft_block_size if size else 0):
            text = "the one follows from the other and the linear's inputs"
            yield Problem(text, "set one of them to 0", "oft_rank and oft_block_size")
        if self.pissa_init and self.adapter_name_or_path is not None:
            text = "PiSSA's adapter starts from the model's weights, not from another adapter"
            yield Problem(text, "keep one of them", "pissa_init and adapter_name_or_path")
        if self.create_new_adapter and self.adapter_name_or_path is None:
            text = "there is no adapter to merge"
            fix = "name it in adapter_name_or_path, or delete it"
            yield Problem(text, fix, "create_new_adapter")

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse adapters on random weights, which would be lost, and in bfloat16."""
        default = "" if "finetuning_type" in self.model_fields_set else ", its default"
        given = f"finetuning_type is {self.finetuning_type}{default}"
        if job.model.train_from_scratch:
            text = f"adapters alone are saved, and random weights would be lost: {given}"
            keys = "train_from_scratch and finetuning_type"
            yield Problem(text, "set finetuning_type: full", keys)
        if job.train.freeze_trainable_layers is not None:
            text = "adapters are trained, and the whole model is frozen"
            keys = "freeze_trainable_layers and finetuning_type"
            yield Problem(text, "set finetuning_type: full, or delete it", keys)
        if self.changes_base or self.pissa_init:
            for other in (one for one in job.transforms if one.enabled and one.converts):
                ours = "pissa_init" if self.pissa_init else "adapter_name_or_path"
                theirs = next(iter(type(other).model_fields))
                text = f"{other.feature} converts the model of the job, and the base is another"
                yield Problem(text, "keep one of them", f"{ours} and {theirs}")
        if self.loraplus_lr_ratio and job.train.optim == "muon":
            text = "LoRA+ sets rates of AdamW, and muon has one rate"
            yield Problem(text, "keep one of them", "loraplus_lr_ratio and optim")
        if job.train.pure_bf16:
            text = f"adapters are always trained in float32: {given}"
            fix = "set bf16: true instead of pure_bf16; the frozen model is then in bfloat16"
            yield Problem(text, fix, "pure_bf16 and finetuning_type")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the linears and stacked experts that get adapters."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from raytrain_adv.ops.experts.find import routers, stacked

        kinds = nn.Linear | Conv1D  # what PEFT can adapt: PyTorch's linears, and GPT-2's
        linears = {fqn: m for fqn, m in model.named_modules() if isinstance(m, kinds)}
        experts = stacked(model)
        against = self._against_experts
        check_targets(self._target_key, self.targets, model, linears, experts, against)
        choosing = routers(model)
        skipped = {f: self._reason_to_skip(f, m, model, choosing) for f, m in linears.items()}
        skipped |= {f: self._reason_to_skip_experts(f, m) for f, m in experts.items()}
        skipped |= dict.fromkeys(choosing - linears.keys(), ROUTES)
        skipped = {fqn: reason for fqn, reason in skipped.items() if reason}
        chosen = {f: m for f, m in (linears | experts).items() if f not in skipped}
        check_bases(self.folders, self.merged, context.job.model.model_name_or_path)
        if self.continued is not None:
            linear = chosen.keys() & linears.keys()
            kind, key = self.finetuning_type, self._target_key
            check_continued(self.continued, kind, self._kept_in_files, linear, key)
        becomes = dict.fromkeys(linears, ADAPTED[self.finetuning_type])
        becomes |= dict.fromkeys(experts, ADAPTED_EXPERTS)
        changes = {fqn: Change(class_name(m), becomes[fqn]) for fqn, m in chosen.items()}
        return Plan(self.name, changes, skipped, tuple(self._notes(model, changes)))

    def _reason_to_skip(
        self, fqn: str, module: nn.Module, model: nn.Module, choosing: frozenset[str]
    ) -> str:
        from torch import nn

        if not any(names(target, fqn) for target in self.targets):  # next to all, too
            if "all" not in self.targets:
                return f"not in {self._target_key}"
            if module is output_head(model):
                return "the language-model head"
            if fqn in choosing:
                return ROUTES
        if self.is_oft and not isinstance(module, nn.Linear):
            return "PEFT's OFT has no form for transposed linears"
        return reason_against(fqn, model, self.use_dora)

    def _reason_to_skip_experts(self, fqn: str, module: nn.Module) -> str:
        if not self._matrices(fqn, module):
            return "not in lora_target"
        return self._against_experts or reason_against_experts(module)

    @property
    def _against_experts(self) -> str:
        """Why stacked experts get no adapters, if so."""
        if self.is_oft:
            return "PEFT's OFT has no form for stacked experts"
        keys = [key for key in ("lora_dropout", "use_dora", "pissa_init") if self.is_changed(key)]
        return f"PEFT adapts stacked experts without {keys[0]} only" if keys else ""

    def _matrices(self, fqn: str, module: nn.Module) -> list[str]:
        """Return the stacked matrices of a module that get adapters."""
        from raytrain_adv.ops.experts.find import matrices

        targets = [*self.targets, *(STACKED_AS[t] for t in self.targets if t in STACKED_AS)]
        return [
            name
            for name in matrices(module)
            if any(t == "all" or names(t, fqn) or names(t, f"{fqn}.{name}") for t in targets)
        ]

    def _notes(self, model: nn.Module, changes: Mapping[str, Change]) -> Iterator[str]:
        added = sum(self._added_parameters(fqn, model.get_submodule(fqn)) for fqn in changes)
        total = sum(p.numel() for p in model.parameters())
        share = f"{added / total:.2%}"
        yield f"{added:,} trainable parameters in adapters on a model of {total:,} ({share})"
        if self.use_dora:
            why = "PEFT's DoRA does not trace into one graph"
            yield f"{why}: torch_compile gains less than with LoRA"
        if self.is_oft:
            from raytrain_adv.ops.rotation import describe

            widths = (model.get_parameter(f"{fqn}.weight").shape[1] for fqn in changes)
            yield describe(widths, self.oft_rank, self._block_size)
        if self.merged:
            yield f"{', '.join(self.merged)} merged into the frozen model before training"
        if self.changes_base:
            yield "the exported adapter belongs to output_dir/model-base, which is exported too"
        elif self.pissa_init:
            yield f"exported as an adapter of rank {2 * self.lora_rank} on the model as it was"

    def _added_parameters(self, fqn: str, module: nn.Module) -> int:
        from raytrain_adv.ops.low_rank import is_transposed
        from raytrain_adv.ops.rotation import num_parameters

        if stacks := self._matrices(fqn, module):
            shapes = [module.get_parameter(name).shape for name in stacks]
            return sum(self.lora_rank * n * (rows + columns) for n, rows, columns in shapes)
        rows, columns = module.get_parameter("weight").shape
        if self.is_oft:
            return num_parameters(columns, self.oft_rank, self._block_size)
        magnitudes = (columns if is_transposed(module) else rows) if self.use_dora else 0
        return self.lora_rank * (rows + columns) + magnitudes

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Freeze the model and put adapters in float32, without values yet, on the linears and the
        stacked experts.
        """
        import torch

        from raytrain_adv.ops import low_rank, rotation
        from raytrain_adv.ops.experts.adapted import adapt, inject

        linear = ADAPTED[self.finetuning_type]
        modules = [fqn for fqn, change in plan.changes.items() if change.after == linear]
        experts = [fqn for fqn in plan.changes if fqn not in modules]
        stacks = [
            f"{f}.{name}" for f in experts for name in self._matrices(f, model.get_submodule(f))
        ]
        with torch.device(next(model.parameters()).device):
            if self.is_oft:
                rotation.inject(model, self._peft_config(model, modules), ADAPTER)
            else:
                inject(model, self._peft_config(model, modules), stacks, ADAPTER)
            for fqn in modules if self.pissa_init else ():
                low_rank.keep_start(model.get_submodule(fqn), ADAPTER)
        for fqn in experts:
            adapt(model, fqn)
        for fqn, parameter in list(model.named_parameters()):
            parameter.requires_grad_(is_adapter(fqn))
            if is_adapter(fqn):
                owner, _, name = fqn.rpartition(".")
                exact = torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))
                setattr(model.get_submodule(owner), name, exact)

    @property
    def _block_size(self) -> int:
        return 0 if self.oft_rank else self.oft_block_size

    def _peft_config(self, model: nn.Module, adapted: list[str]) -> Any:
        """Return PEFT's description of the adapters on modules."""
        from peft import LoraConfig

        from raytrain_adv.ops import rotation
        from raytrain_adv.ops.absent import shortest_names
        from raytrain_adv.ops.low_rank import is_transposed

        targets = shortest_names(model, adapted)
        if self.is_oft:
            return rotation.config(targets, self.oft_rank, self._block_size, self.module_dropout)
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha or 2 * self.lora_rank,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            fan_in_fan_out=any(is_transposed(model.get_submodule(fqn)) for fqn in adapted),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )

    def initialize(self, model: nn.Module, plan: Plan, seed: int) -> tuple[str, ...]:
        """Set the adapters so that they change nothing yet: A uniform (Kaiming), B zero, DoRA's
        magnitudes the norms, rotations by nothing. Each A is drawn whole from a generator seeded by
        its name, so that values do not depend on the number of workers.
        """
        from raytrain_adv.dtensor import plain_name, seed_of
        from raytrain_adv.ops import low_rank, rotation

        if self.is_oft:
            rotation.initialize(model)
        holders = {fqn for fqn, _ in model.named_modules() if short(fqn) == "lora_A"}
        for fqn, module in model.named_modules():
            own_seed = seed_of(seed, plain_name(f"{fqn}.lora_A.weight").removesuffix(".weight"))
            if f"{fqn}.lora_A" in holders:
                low_rank.start(module, ADAPTER, own_seed, self.use_dora)
            if self.pissa_init and class_name(module) == ADAPTED["lora"]:
                low_rank.start_principal(module, ADAPTER, own_seed, self.pissa_iter)
        return ()

    def after_step(self, model: nn.Module) -> None:
        """Take out of the base, once, what PiSSA's adapters started with, or resumed with."""
        from raytrain_adv.ops.low_rank import reduce_bases

        if self.pissa_init:
            reduce_bases(model, ADAPTER)


def is_adapter(fqn: str) -> bool:
    """Whether a parameter's name is one of an adapter."""
    return not PARTS.isdisjoint(fqn.split("."))
