"""Which parameters are not trained: LLaMA-Factory's finetuning_type: freeze, and those that no
gradient reaches.
"""

import re

from transformers import PreTrainedModel

from raytrain_adv.config.training import TrainConfig
from raytrain_adv.errors import JobError
from raytrain_adv.transforms.modules import did_you_mean, patterns

UNREACHED = re.compile(r"\.(indexer|pooler|encoder_attn|encoder_attn_layer_norm|vision_moe)\.")
"""Choices of sparse attention, which have no gradient; what encoders have for sentences; attention
to an encoder that is not there; experts of images. (tests/unit/model/test_freeze.py tries all
families.)"""
_LAYER = re.compile(r"\.(\d+)\.([^.]+)")


def freeze(model: PreTrainedModel, train: TrainConfig) -> None:
    """Freeze the parameters outside of the layers and modules that the job names, in place. Raises
    JobError if there are no such layers or modules.
    """
    count = train.freeze_trainable_layers
    if count is None:
        return
    chosen = _layers(model.config.get_text_config().num_hidden_layers, count, train.use_llama_pro)
    parameters = dict(model.named_parameters())
    places = {name: _LAYER.search(name) for name in parameters}
    inner = sorted({place[2] for place in places.values() if place})
    outer = sorted({name.split(".")[-2] for name, place in places.items() if not place})
    modules = patterns(train.freeze_trainable_modules)
    extra = patterns(train.freeze_extra_modules or [])
    for key, named, known in (
        ("freeze_trainable_modules", [m for m in modules if m != "all"], inner),
        ("freeze_extra_modules", extra, outer),
    ):
        for name in (name for name in named if name not in known):
            found = f"{key}: {name}; the model has {', '.join(known)}"
            fix = f"did you mean {did_you_mean(name, known)}?"
            raise JobError(f"{name} is not a module to train", found, fix)
    for name, parameter in parameters.items():
        place = places[name]
        trained = (
            int(place[1]) in chosen and ("all" in modules or place[2] in modules)
            if place
            else name.split(".")[-2] in extra
        )
        parameter.requires_grad_(trained)


def _layers(total: int, count: int, spread: bool) -> set[int]:
    """Return the layers to train: the last `count`, the first of a negative one, or with `spread`
    the last of each of `count` groups, as LLaMA Pro's.
    """
    if spread and (count < 1 or total % count):
        raise JobError(
            "use_llama_pro divides the layers into groups of one size",
            f"{total} layers, freeze_trainable_layers: {count}",
            f"give a divisor of {total}: the number of layers that were added",
        )
    if spread:
        return set(range(total // count - 1, total, total // count))
    return set(range(max(0, total - count), total) if count > 0 else range(min(-count, total)))


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze the parameters that no gradient reaches when a decoder is trained on text. Others
    without a gradient are named by an error after the first backward pass.
    """
    for name, parameter in model.named_parameters():
        if UNREACHED.search(name):
            parameter.requires_grad_(False)
