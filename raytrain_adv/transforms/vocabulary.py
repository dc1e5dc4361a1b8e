"""New tokens with rows in the embedding and the head; modules trained in full beside adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from raytrain_adv.config.problems import Problem
from raytrain_adv.config.section import Names
from raytrain_adv.errors import JobError
from raytrain_adv.text import listed, split_names
from raytrain_adv.transforms.modules import (
    IN_FULL,
    class_name,
    did_you_mean,
    fqn_of,
    in_adapter,
    input_embedding,
    is_tied,
    matches,
    output_head,
    own_name,
    short,
    token_tables,
)
from raytrain_adv.transforms.transform import Change, Context, Plan, Transform

if TYPE_CHECKING:
    from torch import nn

    from raytrain_adv.config.job import JobConfig


class Vocabulary(Transform):
    """Add tokens to the tokenizer and rows to the tables; train modules next to adapters."""

    name: ClassVar[str] = "vocabulary"
    stage: ClassVar[str] = "adapter"
    tried_with: ClassVar[dict[str, Any]] = dict(resize_vocab=True, add_tokens="<one>,<two>")

    resize_vocab: bool = False
    """Give the embedding and the head a row for each token of the tokenizer, in multiples of 64;
    new rows are filled with the mean of the others and noise. With adapters both are trained."""
    add_tokens: Names | None = None
    """New tokens, comma separated or a list; needs resize_vocab."""
    add_special_tokens: Names | None = None
    """The same of special tokens, which decoding can leave out."""
    additional_target: Names | None = None
    """Modules that are trained in full next to adapters and saved with them (PEFT's
    modules_to_save), comma separated or a list: names, or ends of names; null means the embedding
    and the head with resize_vocab."""

    @property
    def enabled(self) -> bool:
        """Whether there is anything to add or train."""
        return self.resize_vocab or any((self.words, self.special, self.additional_target))

    @property
    def words(self) -> tuple[str, ...]:
        """The names in add_tokens."""
        return tuple(split_names(self.add_tokens))

    @property
    def special(self) -> tuple[str, ...]:
        """The names in add_special_tokens."""
        return tuple(split_names(self.add_special_tokens))

    def contradictions(self) -> Iterable[Problem]:
        """Refuse new tokens without rows, and tokens that are named twice."""
        for key in ("add_tokens", "add_special_tokens"):
            if getattr(self, key) and not self.resize_vocab:
                text = "new tokens need rows in the embedding and the head"
                fix = "set resize_vocab: true, as LLaMA-Factory does by itself"
                yield Problem(text, fix, f"{key} and resize_vocab")
        if both := sorted({*self.words} & {*self.special}):
            text = f"both name {listed(both)}"
            yield Problem(text, "keep it in one of them", "add_tokens and add_special_tokens")

    def conflicts(self, job: JobConfig) -> Iterable[Problem]:
        """Refuse modules next to adapters if there are none."""
        if self.additional_target and job.flat()["finetuning_type"] != "lora":
            if job.train.freeze_trainable_layers is not None:
                fix = "delete it, and name the modules in freeze_extra_modules"
            else:
                fix = "delete it: finetuning_type: full trains all modules"
            text = "it names modules to train next to adapters, and there are no adapters"
            yield Problem(text, fix, "additional_target and finetuning_type")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the modules that are trained in full next to adapters. Raises JobError if there
        are no such modules, or new rows would not be trained.
        """
        if context.job.flat()["finetuning_type"] != "lora":
            self._require_trained(
                model, {n for n, p in model.named_parameters() if p.requires_grad}
            )
            return Plan(self.name, empty_because="all modules are trained")
        named = {own_name(fqn): m for fqn, m in model.named_modules() if not in_adapter(fqn)}
        chosen = self._chosen(model, named)
        names = {f"{fqn}.{n}" for fqn in chosen for n, _ in named[fqn].named_parameters()}
        self._require_trained(model, names)
        changes = {f: Change(self.what_is(m), _in_full(m)) for f, m in chosen.items()}
        count = sum(p.numel() for m in chosen.values() for p in m.parameters())
        if is_tied(model) and output_head(model) in chosen.values():
            head: Any = output_head(model)
            count -= head.weight.numel()
        held = {f: p.numel() for f, p in model.named_parameters() if not in_adapter(f)}
        note = (
            f"{count:,} weights are trained in full and saved with the adapters; the other "
            f"{sum(held.values()) - count:,} of the model are frozen"
        )
        return Plan(self.name, changes, notes=(note,))

    def _chosen(self, model: nn.Module, named: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Return the modules of additional_target, or the tables, by name."""
        tables = [t for t in (input_embedding(model), output_head(model)) if t is not None]
        targets = split_names(self.additional_target)
        chosen = {f: m for f, m in named.items() if any(matches(t, f) for t in targets)}
        for target in targets:
            if not any(matches(target, fqn) for fqn in chosen):
                known = sorted({short(fqn) for fqn in named if fqn and not short(fqn).isdigit()})
                raise JobError(
                    f"additional_target {target} matches no module of {short(class_name(model))}",
                    f"its modules are {', '.join(known)}",
                    f"did you mean {did_you_mean(target, known)}?",
                )
        if not targets:
            tables = token_tables(model)
        if not targets or (is_tied(model) and any(t in chosen.values() for t in tables)):
            chosen |= {str(fqn_of(model, table)): table for table in tables}
        return chosen

    def _require_trained(self, model: nn.Module, trained: set[str]) -> None:
        """Refuse new rows that would be neither trained nor saved."""
        if not self.resize_vocab:
            return
        fqns = [str(fqn_of(model, table)) for table in token_tables(model)]
        left = [fqn for fqn in fqns if f"{fqn}.weight" not in trained]
        if is_tied(model) and not {*fqns[:2]} <= {*left}:  # one of them stands for both
            left = [fqn for fqn in left if fqn not in fqns[:2]]
        if left:
            key = "additional_target" if self.additional_target else "freeze_extra_modules"
            raise JobError(
                "resize_vocab adds rows that would not be trained",
                f"{' and '.join(left)} would be frozen",
                f"add {','.join(short(fqn) for fqn in left)} to {key}"
                + (", or delete it" if self.additional_target else ""),
            )

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Make the parameters of the planned modules float32 and trainable."""
        from torch import nn

        chosen = [p for fqn in plan.changes for p in model.get_submodule(fqn).parameters()]
        exact = {held: nn.Parameter(held.detach().float()) for held in chosen}
        for owner in model.modules():  # tied ones stay one: a head's bias has two owners in BERT
            for name, held in list(owner.named_parameters(recurse=False)):
                if held in exact:
                    setattr(owner, name, exact[held])
        if plan.changes:
            described: Any = model
            (config,) = described.peft_config.values()
            config.modules_to_save = sorted(_peft_names(model, list(plan.changes)))

    def what_is(self, module: nn.Module) -> str:
        """Return a module's class, and whether it is trained in full."""
        own = list(module.parameters())
        return _in_full(module) if own and all(p.requires_grad for p in own) else class_name(module)


def _in_full(module: nn.Module) -> str:
    return f"{class_name(module)}, {IN_FULL}"


def _peft_names(model: nn.Module, fqns: list[str]) -> Iterator[str]:
    """Yield the modules' last segments, or their whole names if others end in those: PEFT compares
    ends of names, not segments.
    """
    everything = [own_name(fqn) for fqn, _ in model.named_modules(remove_duplicate=False)]
    for end in {short(fqn) for fqn in fqns}:
        ours = [fqn for fqn in fqns if short(fqn) == end]
        yield from [end] if len([f for f in everything if f.endswith(end)]) == len(ours) else ours
