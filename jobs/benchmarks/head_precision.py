"""What FP8 does to a head on real text: its logits and gradients in FP8, or its gradients alone.

    python jobs/benchmarks/head_precision.py MODEL_FOLDER ... --data ROWS.json [--out FILE]

Hidden states are those of the bf16 model; the loss is that of the next tokens of the rows' texts.
Errors are relative norms, against bf16's logits and gradients. On a CPU too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchao.float8 import Float8LinearConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_steps import head_of_results

from raytrain_adv.ops.float8.head_loss import Float8Head
from raytrain_adv.ops.float8.linear import Float8Linear
from raytrain_adv.ops.loss.linear_cross_entropy import LogitMap, linear_cross_entropy
from raytrain_adv.trial.compare import relative_error

TOKENS = 1024


def losses(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> dict[str, Any]:
    """Return loss and gradients of hidden states and weight in each form."""
    in_float8 = Float8Linear.from_float(head, Float8LinearConfig.from_recipe_name("tensorwise"))
    own = Float8Head.from_float(head)
    forms = {
        "bf16": lambda x: linear_cross_entropy(x, head.weight, None, labels, LogitMap()),
        "all in FP8": lambda x: F.cross_entropy(in_float8(x).float(), labels, reduction="sum"),
        "fp8_lm_head": lambda x: own.cross_entropy(x, labels, LogitMap()),
    }
    found = {}
    for name, form in forms.items():
        x = hidden.clone().requires_grad_()
        loss = form(x)
        found[name] = (loss.item() / len(labels), *torch.autograd.grad(loss, (x, head.weight)))
    return found


def main() -> None:
    """Measure each model; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", required=True, type=Path, help="JSON rows in Alpaca's form")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = "\n".join(
        f"{r['instruction']}\n{r['output']}" for r in json.loads(given.data.read_text())
    )
    names = " ".join(folder.name for folder in given.models)
    command = f"python jobs/benchmarks/head_precision.py {names} --data {given.data.name}"
    figures: dict[str, Any] = {}
    for folder in given.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        ids = AutoTokenizer.from_pretrained(folder)(text[: 16 * TOKENS], return_tensors="pt")
        ids = ids.input_ids[:, : TOKENS + 1]
        with torch.no_grad():
            hidden = model.model(ids[:, :-1])[0][0]
        found = losses(hidden, model.lm_head, ids[0, 1:])
        exact = found["bf16"]
        figures[folder.name] = {
            form: {
                "loss": loss,
                "loss_above_bf16": loss / exact[0] - 1,
                "hidden_gradient_off": relative_error(of_x, exact[1]),
                "weight_gradient_off": relative_error(of_weight, exact[2]),
            }
            for form, (loss, of_x, of_weight) in found.items()
        }
        print(folder.name, json.dumps(figures[folder.name], indent=1))
    if given.out:
        results = {**head_of_results(command), "tokens": TOKENS, "figures": figures}
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
