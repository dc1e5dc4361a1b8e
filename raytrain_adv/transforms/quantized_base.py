"""QLoRA: the frozen base under adapters, in bitsandbytes' forms or in float8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raytrain_adv.config.problems import Problem
from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.text import GIB, disk, of_error, split_names
from raytrain_adv.transforms.modules import (
    IN_FULL,
    LINEAR,
    ROUTES,
    in_adapter,
    output_heads,
    own_name,
    plan_linears,
)
from raytrain_adv.transforms.transform import (
    DEFECT,
    Context,
    Plan,
    Transform,
    Worker,
    require_hopper,
    require_package,
)

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts
    from raytrain_adv.ops.bitsandbytes.quantize import Form

OWN = "raytrain_adv.ops.bitsandbytes.linear.PackedLinear"
FLOAT8 = "raytrain_adv.ops.float8.stored_linear.StoredFloat8Linear"
EXPERTS = "raytrain_adv.ops.bitsandbytes.experts.PackedExperts"
PACKAGES, OFF = {"bnb": "bitsandbytes"}, "delete quantization_bit"
BLOCK = 64
"""Weights of a row that share a scale in 4 bits."""
MULTIPLE = 16
"""torch._scaled_mm takes only sizes divisible by this on a GPU."""
OFF_BY = 0.1
"""Largest relative error of a product in float8 and its gradient: 3.7 % in e4m3, 6 % in e5m2."""
OTHER_METHODS = ("gptq", "awq", "aqlm", "quanto", "eetq", "hqq", "mxfp4", "fp8")


class QuantizedBase(Transform):
    """Keep the frozen model in 4 or 8 bits and train adapters on it; weights are quantized once, as
    they are loaded.
    """

    name: ClassVar[str] = "qlora"
    feature: ClassVar[str] = "QLoRA"
    also_called: ClassVar[tuple[str, ...]] = ("standard quantization", "quantized base")
    tried_with: ClassVar[dict[str, Any]] = {"quantization_bit": 4, "finetuning_type": "lora"}
    stage: ClassVar[str] = "precision"
    covers: ClassVar[Literal["", "weights", "flops"]] = "weights"
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter"})
    excludes: ClassVar[dict[str, str]] = {
        "fp8": "FP8 and standard quantization are mutually exclusive",
        "use_dora": "DoRA computes with the base weights themselves, which are quantized",
        "pissa_init": "PiSSA changes the base weights, which are quantized as they are read",
        "create_new_adapter": "an adapter is merged into weights that are not quantized",
    }
    needs: ClassVar[dict[str, str]] = {
        "finetuning_type": "quantized weights have no gradient: only adapters on them are trained"
    }

    quantization_bit: Literal[4, 8] | None = None
    """Bits of the frozen model's weights: 4 (QLoRA) or 8; null does not quantize."""
    quantization_method: Literal["bnb"] = "bnb"
    """Whose kernels quantize: bitsandbytes'; float8 needs none."""
    quantization_type: Literal["nf4", "fp4", "fp8", "fp8_blocks"] = "nf4"
    """The 16 values of 4 bits: nf4, spaced for normally distributed weights, or fp4. With
    quantization_bit: 8, fp8 holds weights as float8_e4m3fn instead of integers, and multiplies
    them in FP8; fp8_blocks holds them with a scale per 128 x 128, as DeepSeek's and `*-FP8`
    checkpoints do, whose bytes are kept, and multiplies by their values."""
    double_quantization: bool = True
    """Quantize the scales of 4-bit weights too: 4.13 bits per weight instead of 4.5."""
    quantization_products: Literal["fp8", "dequantized"] = "fp8"
    """How quantization_type: fp8 multiplies in training: fp8 on H100, H200 or newer, with inputs
    rounded too; dequantized on any device, in the dtype that computes, with inputs as they are."""
    quantization_allow_cpu: bool = False
    """Allow FP8 products of quantization_type: fp8 on a CPU, exact but slow: to test a job."""
    quantization_exclude: str | list[str] = ""
    """Linears to skip, comma separated or a list: names, ends of names (down_proj), or
    patterns (model.layers.0.*)."""

    @property
    def imports(self) -> tuple[str, ...]:  # type: ignore[override] # a class variable elsewhere
        """Packages that workers import: none for float8."""
        return () if self.is_float8 else ("bitsandbytes",)

    @property
    def proven_by(self) -> str:  # type: ignore[override] # a class variable where it never varies
        """Operator that must run in a training step."""
        return "aten::_scaled_mm" if self.multiplies_in_fp8 else "raytrain_adv::dequantize"

    @property
    def is_float8(self) -> bool:
        """Whether weights are held in float8."""
        return self.quantization_bit == 8 and self.quantization_type in ("fp8", "fp8_blocks")

    @property
    def multiplies_in_fp8(self) -> bool:
        """Whether products are computed in FP8."""
        return self.is_float8 and self.quantization_type == self.quantization_products == "fp8"

    @property
    def form(self) -> Form:
        """How weights are stored."""
        from raytrain_adv.ops.bitsandbytes.quantize import Form

        if self.quantization_bit == 8 and not self.is_float8:
            return Form("int8")
        return Form(self.quantization_type, self.double_quantization and not self.is_float8)

    @property
    def scheme(self) -> str:
        """The form in words."""
        if self.is_float8:
            per = "128 x 128 weights" if self.quantization_type == "fp8_blocks" else "matrix"
            return f"float8_e4m3fn with a scale per {per}"
        if self.quantization_bit == 8:
            return "int8 with a scale per row"
        scales = ", scales quantized too" if self.double_quantization else ""
        return f"{self.quantization_type} in blocks of {BLOCK}{scales}"

    @classmethod
    def why_not(cls, key: str, value: object) -> str:
        """Return why a method or a width that exists elsewhere is not available."""
        if key == "quantization_method" and value == "fp8":
            return "float8 is quantization_bit: 8 with quantization_type: fp8"
        if key == "quantization_method" and value in OTHER_METHODS:
            return f"{value} is not in this version; bitsandbytes (bnb) quantizes as it loads"
        return "bitsandbytes has 4 and 8 bits" if key == "quantization_bit" else ""

    def contradictions(self) -> Iterable[Problem]:
        """Refuse keys of one width or form together with another."""
        eight = self.quantization_bit == 8
        for key in ("quantization_type", "double_quantization"):
            if eight and self.is_changed(key) and getattr(self, key) not in ("fp8", "fp8_blocks"):
                text = "8 bits are always integers with a scale per row, unless they are fp8"
                fix = f"delete {key}, or set quantization_bit: 4"
                yield Problem(text, fix, f"{key} and quantization_bit")
        if self.quantization_bit == 4 and self.quantization_type in ("fp8", "fp8_blocks"):
            text, fix = "fp8 has 8 bits", "set quantization_bit: 8, or quantization_type: nf4"
            yield Problem(text, fix, "quantization_type and quantization_bit")
        for key in ("quantization_products", "quantization_allow_cpu"):
            if self.enabled and self.quantization_type != "fp8" and self.is_changed(key):
                text = "only weights in fp8 are multiplied in it"
                fix = f"delete {key}, or set quantization_bit: 8 and quantization_type: fp8"
                yield Problem(text, fix, f"{key} and quantization_type")

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse to merge adapters into quantized weights, and FP8 products on a CPU."""
        if self.multiplies_in_fp8 and job.parallel.use_cpu and not self.quantization_allow_cpu:
            text = "FP8 requires Hopper architecture: H100, H200 or newer GPUs"
            fix = "set quantization_products: dequantized, or quantization_allow_cpu: true (slow)"
            yield Problem(text, fix, "quantization_type and use_cpu")
        if self.multiplies_in_fp8 and job.flat().get("tiled_mlp"):
            text = "scales of several tokens would be those of a tile"
            fix = "set quantization_products: dequantized, or tiled_mlp: false"
            yield Problem(text, fix, "quantization_type and tiled_mlp")
        if len(split_names(job.flat()["adapter_name_or_path"])) > 1:
            text = "all but the last adapter are merged, into weights that are not quantized"
            keys = "quantization_bit and adapter_name_or_path"
            yield Problem(text, "name one adapter, or delete quantization_bit", keys)

    def check(self, facts: HardwareFacts) -> None:
        """Refuse a machine without bitsandbytes, or without FP8 for float8."""
        self.check_package(facts)
        if self.multiplies_in_fp8:
            cpu = ("quantization_allow_cpu", self.quantization_allow_cpu)
            require_hopper(facts, cpu, "set quantization_products: dequantized")

    def check_package(self, facts: HardwareFacts) -> None:
        """Refuse a machine that cannot unpack the weights. Raises ClusterError."""
        if not self.is_float8:
            package = PACKAGES[self.quantization_method]
            require_package(facts, "QLoRA", package, OFF, f"{package}>=0.50")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the linears to quantize. Raises JobError if fp8 finds experts alone."""
        from torch import nn

        key, given = "quantization_exclude", self.quantization_exclude
        own = FLOAT8 if self.multiplies_in_fp8 else OWN
        changes, skipped = plan_linears(
            model, {LINEAR: own}, key, given, self._why_not, self._why_not_experts, EXPERTS
        )
        tables = [f for f, m in model.named_modules() if isinstance(m, nn.Embedding)]
        skipped |= dict.fromkeys(tables, "an embedding: looked up, not multiplied")
        skipped = {fqn: why for fqn, why in skipped.items() if not in_adapter(fqn)}
        for fqn in skipped:
            if any(p.requires_grad for p in model.get_submodule(fqn).parameters()):
                skipped[fqn] = IN_FULL
        if self.multiplies_in_fp8 and changes and own not in {c.after for c in changes.values()}:
            what = "quantization_type: fp8 has no linear to multiply in FP8"
            fix = "set quantization_products: dequantized, or shorten quantization_exclude"
            raise JobError(what, f"{len(changes)} modules, all of them experts", fix)
        plan = Plan(self.name, changes, skipped)
        return plan.with_notes(*self._notes(model, plan))

    def _why_not(self, linear: nn.Linear) -> str:
        if linear.weight.requires_grad:
            return IN_FULL
        sizes = (linear.in_features, linear.out_features)
        if self.multiplies_in_fp8 and any(size % MULTIPLE for size in sizes):
            return f"{sizes[0]} x {sizes[1]}: not divisible by {MULTIPLE}"
        # Bytes are stored in the dtype that computes.
        return self._odd(linear.in_features, linear.weight.element_size())

    def _why_not_experts(self, experts: nn.Module) -> str:
        from raytrain_adv.ops.experts.find import matrices, widths_of

        size = next(iter(matrices(experts).values())).element_size()
        reasons = (self._odd(width, size) for width in widths_of(experts).values())
        return next(filter(None, reasons), "")

    def _odd(self, width: int, size: int) -> str:
        if self.quantization_bit == 4 and width % BLOCK:
            return f"{width} input features do not divide into blocks of {BLOCK}"
        if self.form.row_bytes(width) % size:
            return f"{width} input features are not a whole number of {size} bytes"
        return ""

    def _notes(self, model: nn.Module, plan: Plan) -> Iterator[str]:
        from torch import nn

        from raytrain_adv.ops.experts.find import widths_of

        weights, bits = list[nn.Parameter](), 0.0
        for fqn, change in plan.changes.items():
            module = model.get_submodule(fqn)
            widths = widths_of(module) if change.after == EXPERTS else {"weight": 0}
            for name, width in widths.items():
                held = module.get_parameter(name)
                rows, columns = (held[0].numel() // width, width) if width else held.shape
                bits += held.numel() * self.form.bits(rows, columns)
                weights.append(held)
        if not weights:
            return
        count = sum(w.numel() for w in weights)
        total = sum(p.numel() for fqn, p in model.named_parameters() if not in_adapter(fqn))
        yield (
            f"{self.scheme}: {count:,} of {total:,} weights ({count / total:.1%}) in "
            f"{bits / count:.2f} bits each: {disk(bits / 8 / GIB)} instead of "
            f"{disk(sum(w.nbytes for w in weights) / GIB)}"
        )
        rest = ", ".join(f"{kind} {n:,}" for kind, n in self._left(model, plan).items())
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        yield f"left in {dtype}: {rest}"
        if self.is_float8:
            yield (
                "products in training are in FP8, with inputs and gradients rounded too; those of "
                "experts and in evaluation are not: they multiply by the weights' values"
                if self.multiplies_in_fp8
                else "products are in the dtype that computes, by the weights' values"
            )
        yield "the base is not trained; it is not in checkpoints or the exported adapter"

    @staticmethod
    def _left(model: nn.Module, plan: Plan) -> Counter[str]:
        """Return the number of weights of each kind that is not quantized."""
        from torch import nn

        heads, left = output_heads(model), Counter[str]()
        for full_name, p in model.named_parameters():
            fqn, _, name = full_name.rpartition(".")
            module = model.get_submodule(fqn)
            if in_adapter(fqn) or (fqn in plan.changes and (name == "weight" or p.ndim == 3)):
                continue
            kinds = {
                "embeddings": isinstance(module, nn.Embedding),
                "the head": module in heads,
                "routers": plan.skipped.get(fqn) == ROUTES,
                "biases": name.endswith("bias"),
                "norms": p.ndim == 1,
            }
            left[next((k for k, it_is in kinds.items() if it_is), "other weights")] += p.numel()
        return left

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Replace planned linears and experts by frozen ones whose weights are quantized."""
        from raytrain_adv.ops.bitsandbytes.experts import PackedExperts
        from raytrain_adv.ops.bitsandbytes.linear import PackedLinear
        from raytrain_adv.ops.float8.stored_linear import StoredFloat8Linear

        kind = StoredFloat8Linear if self.multiplies_in_fp8 else PackedLinear
        for fqn in plan.changes:
            old: Any = model.get_submodule(fqn)
            if plan.changes[fqn].after == EXPERTS:
                model.set_submodule(fqn, PackedExperts.packing(old, self.form))
            else:
                model.set_submodule(fqn, kind.of(old, self.form))

    def install(self, model: nn.Module, plan: Plan, worker: Worker) -> Plan:
        """Compare a product and its gradient with those of bitsandbytes' own linear; in float8 with
        those of weights that are not rounded, for each size.
        """
        if self.is_float8:
            return plan.with_notes(*self._tried(model, plan, worker))
        from raytrain_adv.ops.bitsandbytes.linear import apart_from_bitsandbytes

        device, dtype = worker.device, worker.dtype
        try:
            apart = apart_from_bitsandbytes(self.form, device, dtype)
        except (RuntimeError, AttributeError, ImportError) as error:
            raise TrainingError(
                "bitsandbytes does not run on this device",
                f"{device}, {dtype}: {of_error(error)}",
                "install a bitsandbytes that has this CUDA version (python -m bitsandbytes prints "
                f"what it finds), or {OFF}",
            ) from error
        own = "Linear8bitLt's weights" if self.form.is_int8 else "Linear4bit"
        if apart:
            raise TrainingError(
                "A quantized linear and bitsandbytes' own compute different results",
                f"{' and '.join(apart)} differ from {own}, {self.scheme}, on {device} in {dtype}",
                DEFECT,
            )
        note = f"values and gradients equal bitsandbytes' {own} bit for bit on {device.type}"
        return plan.with_notes(note)

    def _tried(self, model: nn.Module, plan: Plan, worker: Worker) -> Iterator[str]:
        """Yield how far products in FP8 are off. Raises TrainingError when rounding explains less,
        or when the casts of this machine are wrong.
        """
        from raytrain_adv.ops.float8.stored_linear import tried

        if not self.multiplies_in_fp8:
            return
        linears: list[Any] = [
            model.get_submodule(f) for f, c in plan.changes.items() if c.after == FLOAT8
        ]
        sizes = {(linear.out_features, linear.in_features) for linear in linears}
        try:
            wrong, (values, gradients) = tried(sorted(sizes), worker.device, worker.dtype, OFF_BY)
        except (RuntimeError, ImportError, OSError) as error:
            wrong, (values, gradients) = [of_error(error)], (0, 0)
        if wrong:
            raise TrainingError(
                "FP8 products give wrong results on this machine",
                "\n".join(wrong),
                "compare the versions of torch, triton and the GPU's driver with constraints.txt, "
                "or set quantization_products: dequantized",
            )
        yield (
            f"tested on {worker.device.type}, {len(sizes)} sizes: products off by {values:.1e}, "
            f"gradients by {gradients:.1e}, which is FP8's rounding"
        )

    def initialize(self, model: nn.Module, plan: Plan, seed: int) -> tuple[str, ...]:
        """Compare the quantized weights with the originals they were made from."""
        from torch import nn

        from raytrain_adv.ops.bitsandbytes.linear import sum_distances
        from raytrain_adv.ops.experts.find import shapes

        held: dict[str, Any] = {}
        for fqn, change in plan.changes.items():
            module = model.get_submodule(fqn)
            names = shapes(module) if change.after == EXPERTS else ()
            held |= {f"{fqn}.{n}": module.get_submodule(n) for n in names} or {fqn: module}
        read = {fqn: m.distance for fqn, m in held.items() if m.distance is not None}
        found = dict(zip(read, sum_distances(list(read.values())), strict=True))
        far = {fqn: worst for fqn, (_, _, worst) in found.items() if not worst <= 1}
        how = "times as far off as rounding explains"
        trained = [
            f"{fqn}.weight"
            for fqn, m in model.named_modules()
            if isinstance(m, nn.Linear) and m.weight.requires_grad and not in_adapter(fqn)
            if plan.skipped.get(fqn) != IN_FULL
        ]
        wrong = [f"{fqn} was not read" for fqn in held if fqn not in read]
        wrong += [f"{fqn}: a weight is {worst:.3g} {how}" for fqn, worst in far.items()]
        wrong += [f"{fqn} would be trained" for fqn in trained]
        if wrong:
            texts = "\n".join(wrong[:4]) + f"\n({len(wrong)} in all)"
            fix = "check the checkpoint for weights that are not finite"
            raise TrainingError("The quantized base differs from the checkpoint", texts, fix)
        squares, sizes, worst = zip(*found.values(), strict=True)
        overall = (sum(squares) / sum(sizes)) ** 0.5
        apart = {f: (squared / size) ** 0.5 for f, (squared, size, _) in found.items() if size}
        most = max(apart, key=apart.__getitem__)
        return (
            f"quantized weights are {overall:.2%} from the originals (relative norms), at most "
            f"{apart[most]:.2%} ({own_name(most)}); no weight is further off than "
            f"{max(worst):.2f} of what rounding explains",
        )
