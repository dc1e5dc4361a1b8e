"""What autograd keeps of a model's layers."""

from typing import Any

from torch import Tensor, nn


class Saved:
    """A hook for saved tensors: notes those saved while `inside` has something, but the model's."""

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.kept: dict[int, Tensor] = {}
        self.inside: list[Any] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Note a tensor, and keep it as it is."""
        address = tensor.untyped_storage().data_ptr()
        if self.inside and address not in self.own:
            self.kept[address] = tensor
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors' storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())
