"""Find a model's modules by name, and choose the linears that a feature changes."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any

from raytrain_adv.errors import JobError
from raytrain_adv.text import plural, split_names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from raytrain_adv.transforms.transform import Change

LINEAR = "torch.nn.Linear"
IN_FULL = "trained in full"
READ = "the forward pass reads its weight without calling it"
UNREACHED = "no gradient reaches it on text"
RENAMED = "neither PEFT nor transformers would find what it has beside its weight"
ROUTES = "it routes tokens to experts"
WEIGHT_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\[|\.(?:data|device|dtype|ndim|shape|size)\b)")
UNKNOWN_EXPERTS = "experts that are computed in a way of their own"


def class_name(module: nn.Module) -> str:
    """Return a module's class with its package, as `torch.nn.Linear` or
    `peft.tuners.lora.layer.Linear`; for a class made by fully_shard, the original class.
    """
    kind = type(module)
    if not kind.__module__.startswith("torch.nn"):
        kind = next((k for k in kind.__mro__ if not k.__name__.startswith("FSDP")), kind)
    is_torchs = kind.__module__.startswith("torch.nn.modules.")
    return f"{'torch.nn' if is_torchs else kind.__module__}.{kind.__qualname__}"


def weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the attributes of a class whose weights its methods compute with, as kernels of Mamba
    do with `out_proj` on a GPU, other than to initialize them; empty if there is no source.
    """
    return frozenset[str]().union(*(_read_by(part) for part in kind.__mro__))


@cache
def _read_by(part: type) -> frozenset[str]:
    """Return what methods that a class has itself, not from its bases, compute with."""
    found: set[str] = set()
    for name, method in vars(part).items():
        if not inspect.isfunction(method) or "init" in name:
            continue
        # Finding a source takes milliseconds, and a model's classes have hundreds of methods.
        if "weight" not in _names_in(inspect.unwrap(method).__code__):
            continue
        with suppress(OSError):
            found.update(WEIGHT_READ.findall(inspect.getsource(method)))
    return frozenset(found)


def _names_in(code: CodeType) -> set[str]:
    """Return the names of attributes and globals in a function and in those within it."""
    inner = (_names_in(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)


def is_read(model: nn.Module, name: str) -> bool:
    """Whether the parent of a linear, by its name in the plain model, computes with its weight
    without calling it.
    """
    parent: Any = type(model.get_submodule(name.rpartition(".")[0]))
    return short(name) in weights_read(parent)


def names_to_store(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function that gives the name under which transformers and PEFT read a tensor as
    the model's: the model's own, or the checkpoint's if their mapping would change the model's own
    once more; empty if they read none as it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = (entry for entry in mapping if isinstance(entry, WeightRenaming))
    entries: list[Any] = [entry for entry in renamings if not isinstance(entry, PrefixChange)]
    undone = [entry.reverse_transform() for entry in entries[::-1]]

    def renamed(name: str, by: list[Any]) -> str:
        for renaming in by:
            name, _ = renaming.rename_source_key(name)
        return name

    def name_to_store(name: str) -> str:
        stored = name if renamed(name, entries) == name else renamed(name, undone)
        return stored if renamed(stored, entries) == name else ""

    return name_to_store


def why_no_linears(model: Any) -> str:
    """Return why engines take no linear of each of a mixture's experts; empty if its checkpoints
    have them one by one, as engines read them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist

    if any(fqn.endswith(".experts.base_layer") for fqn, _ in model.named_modules()):
        return "adapters on experts are merged for no engine"
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    operations = (one for entry in mapping for one in getattr(entry, "operations", None) or ())
    if any(isinstance(one, MergeModulelist) for one in operations):
        return ""
    return f"checkpoints of {model.config.model_type} keep all experts in one tensor"


def lost_parts(model: nn.Module, fqns: Iterable[str], part: str) -> dict[str, str]:
    """Return, by its fqn, why a linear cannot have this part beside its weight, for those whose
    part transformers would not find when it loads a file.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    name_to_store = names_to_store(model)
    return {fqn: RENAMED for fqn in fqns if not name_to_store(f"{own_name(fqn)}.{part}")}


def own_forward(module: nn.Module) -> Any:
    """Return the function that is bound to a module instead of its class's forward, if any."""
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", forward)


def plan_linears(
    model: nn.Module,
    becomes: Mapping[str, str],
    key: str,
    value: str | list[str],
    why_not: Callable[[nn.Linear], str],
    why_not_experts: Callable[[nn.Module], str],
    experts_become: str = "",
) -> tuple[dict[str, Change], dict[str, str]]:
    """Return the changes of the linears and stacked experts that a feature changes, and why others
    are skipped, both by fqn. The head, routers and adapters are skipped, and what the value of a
    job key excludes. `becomes` has for each class that can be changed the class it becomes;
    `why_not` and `why_not_experts` return why one of these is skipped, or nothing. Raises JobError
    if a pattern matches no linear or experts.
    """
    from torch import nn

    from raytrain_adv.ops.experts.find import layout_of, routers, stacked
    from raytrain_adv.transforms.transform import Change

    linears = {fqn: m for fqn, m in model.named_modules() if isinstance(m, nn.Linear)}
    experts = stacked(model)
    excluded = _excluded(key, value, [*linears, *experts])
    heads, choosing = output_heads(model), routers(model)

    def reason_against(fqn: str, linear: nn.Linear) -> str:
        if linear in heads:
            return "the language-model head"
        if fqn in excluded:
            return f"in {key}"
        if (kind := class_name(linear)) not in becomes:
            return f"a {kind}, not a plain linear"
        if {fqn, own_name(fqn)} & choosing:
            return ROUTES
        if in_adapter(fqn):
            return "an adapter"
        return READ if is_read(model, own_name(fqn)) else why_not(linear)

    def reason_against_experts(fqn: str, module: nn.Module) -> str:
        if fqn in excluded:
            return f"in {key}"
        return UNKNOWN_EXPERTS if layout_of(module) is None else why_not_experts(module)

    reasons = {f: reason_against(f, m) for f, m in linears.items()}
    reasons |= {f: reason_against_experts(f, m) for f, m in experts.items()}
    reasons |= dict.fromkeys(choosing - linears.keys(), ROUTES)
    skipped = {fqn: reason for fqn, reason in reasons.items() if reason}
    kinds = {f: class_name(m) for f, m in (linears | experts).items() if f not in skipped}
    after = {f: experts_become if f in experts else becomes[kind] for f, kind in kinds.items()}
    return {f: Change(kind, after[f]) for f, kind in kinds.items()}, skipped


def nothing_changed(
    what: str, model: nn.Module | None, skipped: Mapping[str, str], fix: str, off: str
) -> JobError:
    """Return the refusal of a feature that no module would be changed by: the linears are of
    another kind (None: it is no feature of linears), or each module was skipped; adapters are named
    only if there is nothing else.
    """
    from transformers.pytorch_utils import Conv1D

    modules = () if model is None else model.modules()
    if others := sum(isinstance(module, Conv1D) for module in modules):
        found = (
            f"{plural(others, 'linear')} are transformers' Conv1D, as GPT-2's; that is no Linear"
        )
        return JobError(what, found, f"take a model of torch.nn.Linear, as Llama's, or {off}")
    own = {fqn: why for fqn, why in skipped.items() if not in_adapter(fqn)} or skipped
    reasons = Counter(own.values()).most_common(4)
    found = "\n".join(f"{plural(count, 'module')}: {reason}" for reason, count in reasons)
    none = "no module of the model is of a kind it changes"
    return JobError(what, found or none, f"{fix}, or {off}")


def _excluded(key: str, value: str | list[str], fqns: list[str]) -> frozenset[str]:
    """Return the modules that the value of a job key excludes; refuse a pattern without any."""
    found: set[str] = set()
    for pattern in split_names(value):
        matched = {fqn for fqn in fqns if matches(pattern, own_name(fqn))}
        if not matched:
            known = sorted({short(own_name(fqn)) for fqn in fqns})
            raise JobError(
                f"{key} {pattern} matches no linear of the model",
                f"its linears are {', '.join(known)}",
                f"did you mean {did_you_mean(pattern, known)}? a pattern may contain *",
            )
        found |= matched
    return frozenset(found)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits, if the model, or the one inside PEFT's, names it."""
    return _named_by(model, "get_output_embeddings")


def output_heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the module that makes logits, and the one under its adapter."""
    head = output_head(model)
    return tuple(m for m in (head, getattr(head, "base_layer", None)) if m is not None)


def input_embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the table in which the model, or the one inside PEFT's, looks up its input ids."""
    from torch import nn

    found = _named_by(model, "get_input_embeddings")
    return found if isinstance(found, nn.Embedding) else None


def token_tables(model: nn.Module) -> list[nn.Module]:
    """Return the modules with a row for each token: the embedding, the head, and the table for the
    layers that Gemma 3n and 4 have, which transformers resizes with them.
    """
    untyped: Any = model
    found = [input_embedding(model), output_head(model)]
    if hasattr(model, "get_per_layer_input_embeddings"):
        with suppress(AttributeError):  # a size that has none
            found.append(untyped.get_per_layer_input_embeddings())
    return [table for table in found if table is not None]


def _named_by(model: nn.Module, method: str) -> nn.Module | None:
    from transformers import PreTrainedModel

    found: nn.Module | None = None
    if isinstance(model, PreTrainedModel):
        found = getattr(model, method)()
        if found is None:  # Nemotron-H Omni: that of a causal model inside, which it does not name
            inner = (_named_by(child, method) for child in model.children())
            found = next((one for one in inner if one is not None), None)
    return found


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained matrices other than embeddings and the head, which Muon updates."""
    from torch import nn

    tables = [*output_heads(model), *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    excluded = {id(m.weight) for m in tables}
    trained = (p for p in model.parameters() if p.requires_grad and p.ndim == 2)
    return [p for p in trained if id(p) not in excluded]


def fqn_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """Return a module's name in the model; none if it is not in it."""
    return next((fqn for fqn, other in model.named_modules() if other is module), None)


def is_tied(model: nn.Module) -> bool:
    """Whether the embedding and the head are one parameter."""
    head, embedding = output_head(model), input_embedding(model)
    return head is not None and embedding is not None and head.weight is embedding.weight


def in_adapter(fqn: str) -> bool:
    """Whether a module or parameter is (in) an adapter, by its name."""
    return "lora_" in fqn or "oft_" in fqn


def own_name(fqn: str) -> str:
    """Return a module's name in the plain model: PEFT keeps it inside its adapters' modules."""
    while fqn.endswith(".base_layer"):
        fqn = fqn.removesuffix(".base_layer")
    return fqn


def matches(pattern: str, fqn: str) -> bool:
    """Whether a name, an end of a name, or a pattern with * matches a module."""
    return fqn == pattern or fqn.endswith(f".{pattern}") or fnmatch.fnmatchcase(fqn, pattern)


def short(name: str) -> str:
    """Return the last segment of a dotted name."""
    return name.rpartition(".")[2]


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the three known names most like a name that does not exist, the best first."""
    return get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.4)


def did_you_mean(name: str, known: list[str]) -> str:
    """Return the known names most like a name that does not exist, or the first ones if none is."""
    return ", ".join((nearest(name, known) or known)[:3])
