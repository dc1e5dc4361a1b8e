"""Held-out loss in bf16, and rounded without (PTQ) and with (QAT) training for it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain_adv import text
from raytrain_adv.report.parts import Variant
from raytrain_adv.report.record import RunReport
from raytrain_adv.storage.metrics_file import best_step
from raytrain_adv.transforms.qat import BF16, PTQ, QAT, Qat

TWIN = "twin"
NEGLIGIBLE = 1e-4
"""Share of the loss in bf16. If PTQ loses less, no recovered share is stated: it would be noise."""
TIMES = 9.0
"""Share from which a loss is stated as a multiple of the one in bf16, not in percent more."""
HEADS = ("weights", "step", "held-out loss", "perplexity", "against bf16")
EXACT_HEAD = "exact answers"


def variants(rows: Sequence[Mapping[str, Any]]) -> tuple[Variant, ...]:
    """Return the evaluated variants; of one that a restarted run evaluated twice, the last."""
    found: dict[tuple[str, int], Variant] = {}
    for row in rows:
        if row.get("event") == "variant" and row.get("loss") is not None:
            key = (row["variant"], row["step"])
            found.pop(key, None)
            names = ("step", "loss", "perplexity", "exact_answers")
            figures = {name: row.get(name) for name in names}
            found[key] = Variant(name=row["variant"], **figures)
    return tuple(found.values())


def converted_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the held-out loss of the model that a finished run converted, if it did: evaluations
    compute as that model does, at every step.
    """
    best = best_step(rows)
    found = [row["loss"] for row in rows if row.get("how") and best in (None, row["step"])]
    return found[-1] if found else None


def reference(found: Sequence[Variant]) -> tuple[Variant, Variant] | None:
    """Return bf16 and PTQ of the same weights: the twin's, else those at which rounding began."""
    named = {v.name: v for v in found}
    for bf16, ptq in ((f"{BF16} {TWIN}", f"{PTQ} of the {TWIN}"), (BF16, PTQ)):
        if bf16 in named and ptq in named:
            return named[bf16], named[ptq]
    return None


def recovered(found: Sequence[Variant]) -> float | None:
    """Return the share of the rounding loss that QAT recovered: (PTQ - QAT) / (PTQ - bf16). None
    without QAT, if PTQ loses next to nothing, and if QAT ended below bf16 weights of an earlier
    step: it has trained since.
    """
    pair, loss = reference(found), next((v.loss for v in found if v.name == QAT), None)
    if pair is None or loss is None or None in (pair[0].loss, pair[1].loss):
        return None
    bf16, ptq = float(pair[0].loss or 0.0), float(pair[1].loss or 0.0)
    if ptq - bf16 <= NEGLIGIBLE * bf16 or (loss < bf16 and pair[0].name == BF16):
        return None
    return (ptq - loss) / (ptq - bf16)


def degradation(variant: Variant, found: Sequence[Variant]) -> float | None:
    """Return a variant's loss above the reference's in bf16, as a share; None if that is older."""
    pair = reference(found)
    if pair is None or not pair[0].loss or variant.loss is None or variant.name == pair[0].name:
        return None
    if pair[0].name == BF16 and variant.step != pair[0].step:
        return None
    return variant.loss / pair[0].loss - 1.0


def heads(report: RunReport) -> tuple[str, ...]:
    """Return the heads of the table; exact answers only where they were counted."""
    counted = any(v.exact_answers is not None for v in report.variants)
    return (*HEADS, EXACT_HEAD) if counted else HEADS


def table_rows(report: RunReport) -> list[tuple[str, ...]]:
    """Return a line per variant, in the order of heads()."""
    rows = []
    for v in report.variants:
        share = degradation(v, report.variants)
        against = "-" if share is None else f"{share:+.2%}".replace("-0.00%", "+0.00%")
        if share is not None and share >= TIMES:
            against = f"{share + 1:,.0f} times"
        figures = (text.loss(v.loss), text.compact(v.perplexity), against)
        exact = ("-" if v.exact_answers is None else f"{v.exact_answers:.1%}",)
        rows.append((v.name, f"{v.step:,}", *figures, *exact)[: len(heads(report))])
    return rows


def sentence(report: RunReport) -> str:
    """Return what QAT gained; empty if the run has none."""
    found = report.variants
    pair = reference(found)
    if QAT not in [v.name for v in found]:
        return ""
    if pair is None:
        return (
            "there is no PTQ to compare QAT with: there were no weights before rounding began, "
            "or another folder has the run that made them; compare: true trains a bf16 twin"
        )
    bf16, ptq = pair
    before, after = (math.nan if v.loss is None else v.loss for v in (bf16, ptq))
    gap = after - before
    lost = text.loss(gap)
    has_twin = bf16.name != BF16
    of = "its bf16 twin" if has_twin else f"the weights after {bf16.step:,} steps"
    if gap <= NEGLIGIBLE * before:
        share = f"{gap / before:+.4%}" if before else "both losses are 0"
        return f"PTQ of {of} loses next to nothing ({share}): nothing to recover"
    since = "" if has_twin else "; compare: true compares with a bf16 twin that is trained as long"
    if report.recovered is None:
        return (
            f"PTQ of {of} loses {lost}; QAT ended below their bf16 loss by what it has trained "
            f"since, which does not measure rounding{since}"
        )
    return f"QAT recovered {report.recovered:.0%} of the {lost} that PTQ of {of} loses{since}"


def evaluated_as(report: RunReport) -> str:
    """Return how held-out rows were evaluated, if not as the run was trained at first."""
    return Qat.evaluated_as if Qat.name in report.transforms else ""
