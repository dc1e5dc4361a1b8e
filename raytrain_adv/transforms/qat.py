"""Quantization-aware training: linears and embeddings compute with the values that the quantized
model will have, so that training makes up for their rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.ops.fake_quant.targets import (
    FLOAT8,
    GGUF,
    NO_TARGET,
    ROUNDED_BY,
    TARGETS,
    TORCHAO,
    Target,
    TargetName,
    WeightDtype,
    in_words,
    refuse_for_layout,
    served,
)
from raytrain_adv.ops.fake_quant.torchao_config import (
    NOT_SERVED,
    SERVED,
    config_of,
    refuse_odd_groups,
)
from raytrain_adv.text import split_names
from raytrain_adv.transforms.modules import (
    class_name,
    fqn_of,
    input_embedding,
    is_tied,
    lost_parts,
    nothing_changed,
    own_name,
    plan_linears,
    short,
    why_no_linears,
)
from raytrain_adv.transforms.qat_rules import conflicts, contradictions, reasons_against
from raytrain_adv.transforms.transform import (
    Change,
    Context,
    Plan,
    Switchable,
    require_package,
)

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts
    from raytrain_adv.ops.fake_quant.experts import FakeQuantizedExperts
    from raytrain_adv.ops.fake_quant.layers import FakeQuantized

LINEAR = "raytrain_adv.ops.fake_quant.layers.FakeQuantizedLinear"
EMBEDDING = "raytrain_adv.ops.fake_quant.layers.FakeQuantizedEmbedding"
EXPERTS = "raytrain_adv.ops.fake_quant.experts.FakeQuantizedExperts"
IN_FLOAT8 = "raytrain_adv.ops.float8.linear.Float8Linear"
MERGED = "raytrain_adv.ops.fake_quant.merged.FakeQuantizedMergedLinear"
LINEAR_IN_FLOAT8 = "raytrain_adv.ops.float8.qat_linear.Float8FakeQuantizedLinear"
BECOMES = {"torch.nn.Linear": LINEAR, IN_FLOAT8: LINEAR_IN_FLOAT8}
BF16, PTQ, QAT, UNQUANTIZED = "bf16", "PTQ", "QAT", "QAT's weights, not quantized"
"""How weights are evaluated: as they are; quantized without and with training for it."""


class Qat(Switchable):
    """Train with fake quantization; parameters and optimizer states stay as they are."""

    name: ClassVar[str] = "qat"
    feature: ClassVar[str] = "QAT"
    tried_with: ClassVar[dict[str, Any]] = dict(
        enable_qat=True, qat_weight_dtype="int4", qat_activation_dtype="int8"
    )
    stage: ClassVar[str] = "precision"
    covers: ClassVar[Literal["", "weights", "flops"]] = "weights"
    imports: ClassVar[tuple[str, ...]] = ("torchao",)
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "fp8"})
    evaluated_as: ClassVar[str] = "fake-quantized"
    speed: ClassVar[float] = 0.94  # jobs/benchmarks/results/llama3_8b_qat.json, int4
    converts: ClassVar[str] = "quantized"
    excludes: ClassVar[dict[str, str]] = {
        "quantization_bit": "QAT and standard quantization are mutually exclusive",
        "use_dora": "DoRA computes with the base weights themselves, which would not be rounded",
    }
    careful: ClassVar[dict[str, str]] = {
        "fp8": "FP8 rounds products by 3.7 % beside what QAT rounds, and whole runs were compared "
        "with small models only; held-out losses are exact: compare a short run's without fp8"
    }

    enable_qat: bool = False
    """Train with fake quantization, and export the quantized model next to the trained one."""
    qat_target: TargetName | None = None
    """The engine and scheme that the quantized model is for: sets the other qat keys, rounds as
    that engine does, and exports its format; null exports torchao's tensors."""
    qat_weight_dtype: WeightDtype = "int8"
    """What weights are rounded to; nvfp4 and mxfp4 with a qat_target alone."""
    qat_activation_dtype: Literal["none", "int8", "float8_e4m3fn"] | None = None
    """What the inputs of linears are rounded to, with one range per token; none leaves them."""
    qat_group_size: Annotated[int, Field(ge=2, le=LARGEST)] | None = 32
    """Input features of a weight that share a scale; null gives each output channel one, which
    float8 always has."""
    qat_quantize_embedding: bool = False
    """Quantize the input embedding too, as the weights; not with float8. vLLM cannot load it."""
    qat_exclude: str | list[str] = ""
    """Linears to skip, comma separated or a list: names, ends of names (down_proj), or
    patterns (model.layers.0.*)."""
    fake_quant_after_n_steps: Annotated[int, Field(ge=0, le=LARGEST)] | Literal["never"] | None = (
        None
    )
    """Optimizer steps to train before fake quantization begins; null and 0 begin with it, never
    leaves it out of training: the model is quantized afterward (PTQ)."""
    qat_lora: Literal["separate", "merge_aware"] = "separate"
    """With LoRA: round the base alone and export it with its adapter (separate), or round the sum
    of both, and export one merged quantized model that is what was trained (merge_aware)."""
    compare: bool = False
    """Train the same job without fake quantization first, and measure this run by it."""

    @model_validator(mode="before")
    @classmethod
    def _keys_of_target(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Add the keys that the target sets and the job does not."""
        keys = TARGETS.get(str(given.get("qat_target")), NO_TARGET).keys()
        return {**{key: values[0] for key, values in keys.items()}, **given}

    @property
    def proven_by(self) -> str:  # type: ignore[override] # a class variable where it never varies
        """The operator that rounds weights."""
        return f"raytrain_adv::{ROUNDED_BY.get(self.weight_form, 'fake_quantize_groups')}"

    @property
    def target(self) -> Target:
        """What the quantized model is for."""
        return TARGETS.get(str(self.qat_target), NO_TARGET)

    @property
    def weight_form(self) -> str:
        """How weights are rounded."""
        return self.target.weight_form or self.qat_weight_dtype

    @property
    def activation_form(self) -> str:
        """How activations are rounded; empty for not at all."""
        return self.target.activation_forms.get(self.activation_dtype, self.activation_dtype)

    @property
    def is_float8(self) -> bool:
        """Whether weights are rounded to float8."""
        return self.qat_weight_dtype == FLOAT8

    @property
    def activation_dtype(self) -> str:
        """What activations are rounded to; empty for nothing."""
        return "" if self.qat_activation_dtype in (None, "none") else str(self.qat_activation_dtype)

    @property
    def group_size(self) -> int | None:
        """Input features that share a scale; none means all of them."""
        return None if self.is_float8 else self.qat_group_size

    @property
    def merges(self) -> bool:
        """Whether an adapter is rounded with its base, as one weight."""
        return self.enable_qat and self.qat_lora == "merge_aware"

    @property
    def first_step(self) -> int | None:
        """The first optimizer step (from 0) with fake quantization; none if there is none."""
        delay = self.fake_quant_after_n_steps
        return None if delay == "never" else int(delay or 0)

    def is_on(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) is trained with fake quantization."""
        return self.first_step is not None and step >= self.first_step

    def remedy(self, step: int) -> str:
        """Return the delay, if the step was trained with fake quantization."""
        if not self.is_on(step):
            return ""
        key = "fake_quant_after_n_steps"
        return f"begin fake quantization later: raise {key} (now {show(getattr(self, key))})"

    @property
    def scheme(self) -> str:
        """The configuration in words, as `int4 weights in groups of 32, int8 activations`."""
        return in_words(self.qat_target, *self._form)

    @property
    def _form(self) -> tuple[str, int | None, str]:
        return self.qat_weight_dtype, self.group_size, self.activation_dtype

    @classmethod
    def why_not(cls, key: str, value: object) -> str:
        """Return why a dtype that exists elsewhere is not available."""
        if key not in ("qat_weight_dtype", "qat_activation_dtype"):
            return ""
        known = NOT_SERVED.get(str(value).lower(), "")
        return f"{known}; served are: {SERVED}" if known else f"served are: {SERVED}"

    def contradictions(self) -> Iterable[Problem]:
        """Refuse combinations that no torchao tensor stores."""
        if self.enable_qat:
            yield from contradictions(self)

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse what cannot be rounded or computed, and a delay longer than the run."""
        yield from conflicts(self, job)
        if job.train.max_steps > 0:
            try:
                self.check_length(job.train.max_steps)
            except JobError as error:
                text = f"{error.what[0].lower()}{error.what[1:]}: {error.found}"
                yield Problem(text, error.fix, "fake_quant_after_n_steps and max_steps")

    def check(self, facts: HardwareFacts) -> None:
        """Refuse machines and software on which the exported model could not be compared."""
        require_package(facts, "QAT", "torchao", "set enable_qat: false", "torchao>=0.18,<0.19")
        if self.target.layout == GGUF:
            require_package(facts, str(self.qat_target), "gguf", "take another", "gguf>=0.17")
        capability = facts.compute_capability
        if self.activation_dtype == FLOAT8 and (capability is None or capability < (8, 9)):
            what = "QAT with float8 activations requires compute capability 8.9 or newer"
            why = "the quantized model does not run there, so that it could not be compared"
            fix = "run on H100/H200 workers, or set qat_activation_dtype: none"
            raise ClusterError(what, f"{facts.describe()}: {why} with the trained one", fix)

    def check_length(self, total_steps: int) -> None:
        """Refuse a delay longer than the run."""
        key, first = "fake_quant_after_n_steps", self.first_step
        if first is not None and first >= total_steps:
            found = f"{key}: {first}, and the run has {total_steps} steps"
            fix = f"give at most {total_steps - 1}, as half of the steps; never stands for PTQ"
            raise JobError("Fake quantization would never begin", found, fix)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the linears, and the embedding, that compute with rounded values."""
        from raytrain_adv.ops.experts.find import widths_of
        from raytrain_adv.ops.float8.qat_linear import refuse_frozen

        given = self.qat_exclude
        changes, skipped = plan_linears(
            model, BECOMES, "qat_exclude", given, *reasons_against(self), EXPERTS
        )
        for fqn, why in lost_parts(model, changes, "_weight_qdata").items():
            skipped[fqn] = why
            del changes[fqn]
        if self.merges:
            self._merge(changes, skipped, model)
        names = [fqn for fqn, change in changes.items() if change.after != EXPERTS]
        linears: dict[str, Any] = {fqn: model.get_submodule(fqn) for fqn in names}
        if not changes:
            what = "enable_qat: true would not round any linear of this model"
            raise nothing_changed(
                what, model, skipped, "correct qat_exclude", "set enable_qat: false"
            )
        widths = {fqn: int(m.in_features) for fqn, m in linears.items()}
        for fqn in changes.keys() - linears.keys():
            stacks = widths_of(model.get_submodule(fqn))
            widths |= {f"{fqn}.{name}": width for name, width in stacks.items()}
        taken = {"taken": self.target.group_sizes} if self.qat_target else {}
        refuse_odd_groups(self.group_size, widths, **taken)
        in_float8 = [m for fqn, m in linears.items() if changes[fqn].before == IN_FLOAT8]
        experts = sorted(changes.keys() - linears.keys())
        why_none = self.target.no_experts.get(self.activation_dtype) or why_no_linears(model)
        refuse_for_layout(self.target, model.config, changes, skipped, experts, why_none)
        refuse_frozen(in_float8, self.qat_weight_dtype, self.activation_dtype)
        embedding = input_embedding(model)
        table = fqn_of(model, embedding)
        if embedding is not None and table is not None:
            if not self.qat_quantize_embedding:
                skipped[table] = "qat_quantize_embedding: false"
            elif class_name(embedding) != "torch.nn.Embedding":
                skipped[table] = f"a {class_name(embedding)}, not a plain embedding"
            else:
                refuse_odd_groups(self.group_size, {table: int(embedding.embedding_dim)})
                changes[table] = Change(class_name(embedding), EMBEDDING)
        return Plan(self.name, changes, skipped, tuple(self._notes(model, changes, context.job)))

    def _merge(
        self, changes: dict[str, Change], skipped: Mapping[str, str], model: nn.Module
    ) -> None:
        """Plan one rounded weight for each base with its adapter. Raises JobError naming an adapter
        that would stay beside its base.
        """
        bases = [fqn for fqn, _ in model.named_modules() if short(fqn) == "base_layer"]
        for fqn in bases:
            if fqn not in changes or changes[fqn].after == EXPERTS:
                name = own_name(fqn)
                raise JobError(
                    f"qat_lora: merge_aware cannot merge the adapter of {name}",
                    skipped.get(fqn, "stacked experts with adapters are not merged"),
                    f"leave {short(name)} out of lora_target, or set qat_lora: separate",
                )
            changes[fqn] = Change(changes[fqn].before, MERGED)

    def _notes(self, model: nn.Module, changes: dict[str, Change], job: JobConfig) -> Iterator[str]:
        from raytrain_adv.ops.float8.qat_linear import described

        kinds, first = {change.after for change in changes.values()}, self.first_step
        when = "never in training (PTQ)" if first is None else f"from step {first + 1:,} on"
        yield f"{self.scheme}; {when}"
        yield f"evaluation runs {self.evaluated_as}, at every step"
        kept = "model (as trained)"
        if self.merges:
            yield "each adapter is added to its base before both are rounded, as one weight"
            kept = "model (the adapter), model-merged (one model, not rounded)"
        yield f"export writes {kept} and model-quantized ({self.target.layout})"
        yield served(self.qat_target, *self._form)
        if LINEAR_IN_FLOAT8 in kinds:
            how = described(self.qat_weight_dtype, self.activation_dtype)
            yield f"FP8 and QAT together need careful tuning: {how}"
        if EXPERTS in kinds and self.target.engine and self.activation_dtype:
            yield "experts: training multiplies values that are rounded in bfloat16"
        if EMBEDDING in kinds and is_tied(model):
            yield "the head tied to the embedding is not quantized: the quantized model has both"
        if not job.output.export_model:
            what = "no quantized model is written or compared with the trained one"
            how = "raytrain-adv export does both from a checkpoint"
            yield f"export_model is false: {what}; {how}"

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Replace each planned layer by one that rounds and owns the same parameters."""
        from raytrain_adv.ops.fake_quant.experts import FakeQuantizedExperts
        from raytrain_adv.ops.fake_quant.layers import FakeQuantizedEmbedding, FakeQuantizedLinear
        from raytrain_adv.ops.fake_quant.merged import FakeQuantizedMergedLinear
        from raytrain_adv.ops.float8.qat_linear import Float8FakeQuantizedLinear

        kinds = {
            LINEAR: FakeQuantizedLinear,
            LINEAR_IN_FLOAT8: Float8FakeQuantizedLinear,
            MERGED: FakeQuantizedMergedLinear,
        }
        how = (self.weight_form, self.group_size)
        of_experts = self.target.of_experts.get(self.activation_dtype, self.activation_form)
        for fqn, change in plan.changes.items():
            old: Any = model.get_submodule(fqn)
            if change.after == EMBEDDING:
                new: nn.Module = FakeQuantizedEmbedding.of(old, *how)
            elif change.after == EXPERTS:
                new = FakeQuantizedExperts.rounding(old, *how, of_experts)
            else:
                new = kinds[change.after].of(old, *how, self.activation_form)
            model.set_submodule(fqn, new)
            if isinstance(new, FakeQuantizedMergedLinear):
                new.join(model.get_submodule(fqn.rpartition(".")[0]))

    def switch(self, model: nn.Module, on: bool) -> None:
        """Make every layer that can round do so, or compute as a plain one."""
        for module in rounding(model):
            if module.rounds != on:
                module.rounds = on

    def variants(self, step: int, total_steps: int, of: str = "") -> dict[str, bool]:
        """Return bf16 and PTQ where fake quantization begins, and both evaluations at the end."""
        if of:
            return {f"{BF16} {of}": False, f"{PTQ} of the {of}": True}
        if step == total_steps and self.first_step is not None:
            return {UNQUANTIZED: False, QAT: True}
        at_switch = step == (total_steps if self.first_step is None else self.first_step)
        return {BF16: False, PTQ: True} if at_switch else {}

    def twin(self) -> tuple[str, frozenset[str]] | None:
        """Return the run that `compare` requests: without fake quantization and FP8."""
        is_compared = self.compare and self.first_step is not None
        return ("bf16", frozenset({self.name, "fp8"})) if is_compared else None

    @property
    def exact_with(self) -> frozenset[str]:
        """LoRA; and FP8 if QAT rounds every linear: what QAT skips is evaluated in FP8."""
        also = () if split_names(self.qat_exclude) else ("fp8",)
        return frozenset({self.name, "lora", *also})

    def layer_config(self, activation_dtype: str) -> Any:
        """Return the layout's configuration of layers with inputs of this dtype, empty for any."""
        if self.target.layout == TORCHAO:
            return config_of(self.qat_weight_dtype, self.group_size, activation_dtype)
        from raytrain_adv.ops.fake_quant.compressed_tensors import Scheme

        return Scheme(self.weight_form, self.group_size, self.activation_form)


def rounding(model: nn.Module) -> Iterator[FakeQuantized | FakeQuantizedExperts]:
    """Yield the layers that can round."""
    from raytrain_adv.ops.fake_quant.experts import FakeQuantizedExperts
    from raytrain_adv.ops.fake_quant.layers import FakeQuantizedEmbedding, FakeQuantizedLinear

    for module in model.modules():
        if isinstance(module, FakeQuantizedLinear | FakeQuantizedEmbedding | FakeQuantizedExperts):
            yield module
