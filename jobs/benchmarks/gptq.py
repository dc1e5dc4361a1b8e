"""GPTQ of llm-compressor on a model in memory, in the forms of qat_target, for qat_quality.py."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def load_model(folder: Path) -> Any:
    """Return a bf16 model in host memory."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return loaded.eval()


def calibrated(folder: Path, job: Any, prepared: Any, count: int) -> Any:
    """Return a bf16 model of the weights that GPTQ rounds on `count` training rows."""
    from raytrain_adv.transforms.applied import Transforms

    rounded, model = load_model(folder), load_model(folder)
    calibrate(rounded, job, prepared, count)
    own = dict(rounded.named_parameters())
    with torch.no_grad():  # the calibrated model itself rounds again whenever it is called
        for name, parameter in model.named_parameters():
            parameter.copy_(own[name])
    round_inputs_alone(model, Transforms(job))
    return model


def calibrate(model: Any, job: Any, prepared: Any, count: int) -> None:
    """Round the weights in place by llm-compressor's GPTQ, on `count` training rows."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.pipelines.sequential import pipeline

    from raytrain_adv.transforms.qat import Qat

    qat = job.transform(Qat)
    is_int8 = qat.qat_weight_dtype == "int8"
    grouped = {"strategy": "group", "group_size": qat.group_size}
    how = grouped if qat.group_size and not is_int8 else {"strategy": "channel"}
    weights = {"num_bits": 8 if is_int8 else 4, "type": "int", "symmetric": True, **how}
    scheme = {"targets": ["Linear"], "weights": weights}
    order = random.Random(job.train.seed).sample(range(len(prepared.train)), count)
    chosen = [prepared.train[i].input_ids for i in order]
    rows = [{"input_ids": torch.from_numpy(ids.astype("int64"))[None]} for ids in chosen]
    recipe = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=None)
    # Its rounding takes a step in Python for every column: a GPU would wait for the CPU.
    with mock.patch.object(pipeline, "get_main_device", return_value=model.device):
        oneshot(model, recipe=recipe, dataset=loader, num_calibration_samples=len(rows))


class RoundedInputs(torch.nn.Linear):
    """A linear of weights that are rounded already, with inputs that the target rounds."""

    form: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ weight.t() + bias."""
        from raytrain_adv.ops.fake_quant.layers import rounded_activation

        return torch.nn.functional.linear(
            rounded_activation(input, self.form)[0], self.weight, self.bias
        )


def round_inputs_alone(model: Any, transforms: Any) -> None:
    """Make each linear that the target quantizes round its input, if it does."""
    from raytrain_adv.transforms.qat import Qat

    transform = next(t for t in transforms if isinstance(t, Qat))
    for fqn, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and fqn != "lm_head" and transform.activation_form:
            module.__class__, module.form = RoundedInputs, transform.activation_form
