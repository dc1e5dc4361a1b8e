"""FP8 training: the three products of each linear in float8, with bf16 weights."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from raytrain_adv.config.problems import Problem
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.kernels.variants import numbers
from raytrain_adv.text import first_line
from raytrain_adv.transforms.modules import LINEAR, class_name, fqn_of, output_head, plan_linears
from raytrain_adv.transforms.transform import (
    Change,
    Context,
    Gathering,
    Plan,
    Transform,
    Worker,
    require_hopper,
    require_package,
    title_of,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torchao.float8 import Float8LinearConfig

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts

OWN = "raytrain_adv.ops.float8.linear.Float8Linear"
HEAD = "raytrain_adv.ops.float8.head_loss.Float8Head"
BECOMES = {
    "tensorwise": OWN,
    "rowwise": "raytrain_adv.ops.float8.row_linear.RowwiseLinear",
    "rowwise_with_gw_hp": "torchao.float8.float8_linear.Float8Linear",
}
"""Recipe -> class of its linears."""
EXPERTS = "raytrain_adv.ops.float8.experts.Float8Experts"
GROUPED = "aten::_scaled_grouped_mm"
MULTIPLE = 16
"""torch._scaled_mm takes only sizes divisible by this on a GPU; on a CPU it takes all."""
SMALLEST = {"tensorwise": 1024, "rowwise": 1024, "rowwise_with_gw_hp": 2049}
"""Features on either side below which a linear does not gain.

Source for torchao's casts: its measurements on an H100 (docs/static/fp8-rowwise-perf.png): N of
2048 or less never wins. Tensorwise: k_proj and v_proj of the 8B shape (N = 1024) made less than 1 %
of difference in one trial of 8 layers on an H100. Rowwise: its products take as long."""
ENOUGH_TOKENS = 8192
OFF_BY = 0.1
"""Largest relative error of a product and its gradients that FP8's rounding explains: 3.7 % for a
product of normally distributed factors in e4m3, 6 % for a gradient in e5m2."""


class Fp8(Transform):
    """Train the linears in FP8; parameters, gradients and optimizer states stay as they are."""

    name: ClassVar[str] = "fp8"
    feature: ClassVar[str] = "FP8"
    stage: ClassVar[str] = "precision"
    covers: ClassVar[Literal["", "weights", "flops"]] = "flops"
    careful: ClassVar[dict[str, str]] = {
        "tiled_mlp": "fp8_recipe must be rowwise_with_gw_hp: other scales are of several tokens"
    }
    tried_with: ClassVar[dict[str, Any]] = dict(fp8=True, fp8_allow_cpu=True, fp8_min_features=16)
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter"})
    imports: ClassVar[tuple[str, ...]] = ("torchao",)
    proven_by: ClassVar[str] = "aten::_scaled_mm"
    speed: ClassVar[float] = 1.32  # jobs/benchmarks/results/llama3_8b_fp8.json, tensorwise

    fp8: bool = False
    """Compute the products of the linears in FP8: needs H100, H200 or newer GPUs."""
    fp8_recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """How factors are scaled: tensorwise (fastest), rowwise (one scale per row, more exact),
    rowwise_with_gw_hp (rowwise, weight gradients in bf16)."""
    fp8_enable_fsdp_float8_all_gather: bool = False
    """Gather sharded weights in FP8, half the bytes of bf16; only with fp8_recipe: tensorwise."""
    fp8_exclude: str | list[str] = ""
    """Linears to leave in bf16, comma separated or a list: names, ends of names (down_proj), or
    patterns (model.layers.0.*)."""
    fp8_lm_head: bool = False
    """Make the gradients of the head in FP8 too; its logits and the loss stay in bf16."""
    fp8_experts: Literal["auto"] | bool = "auto"
    """Multiply stacked experts in FP8, with scales per row: auto where their products were measured
    to be faster than in bf16, which takes few and wide experts; true always; false never."""
    fp8_min_features: Annotated[int, Field(ge=0)] | None = None
    """Linears with fewer input or output features stay in bf16; null takes the size measured for
    the recipe, 0 skips no linear for its size."""
    fp8_allow_cpu: bool = False
    """Allow FP8 on a CPU, where it is exact but slow: to test a job."""

    @property
    def is_tensorwise(self) -> bool:
        """Whether each factor has one scale."""
        return self.fp8_recipe == "tensorwise"

    def contradictions(self) -> Iterable[Problem]:
        """Refuse FP8 all-gather unless each tensor has one scale."""
        if self.fp8_enable_fsdp_float8_all_gather and not self.is_tensorwise:
            recipe, key = self.fp8_recipe, "fp8_enable_fsdp_float8_all_gather"
            text = f"weights are gathered in FP8 with one scale each, and fp8_recipe is {recipe}"
            fix = f"set fp8_recipe: tensorwise, or {key}: false"
            yield Problem(text, fix, f"{key} and fp8_recipe")

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse CPUs unless fp8_allow_cpu is set, and adapters that read gathered weights."""
        key = "fp8_enable_fsdp_float8_all_gather"
        if self.fp8_enable_fsdp_float8_all_gather and job.flat().get("use_dora"):
            text = "DoRA adds to the base weights, which arrive in float8"
            yield Problem(text, f"set use_dora: false, or {key}: false", f"{key} and use_dora")
        if job.flat().get("tiled_mlp") and self.fp8_recipe != "rowwise_with_gw_hp":
            text = "scales of several tokens would be those of a tile"
            fix = "set fp8_recipe: rowwise_with_gw_hp, or tiled_mlp: false"
            yield Problem(text, fix, "fp8_recipe and tiled_mlp")
        kernel = "cut_cross_entropy" if job.flat().get("cut_cross_entropy") else "loss_kernel"
        is_chunked = job.flat().get(kernel) in ("auto", "chunked") and not job.train.weighs_tokens
        if self.fp8_lm_head and not is_chunked:
            text = "the head's gradients are made in FP8 inside the chunked loss"
            fix = "set loss_kernel: auto and no loss that weighs tokens, or fp8_lm_head: false"
            yield Problem(text, fix, f"fp8_lm_head and {kernel}")
        if job.parallel.use_cpu and not self.fp8_allow_cpu:
            text = "FP8 requires Hopper architecture: H100, H200 or newer GPUs"
            fix = "set use_cpu: false, or fp8_allow_cpu: true, which is exact but slow"
            yield Problem(text, fix, "fp8 and use_cpu")

    def check(self, facts: HardwareFacts) -> None:
        """Refuse machines and software without FP8."""
        torch_version = facts.versions.get("torch")
        if torch_version is None or numbers(torch_version) < (2, 11):
            found = f"node {facts.node_ip}, torch {torch_version or 'is not installed'}"
            fix = "install torch>=2.11 on that node, or set fp8: false"
            raise ClusterError("FP8 requires PyTorch 2.11+", found, fix)
        require_package(facts, "FP8", "torchao", "set fp8: false", "torchao>=0.18,<0.19")
        require_hopper(facts, ("fp8_allow_cpu", self.fp8_allow_cpu), "set fp8: false")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the linears that compute in FP8."""
        from raytrain_adv.ops.experts.find import stacked

        becomes = {LINEAR: BECOMES[self.fp8_recipe]}
        given = self.fp8_exclude
        rows = _rows_per_expert(model, context)
        against = partial(self._why_not_experts, context=context, rows=rows)
        changes, skipped = plan_linears(
            model, becomes, "fp8_exclude", given, self._why_not, against, EXPERTS
        )
        if self.fp8_lm_head:
            fqn, reason = self._find_head(model)
            if reason:
                fix = "set fp8_lm_head: false"
                raise JobError("The head's gradients cannot be in FP8", f"{fqn}: {reason}", fix)
            changes[fqn] = Change(LINEAR, HEAD)
            del skipped[fqn]
        notes = self._notes(context)
        if self.fp8_experts is True and EXPERTS not in {c.after for c in changes.values()}:
            found = ", ".join(sorted({skipped[fqn] for fqn in stacked(model) if fqn in skipped}))
            what, found = "fp8_experts: true changes nothing", found or "no stacked experts"
            raise JobError(what, found, "set fp8_experts: auto")
        in_fp8 = []
        for fqn in (f for f, c in changes.items() if c.after == EXPERTS):
            in_fp8.append(model.get_submodule(fqn))
            changes[fqn] = replace(changes[fqn], proven_by=GROUPED)
        return Plan(self.name, changes, skipped, (*notes, *_notes_on_experts(in_fp8, rows)))

    @staticmethod
    def _find_head(model: nn.Module) -> tuple[str, str]:
        """Return the head's fqn, and why it cannot have its gradients in FP8, if so."""
        head: Any = output_head(model)
        fqn = fqn_of(model, head)
        if fqn is None or class_name(head) != LINEAR:
            return fqn or "none", "not a plain linear"
        return fqn, _odd(head.in_features, head.out_features)

    def _why_not(self, linear: nn.Linear) -> str:
        sizes = (linear.in_features, linear.out_features)
        if odd := _odd(*sizes):
            return odd
        given = self.fp8_min_features
        smallest = SMALLEST[self.fp8_recipe] if given is None else given
        if min(sizes) < smallest:
            return f"{sizes[0]} x {sizes[1]}: too small to gain (fp8_min_features: {smallest})"
        return ""

    def _why_not_experts(self, experts: nn.Module, context: Context, rows: float) -> str:
        """Return why stacked experts stay in bf16. Raises JobError if fp8_experts: true cannot be
        met.
        """
        from raytrain_adv.ops.float8.experts import in_words, why_not, why_slower

        if self.fp8_experts is False:
            return f"experts, which stay in bf16 (fp8_experts: false): {in_words(experts, rows)}"
        others = (t for t in context.job.transforms if isinstance(t, Transform) and t.enabled)
        rounding = next((t for t in others if t.converts), None)
        reason = why_not(experts)
        if rounding is not None:
            reason = f"experts, whose rounded values {title_of(rounding)} multiplies in bf16"
        if self.fp8_experts is True:
            if reason:
                raise JobError("Experts cannot be in FP8", reason, "set fp8_experts: auto")
            return ""
        return reason or why_slower(experts, rows)

    def _notes(self, context: Context) -> Iterator[str]:
        yield (
            f"{self.fp8_recipe}: weights, gradients and optimizer states keep their dtype, so FP8 "
            "saves no memory for them"
        )
        if not context.job.parallel.torch_compile:
            yield (
                "torch_compile is off: every cast is a separate kernel, and FP8 is slower than "
                "bf16; set torch_compile: true"
            )
        if context.num_tokens is not None and context.num_tokens < ENOUGH_TOKENS:
            yield (
                f"{context.num_tokens:,} tokens per forward pass: below {ENOUGH_TOKENS:,} FP8 may "
                "be slower than bf16; raise per_device_train_batch_size or cutoff_len"
            )

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Replace each planned linear by a Float8Linear that owns the same parameters."""
        from raytrain_adv.ops.float8.experts import Float8Experts
        from raytrain_adv.ops.float8.head_loss import Float8Head

        kind: Any = pkgutil.resolve_name(BECOMES[self.fp8_recipe])
        if self.fp8_recipe == "rowwise_with_gw_hp":
            import torch._inductor.config

            # Make Inductor round to bf16 where eager code does: without it row-wise scales and the
            # values they are computed from differ. Remove when pytorch#150859 is closed.
            torch._inductor.config.emulate_precision_casts = True
            _avoid_nan(torch.__version__)
        for fqn, change in plan.changes.items():
            plain: Any = model.get_submodule(fqn)
            if change.after == EXPERTS:
                new: nn.Module = Float8Experts.of(plain)
            elif change.after == HEAD:
                new = Float8Head.from_float(plain)
            else:
                new = kind.from_float(plain, self._config())
            model.set_submodule(fqn, new)

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Compare the product and gradients of each kind of linear, in each size, with those
        without FP8; on a GPU also the casts, bit for bit, in every tile size they may take there.
        The head is tried with the loss, once weights are loaded.
        """
        import torch

        from raytrain_adv.ops.float8 import trial
        from raytrain_adv.trial.compare import precision

        device, dtype = worker.device, worker.dtype
        modules = [model.get_submodule(f) for f, c in plan.changes.items() if c.after != HEAD]
        try:
            _refuse_wrong(trial.wrong_casts(self.fp8_recipe, modules, device, dtype))
            errors = trial.errors(modules, self._config(), device, dtype)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError) as error:
            _refuse_wrong({f"{type(error).__name__}: {first_line(error)}": dtype})
        wrong = {
            f"{name}: values off by {v:.2g}, gradients by {g:.2g}": dtype
            for name, v, g in errors
            if not max(v, g) < OFF_BY
        }
        _refuse_wrong(wrong)
        if not errors:  # the head alone
            return plan
        _, values, gradients = (max(column) for column in zip(*errors, strict=True))
        torch.cuda.empty_cache()
        return plan.with_notes(
            f"tested on {device.type} in {precision(dtype)}, {len(errors)} sizes: products off by "
            f"{values:.1e}, gradients by {gradients:.1e}, which is FP8's rounding"
        )

    def _config(self) -> Float8LinearConfig:
        from torchao.float8 import Float8LinearConfig

        return Float8LinearConfig.from_recipe_name(self.fp8_recipe)

    def before_sharding(self, model: nn.Module) -> None:
        """Make FSDP2 gather the weights in float8, if the job enables it."""
        from raytrain_adv.ops.float8.all_gather import gather_in_float8

        for linear in self._gathered_linears(model):
            gather_in_float8(linear)

    def gathering(self, model: nn.Module) -> Gathering:
        """Return the weights gathered in float8, one byte a number, or the key that does it."""
        can = self.is_tensorwise and not self.fp8_enable_fsdp_float8_all_gather
        return Gathering(
            {linear.get_parameter("weight"): 1 for linear in self._gathered_linears(model)},
            "fp8_enable_fsdp_float8_all_gather: true" if can else "",
        )

    def _gathered_linears(self, model: nn.Module) -> Iterator[nn.Linear]:
        from torchao.float8.float8_linear import Float8Linear

        if self.fp8_enable_fsdp_float8_all_gather:
            yield from (m for m in model.modules() if isinstance(m, Float8Linear))

    def after_step(self, model: nn.Module) -> None:
        """Compute the scales of all sharded weights with one all-reduce instead of one each."""
        if self.fp8_enable_fsdp_float8_all_gather:
            from raytrain_adv.ops.float8.all_gather import update_scales

            update_scales(model)


def _odd(in_features: int, out_features: int) -> str:
    """Return why torch._scaled_mm cannot multiply with a linear of these sizes, if so."""
    if in_features % MULTIPLE or out_features % MULTIPLE:
        return f"{in_features} x {out_features}: not divisible by {MULTIPLE}"
    return ""


def _avoid_nan(torch_version: str) -> None:
    """Keep compiled FP8 backward passes from writing NaN, as torchao does for models that it
    converts itself: Inductor's minimum and maximum of torch 2.14 make Triton store wrong bytes.
    Remove when triton-lang/triton#11111 is closed and the oldest torch has that Triton. Raises
    TrainingError when Inductor is not as torchao expects it.
    """
    if numbers(torch_version) < (2, 14):
        return
    from torchao.float8 import _inductor_patch

    _inductor_patch._patch_inductor_min_max_codegen()
    if not _inductor_patch._PATCHED:
        raise TrainingError(
            "FP8 by rows may give NaN when compiled (triton-lang/triton#11111)",
            f"torch {torch_version}: torchao's workaround does not apply to it",
            "set fp8_recipe: tensorwise, torch_compile: false, or install torch<2.14",
        )


def _refuse_wrong(found: Mapping[str, torch.dtype]) -> None:
    """Stop the run for what is wrong, with the dtype of its inputs."""
    if found:
        dtypes = ", ".join(sorted({str(dtype) for dtype in found.values()}))
        raise TrainingError(
            f"FP8 gives wrong results on this machine for {dtypes} inputs",
            "\n".join(found),
            "compare the versions of torch, triton, torchao and the GPU's driver with "
            "constraints.txt, or set fp8: false",
        )


def _rows_per_expert(model: Any, context: Context) -> float:
    """Return how many tokens of a forward pass reach an expert if all get as many; of
    ENOUGH_TOKENS if it is not known how long one is.
    """
    from raytrain_adv.ops.experts.find import active_experts

    return (context.num_tokens or ENOUGH_TOKENS) * active_experts(model)


def _notes_on_experts(experts: list[nn.Module], rows: float) -> Iterator[str]:
    if experts:
        from raytrain_adv.ops.float8.experts import GAINS, in_words, speed_of

        yield f"experts have a scale per row: {in_words(experts[0], rows)}"
        if speed_of(experts[0], rows) < GAINS:
            yield "fp8_experts: true makes experts slower than bf16; auto leaves them in bf16"
