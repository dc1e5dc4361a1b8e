"""The auxiliary loss of a mixture's routers, which models add to their own loss if their config has
`output_router_logits`.
"""

import inspect
import sys
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from raytrain_adv.errors import TrainingError
from raytrain_adv.ops.loss import IGNORE

TOKENS = "tokens_not_padding"
"""Input that the routers' loss takes: 1 at each token, 0 at padding, int64 [sequences, time]."""
BALANCE = "load_balancing_loss_func"
"""What every mixture of transformers calls its loss, with the mask of attention as an argument."""
WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What models and configs call the loss's weight."""


def router_loss(model: Any, output: Any, labels: Tensor) -> Tensor | float:
    """Return the routers' auxiliary loss for each label token if the config asks for it, as the
    model's own loss has it; none in evaluation, which measures how well tokens are predicted.
    Raises TrainingError if the model does not tell its weight.
    """
    found: Tensor | None = getattr(output, "aux_loss", None)
    if found is None or not model.training:
        return 0.0
    config = model.config.get_text_config()
    held = (getattr(owner, name, None) for owner in (model, config) for name in WEIGHTS)
    weight = next((one for one in held if one is not None), None)
    if weight is None:
        raise TrainingError(
            f"{type(model).__name__} does not tell the weight of its routers' loss",
            f"output_router_logits: true, and none of {', '.join(WEIGHTS)} in the model",
            "set output_router_logits to false in its config.json",
        )
    return float(weight) * found.float() * (labels != IGNORE).sum()


def leave_padding_out(model: Any) -> bool:
    """Have a model's routers' loss leave out the padding that TOKENS tell of, which the model then
    takes; return whether it has such a loss. Models count padding unless they are given a mask,
    which attention does not need here.
    """
    configs = (model.config, model.config.get_text_config())
    if not any(getattr(config, "output_router_logits", False) for config in configs):
        return False
    kinds = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    home = next((module for module in kinds if hasattr(module, BALANCE)), None)
    _Counted(model, home)
    return True


class _Counted:
    """Counts the tokens of each forward pass of a model."""

    def __init__(self, model: nn.Module, home: ModuleType | None) -> None:
        self.home: Any = home
        self.plain = getattr(home, BALANCE, None)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, model: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        rest = {name: value for name, value in given.items() if name != TOKENS}
        if self.plain is not None and TOKENS in given:
            setattr(self.home, BALANCE, self._counting(given[TOKENS]))
        return args, rest

    def _counting(self, tokens: Tensor) -> Any:
        plain: Any = self.plain
        signature = inspect.signature(plain)

        def counted(*args: Any, **named: Any) -> Any:
            bound = signature.bind(*args, **named)
            bound.arguments["attention_mask"] = tokens
            return plain(*bound.args, **bound.kwargs)

        return counted

    def _end(self, *_: Any) -> None:
        if self.plain is not None:
            setattr(self.home, BALANCE, self.plain)
