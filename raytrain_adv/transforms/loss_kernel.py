"""How the loss is computed: the one owner of a model's head and loss, whichever key enables it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raytrain_adv.config.problems import Problem
from raytrain_adv.config.training import OTHER_LOSSES
from raytrain_adv.errors import JobError
from raytrain_adv.transforms.modules import LINEAR, class_name, fqn_of, output_head
from raytrain_adv.transforms.transform import (
    Change,
    Context,
    Plan,
    Transform,
    require_gpu,
    require_package,
)

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig
    from raytrain_adv.hardware import HardwareFacts
    from raytrain_adv.ops.loss.linear_cross_entropy import LogitMap

AUTO = "chunked"
"""What loss_kernel: auto is for a model that allows it: as fast as torch's loss within the noise,
with 2.4 GiB less memory in an 8B model's step."""
COSTS = {
    "liger": "its weight gradient is summed in float32: a second one while it runs",
    "cut_cross_entropy": (
        "it sums gradients in bf16: that of the hidden states is 1.2 % off the exact one where "
        "torch's is 0.2 % off (8B shape); the check before training measures how far in this model"
    ),
}
"""What differs from torch's loss."""
PACKAGES = {"cut_cross_entropy": "cut-cross-entropy", "liger": "liger-kernel"}
"""Kernel -> the package it comes from."""
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Keys of model configs by which logits are multiplied: Cohere, Falcon-H1, Muse."""
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Keys by which logits are divided: Granite and MiniCPM, Inkling."""
MULTIPLIED = "hyperclovax"  # beginning of the model types that multiply by those keys
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Keys that bend logits by tanh: Gemma, RecurrentGemma, xLSTM."""


class LossKernel(Transform):
    """Compute the loss inside the head, so that the logits of all tokens never exist."""

    name: ClassVar[str] = "loss_kernel"
    feature: ClassVar[str] = "Loss kernel"
    tried_with: ClassVar[dict[str, Any]] = {"loss_kernel": "chunked"}
    stage: ClassVar[str] = "loss"
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "precision"})

    loss_kernel: Literal["auto", "torch", "chunked", "cut_cross_entropy", "liger"] = "auto"
    """How head and loss are computed: torch (logits of all tokens, then the loss), chunked (a part
    of the tokens at a time), cut_cross_entropy or liger (those packages' kernels, GPU only); auto
    takes chunked, and torch for models that chunked is wrong for."""
    cut_cross_entropy: bool = False
    """The same as loss_kernel: cut_cross_entropy."""

    @property
    def kernel(self) -> str:
        """The kernel, by whichever key."""
        if self.cut_cross_entropy:
            return "cut_cross_entropy"
        return AUTO if self.loss_kernel == "auto" else self.loss_kernel

    @property
    def is_auto(self) -> bool:
        """Whether the job does not name the kernel."""
        return self.loss_kernel == "auto" and not self.cut_cross_entropy

    @property
    def enabled(self) -> bool:
        """Whether the loss is computed in the head, if the model allows it."""
        return self.kernel != "torch"

    def contradictions(self) -> Iterable[Problem]:
        """Refuse two kernels for one loss."""
        if self.cut_cross_entropy and self.loss_kernel not in ("auto", "cut_cross_entropy"):
            both = f"{self.loss_kernel} and cut_cross_entropy"
            text = f"the loss has one owner, and {both} both claim it"
            yield Problem(text, "keep one of them", "cut_cross_entropy and loss_kernel")

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse a kernel that the job's precision or device does not have."""
        key = "cut_cross_entropy" if self.cut_cross_entropy else "loss_kernel"
        if job.train.weighs_tokens and not self.is_auto:
            loss = next(name for name in OTHER_LOSSES if getattr(job.train, name))
            text = f"{loss} needs each token's logits, which {self.kernel} never has"
            yield Problem(text, "set loss_kernel: auto", f"{key} and {loss}")
        if self.kernel == "cut_cross_entropy" and not job.train.computes_in_bf16:
            text = "cut_cross_entropy computes in bf16 only"
            yield Problem(text, "set bf16: true, or loss_kernel: chunked", f"{key} and bf16")
        if self.kernel in PACKAGES and job.parallel.use_cpu:
            text = f"{self.kernel} is written in Triton and needs a GPU"
            yield Problem(text, "set loss_kernel: chunked, or use_cpu: false", f"{key} and use_cpu")

    def check(self, facts: HardwareFacts) -> None:
        """Refuse kernels that the node cannot run."""
        package = PACKAGES.get(self.kernel)
        if package is None:
            return
        what = f"The loss kernel {self.kernel}"
        other = "set loss_kernel: chunked, which runs everywhere"
        require_package(facts, what, package, other)
        require_gpu(facts, f"{what} is written in Triton and runs on GPUs only", other)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Return how the head will compute the loss; auto leaves it to torch where a named kernel
        would be refused.
        """
        if context.job.train.weighs_tokens:
            why = "loss_kernel: auto is torch: the loss weighs tokens by their logits"
            return Plan(self.name, notes=(why,), empty_because=why)
        try:
            fqn, head = self._head_of(model)
        except JobError as refusal:
            if not self.is_auto:
                raise
            if key := own_loss(output_head(model)):
                raise JobError(refusal.what, refusal.found, f"set {key}: false") from None
            why = f"loss_kernel: auto is torch for this model: {refusal.found}"
            return Plan(self.name, notes=(why,), empty_because=why)
        after = _with_loss(head, self.kernel, self._reads_weight(head))
        changes = {fqn: Change(class_name(head), after)}
        return Plan(self.name, changes, notes=tuple(self._notes(model)))

    def _head_of(self, model: nn.Module) -> tuple[str, nn.Module]:
        """Return name and module of a head that can compute the loss; refuse others."""
        from raytrain_adv.ops.loss.head import body_of

        head = output_head(model)
        fqn, body = fqn_of(model, head), body_of(model)
        if fqn is not None and self.kernel == "chunked" and body is not None:
            # BERT's head is more than a linear, and called whole.
            outer = model.get_submodule(fqn.partition(".")[0])
            if all(module is not body for module in outer.modules()):
                head, fqn = outer, fqn.partition(".")[0]
        # Body, head and loss replace the model's forward pass, which must do nothing else.
        if head is None or fqn is None:
            what = "needs a language-model head"
            found = "does not name the module that makes its logits"
        elif not class_name(model).startswith("transformers."):
            what, found = "is for models of transformers", "has its own forward pass"
        else:
            what, found = "is for models that are a body and a head", _besides(model, body, head)
            if not found:
                self._check_head(fqn, head)
                return fqn, head
        fix = "set loss_kernel: torch"
        raise JobError(f"loss_kernel: {self.kernel} {what}", f"{class_name(model)} {found}", fix)

    def _check_head(self, fqn: str, head: nn.Module) -> None:
        if self.kernel == "chunked":
            return
        key = "cut_cross_entropy: true" if self.cut_cross_entropy else f"loss_kernel: {self.kernel}"
        fix = "set loss_kernel: chunked, which calls the module"
        if not self._is_plain(head):
            raise JobError(
                f"{key} would bypass what is on {fqn}",
                f"{fqn} is a {class_name(head)}, and the kernel multiplies with its weight alone",
                f"{fix}, or keep {fqn} plain",
            )
        if self.kernel == "cut_cross_entropy" and getattr(head, "bias", None) is not None:
            raise JobError(f"{key} has no bias", f"{fqn} has one", fix)

    @staticmethod
    def _is_plain(head: nn.Module) -> bool:
        return class_name(head) == LINEAR and "forward" not in head.__dict__

    def _reads_weight(self, head: nn.Module) -> bool:
        """Whether the head's weight is multiplied with directly, also by its class's own loss."""
        return self._is_plain(head) or bool(own_loss(head))

    def _notes(self, model: nn.Module) -> Iterator[str]:
        logit_map = read_logit_map(model)
        if self.is_auto:
            yield (
                f"loss_kernel: auto is {self.kernel}: as fast as torch's loss, and the logits of "
                "all tokens never exist"
            )
        if logit_map.scale != 1.0:
            yield f"logits are multiplied by {logit_map.scale:g}, as the model does"
        if logit_map.softcap is not None:
            yield f"logits are capped at {logit_map.softcap:g}, as the model does"
        if self.kernel in COSTS:
            yield COSTS[self.kernel]

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Make the planned head compute the loss if it gets labels."""
        from raytrain_adv.ops.loss.head import HeadLoss, install

        for fqn in plan.changes:
            head = model.get_submodule(fqn)
            kernel: Any = self.kernel
            vocabulary = text_config(model).vocab_size
            loss = HeadLoss(kernel, read_logit_map(model), self._reads_weight(head), vocabulary)
            install(model, head, loss)

    def what_is(self, module: nn.Module) -> str:
        """Return a module's class, and the loss that it computes."""
        from raytrain_adv.ops.loss.head import loss_of

        loss = loss_of(module)
        if loss is None:
            return class_name(module)
        return _with_loss(module, loss.kernel, loss.reads_weight)


def own_loss(head: nn.Module | None) -> str:
    """Return the job's key by which a head's class has a loss of its own; empty if it has none."""
    return str(getattr(type(head), "key", "")) if hasattr(type(head), "cross_entropy") else ""


def _with_loss(head: nn.Module, kernel: str, is_plain: bool) -> str:
    how = "" if is_plain else ", called chunk by chunk"
    return f"{class_name(head)} with the {kernel} loss{how}"


def _besides(model: nn.Module, body: nn.Module | None, head: nn.Module) -> str:
    """Return what a model has between its body and its head; empty if nothing."""
    if body is None or any(module is head for module in body.modules()):
        return "does not name the module that is its body"
    if getattr(text_config(model), "output_router_logits", False):
        return "adds the loss of its routers (output_router_logits in its config)"
    known = {id(p) for part in (body, head) for p in part.parameters()}
    others = [name for name, p in model.named_parameters() if id(p) not in known]
    return f"computes with {others[0]} after its body" if others else ""


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model; the types of transformers leave it open."""
    config: Any = model.config
    return config.get_text_config()


def _names(model: nn.Module, key: str) -> bool:
    """Whether a model's code has a key of its config: that of Cohere's image models scales no
    logits, unlike their text models.
    """
    try:
        return any(key in inspect.getsource(kind) for kind in type(model).__mro__[:2])
    except (OSError, TypeError):
        return True


def read_logit_map(model: nn.Module) -> LogitMap:
    """Return what the model does to its head's output, by the names that configs have for it.

    The check before training, which compares losses, finds a model that does more.
    """
    from raytrain_adv.ops.loss.linear_cross_entropy import LogitMap

    config = text_config(model)
    given = {key: getattr(config, key, None) for key in (*SCALES, *DIVISORS, *SOFTCAPS)}
    number = {key: float(v) for key, v in given.items() if v and isinstance(v, int | float)}
    scale, softcap = 1.0, None
    for key in SCALES:
        if key in number and _names(model, key):  # its code is searched only then: that is slow
            scale *= number[key]
    multiplies = str(config.model_type).startswith(MULTIPLIED)
    for key in DIVISORS:
        divisor = number.get(key, 1.0)
        scale *= divisor if multiplies else 1.0 / divisor
    for key in SOFTCAPS:
        softcap = number.get(key, softcap)
    return LogitMap(scale, softcap)
