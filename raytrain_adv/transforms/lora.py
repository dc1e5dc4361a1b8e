"""Low-rank adapters (LoRA, rsLoRA, DoRA) through PEFT; the base model is frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.section import Names, PathText
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.errors import JobError
from raytrain_adv.text import parse_json
from raytrain_adv.transforms.modules import (
    READ,
    ROUTES,
    UNKNOWN_EXPERTS,
    UNREACHED,
    class_name,
    did_you_mean,
    fqn_of,
    is_read,
    is_tied,
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
ADAPTED_EXPERTS = "raytrain_adv.ops.experts.adapted.AdaptedExperts"
STACKED_AS = {"gate_proj": "gate_up_proj", "w1": "gate_up_proj", "w2": "down_proj"}
STACKED_AS |= {"up_proj": "gate_up_proj", "w3": "gate_up_proj"}
"""Names of an expert's linears -> the stacked matrix they are in, if a model has no such linear."""
ADAPTER = "default"
"""PEFT's name for the one adapter there is."""


class Lora(Transform):
    """Train low-rank adapters instead of the model's own weights."""

    name: ClassVar[str] = "lora"
    feature: ClassVar[str] = "LoRA"
    tried_with: ClassVar[dict[str, Any]] = {"finetuning_type": "lora"}
    stage: ClassVar[str] = "adapter"
    covers: ClassVar[Literal["", "weights", "flops"]] = "flops"
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
    """Names of the linear modules and stacked experts that get adapters, comma separated or a list;
    all means every one but lm_head, routers and those whose weights are read without a call."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    use_dora: bool = False
    """Learn each weight's magnitude apart from its direction."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """LoRA+: the learning rate of the adapters' B matrices, over learning_rate; none means 1."""

    adapter_name_or_path: PathText | None = None
    """Folder of an adapter in PEFT's format to go on from, of the same rank and modules."""

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.finetuning_type == "lora"

    def learning_rate_ratios(self, model: nn.Module) -> dict[float, list[nn.Parameter]]:
        """Return the trainable parameters by their learning rate divided by the schedule's."""
        found: dict[float, list[nn.Parameter]] = {}
        for fqn, parameter in model.named_parameters():
            is_b = self.enabled and "lora_B" in fqn.split(".")
            ratio = self.loraplus_lr_ratio if is_b and self.loraplus_lr_ratio else 1.0
            if parameter.requires_grad:
                found.setdefault(ratio, []).append(parameter)
        return found

    @property
    def targets(self) -> list[str]:
        """The names in lora_target, as a list."""
        return patterns(self.lora_target)

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse adapters on random weights, which would be lost, and in bfloat16."""
        default = "" if "finetuning_type" in self.model_fields_set else ", its default"
        given = f"finetuning_type is lora{default}"
        if job.model.train_from_scratch:
            text = f"adapters alone are saved, and random weights would be lost: {given}"
            keys = "train_from_scratch and finetuning_type"
            yield Problem(text, "set finetuning_type: full", keys)
        if job.train.freeze_trainable_layers is not None:
            text = "adapters are trained, and the whole model is frozen"
            keys = "freeze_trainable_layers and finetuning_type"
            yield Problem(text, "set finetuning_type: full, or delete it", keys)
        if self.loraplus_lr_ratio and job.train.optim == "muon":
            text = "LoRA+ sets rates of AdamW, and muon has one rate"
            yield Problem(text, "keep one of them", "loraplus_lr_ratio and optim")
        if job.train.pure_bf16:
            text = f"adapters are always trained in float32: {given}"
            fix = "set bf16: true instead of pure_bf16; the frozen model is then in bfloat16"
            yield Problem(text, fix, "pure_bf16 and finetuning_type")

    def _check_adapter(self, adapted: set[str]) -> None:
        """Refuse an adapter to go on from that is another than the job's, on the planned linears.

        Raises:
            JobError: naming what differs.
        """
        path = Path(self.adapter_name_or_path or "") / "adapter_config.json"
        try:
            config = dict(parse_json(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            fix = "name a folder with adapter_config.json and adapter_model.safetensors"
            what = f"adapter_name_or_path: {self.adapter_name_or_path} is no adapter of PEFT's"
            raise JobError(what, str(error), fix) from error
        ours = {
            "r": ("lora_rank", self.lora_rank),
            "lora_alpha": ("lora_alpha", self.lora_alpha or 2 * self.lora_rank),
            "use_rslora": ("use_rslora", self.use_rslora),
            "use_dora": ("use_dora", self.use_dora),
        }
        theirs = {name: config.get(name, False) for name in ours}
        wrong = {key: theirs[n] for n, (key, value) in ours.items() if theirs[n] != value}
        targets = patterns(config.get("target_modules") or [])
        if {fqn for fqn in adapted if any(names(target, fqn) for target in targets)} != adapted:
            wrong["lora_target"] = ",".join(sorted(targets))
        if wrong:
            fix = "set " + ", ".join(f"{key}: {value}" for key, value in wrong.items())
            found = f"{path}: {', '.join(f'{key} is {value}' for key, value in wrong.items())}"
            raise JobError("The adapter to go on from is another than the job's", found, fix)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the linears and stacked experts that get adapters."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from raytrain_adv.ops.experts.find import routers, stacked

        kinds = nn.Linear | Conv1D  # what PEFT can adapt: PyTorch's linears, and GPT-2's
        linears = {fqn: m for fqn, m in model.named_modules() if isinstance(m, kinds)}
        experts = stacked(model)
        self._check_targets(model, linears, experts)
        choosing = routers(model)
        skipped = {f: self._reason_to_skip(f, m, model, choosing) for f, m in linears.items()}
        skipped |= {f: self._reason_to_skip_experts(f, m) for f, m in experts.items()}
        skipped = {fqn: reason for fqn, reason in skipped.items() if reason}
        chosen = {f: m for f, m in (linears | experts).items() if f not in skipped}
        if self.adapter_name_or_path is not None:
            self._check_adapter(chosen.keys() & linears.keys())
        becomes = dict.fromkeys(linears, ADAPTED) | dict.fromkeys(experts, ADAPTED_EXPERTS)
        changes = {fqn: Change(class_name(m), becomes[fqn]) for fqn, m in chosen.items()}
        return Plan(self.name, changes, skipped, tuple(self._notes(model, changes)))

    def _reason_to_skip(
        self, fqn: str, module: nn.Module, model: nn.Module, choosing: frozenset[str]
    ) -> str:
        if not any(names(target, fqn) for target in self.targets):  # next to all, too
            if "all" not in self.targets:
                return "not in lora_target"
            if module is output_head(model):
                return "the language-model head"
            if fqn in choosing:
                return ROUTES
        return _reason_against(fqn, model)

    def _reason_to_skip_experts(self, fqn: str, module: nn.Module) -> str:
        from raytrain_adv.ops.experts.find import layout_of

        if not self._matrices(fqn, module):
            return "not in lora_target"
        if self.lora_dropout or self.use_dora:
            key = "lora_dropout" if self.lora_dropout else "use_dora"
            return f"PEFT adapts stacked experts without {key} only"
        return "" if layout_of(module) else UNKNOWN_EXPERTS

    def _matrices(self, fqn: str, module: nn.Module) -> list[str]:
        """Return the stacked matrices of a module that get adapters."""
        from raytrain_adv.ops.experts.find import matrices

        targets = [*self.targets, *(STACKED_AS[t] for t in self.targets if t in STACKED_AS)]
        return [
            name
            for name in matrices(module)
            if any(t == "all" or names(t, fqn) or names(t, f"{fqn}.{name}") for t in targets)
        ]

    def _check_targets(
        self, model: nn.Module, linears: Iterable[str], experts: Mapping[str, nn.Module]
    ) -> None:
        from raytrain_adv.ops.experts.find import matrices

        if not self.targets:
            fix = "set lora_target: all, or name modules"
            raise JobError("lora_target is empty", "no module names", fix)
        named = [target for target in self.targets if target != "all"]
        in_experts = [f"{fqn}.{name}" for fqn, m in experts.items() for name in matrices(m)]
        for target in named:
            if named_here := [fqn for fqn in linears if names(target, fqn)]:
                if all(reasons := [_reason_against(fqn, model) for fqn in named_here]):
                    what = f"lora_target names {target}, which cannot be adapted"
                    found = f"{named_here[0]}: {reasons[0]}"
                    raise JobError(what, found, f"take {target} out of lora_target")
                continue
            stacked_in = [f for f in in_experts if names(STACKED_AS.get(target, target), f)]
            if not stacked_in and not any(names(target, fqn) for fqn in experts):
                known = sorted({short(fqn) for fqn in [*linears, *in_experts]})
                raise _no_target(target, model, known)
            if self.lora_dropout or self.use_dora:
                key = "lora_dropout" if self.lora_dropout else "use_dora"
                raise JobError(
                    f"lora_target names {target}: PEFT adapts stacked experts without {key} only",
                    f"{key}: {show(getattr(self, key))}",
                    f"delete {key}, or take {target} out of lora_target",
                )
        name = fqn_of(model, output_head(model)) or "lm_head"
        if is_tied(model) and any(names(target, name) for target in named):
            raise JobError(
                f"lora_target names {name}, whose weight is also the input embedding",
                "tie_word_embeddings is true in the model's config.json",
                f"take {name} out of lora_target",
            )

    def _notes(self, model: nn.Module, changes: Mapping[str, Change]) -> Iterator[str]:
        added = sum(self._added_parameters(fqn, model.get_submodule(fqn)) for fqn in changes)
        total = sum(p.numel() for p in model.parameters())
        share = f"{added / total:.2%}"
        yield f"{added:,} trainable parameters in adapters on {total:,} frozen ones ({share})"
        if self.use_dora:
            why = "PEFT's DoRA does not trace into one graph"
            yield f"{why}: torch_compile gains less than with LoRA"

    def _added_parameters(self, fqn: str, module: nn.Module) -> int:
        if stacks := self._matrices(fqn, module):
            shapes = [module.get_parameter(name).shape for name in stacks]
            return sum(self.lora_rank * n * (rows + columns) for n, rows, columns in shapes)
        rows, columns = module.get_parameter("weight").shape
        magnitudes = (columns if is_transposed(module) else rows) if self.use_dora else 0
        return self.lora_rank * (rows + columns) + magnitudes

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Freeze the model and put adapters in float32, without values yet, on the linears and the
        stacked experts.
        """
        import torch

        from raytrain_adv.ops.experts.adapted import adapt, inject

        modules = [fqn for fqn, change in plan.changes.items() if change.after == ADAPTED]
        experts = [fqn for fqn in plan.changes if fqn not in modules]
        stacks = [
            f"{f}.{name}" for f in experts for name in self._matrices(f, model.get_submodule(f))
        ]
        with torch.device(next(model.parameters()).device):
            inject(model, self._peft_config(model, modules), stacks, ADAPTER)
        for fqn in experts:
            adapt(model, fqn)
        for fqn, parameter in list(model.named_parameters()):
            parameter.requires_grad_(is_adapter(fqn))
            if is_adapter(fqn):
                owner, _, name = fqn.rpartition(".")
                exact = torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))
                setattr(model.get_submodule(owner), name, exact)

    def _peft_config(self, model: nn.Module, adapted: list[str]) -> LoraConfig:
        """Return PEFT's description of the adapters on modules: their last segments if those match
        nothing else, otherwise their whole names.
        """
        from peft import LoraConfig

        from raytrain_adv.ops.absent import absent_modules

        modules = dict(model.named_modules())
        ends = {short(fqn) for fqn in adapted}
        absent = (f"{fqn}.{n}" for fqn, part in absent_modules(model) for n in part.inner)
        by_end = {fqn for fqn in (*modules, *absent) if short(fqn) in ends}
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha or 2 * self.lora_rank,
            lora_dropout=self.lora_dropout,
            target_modules=sorted(ends if by_end == set(adapted) else adapted),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            fan_in_fan_out=any(is_transposed(modules[fqn]) for fqn in adapted),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )

    def initialize(self, model: nn.Module, plan: Plan, seed: int) -> tuple[str, ...]:
        """Set the adapters so that they change nothing yet: A uniform (Kaiming), B zero, DoRA's
        magnitudes the norms. Each A is drawn whole from a generator seeded by its name, so that
        values do not depend on the number of workers.
        """
        holders = {fqn for fqn, _ in model.named_modules() if short(fqn) == "lora_A"}
        for fqn, module in model.named_modules():
            if f"{fqn}.lora_A" in holders:
                self._initialize_one(fqn, module, seed)
        return ()

    def _initialize_one(self, fqn: str, module: nn.Module, seed: int) -> None:
        import torch

        from raytrain_adv.dtensor import copy_local, gather, local_region, plain_name, seed_of

        a, b = (module.get_parameter(f"lora_{part}.{ADAPTER}.weight") for part in "AB")
        own_seed = seed_of(seed, plain_name(f"{fqn}.lora_A.weight").removesuffix(".weight"))
        generator = torch.Generator(a.device).manual_seed(own_seed)
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


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear keeps its weight as [in, out], as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_adapter(fqn: str) -> bool:
    """Whether a parameter's name is one that LoRA added."""
    return any(part in fqn.split(".") for part in ("lora_A", "lora_B", "lora_magnitude_vector"))


def _reason_against(fqn: str, model: nn.Module) -> str:
    """Return why PEFT refuses an adapter on a linear, or why it would not be used, if so."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    name = short(fqn)
    config: Any = LoraConfig()
    untyped: Any = model
    if is_read(model, fqn):
        return f"{READ}: an adapter would not be used"
    if not model.get_submodule(fqn).get_parameter("weight").requires_grad:
        return UNREACHED
    try:
        _check_lora_target_modules_mamba(config, untyped, name)
    except ValueError:
        return f"PEFT refuses {name} in models of type {untyped.config.model_type}"
    return ""


def _no_target(target: str, model: nn.Module, known: list[str]) -> JobError:
    named = [m for fqn, m in model.named_modules() if names(target, fqn)]
    if named:
        what, found = f"lora_target {target} is not a linear module", class_name(named[0])
        return JobError(what, f"it is a {found}", f"choose among {', '.join(known)}")
    return JobError(
        f"lora_target {target} matches no module of {short(class_name(model))}",
        f"its linear modules are {', '.join(known)}",
        f"did you mean {did_you_mean(target, known)}?",
    )


def names(target: str, fqn: str) -> bool:
    """Whether an entry of lora_target names this module: its whole fqn, or the end of it."""
    return fqn == target or fqn.endswith(f".{target}")
