"""Results of autograd functions that models may change in place."""

import torch
from torch import Tensor


def unalias(product: Tensor) -> Tensor:
    """Return a tensor that is not a view, of the same memory.

    With a bias PyTorch's linear of [..., in] returns a view of its product. Out of an autograd
    function autograd refuses to have such a view changed in place, as RoCBert does.
    """
    whole: Tensor = torch.ops.aten._unsafe_view.default(product, product.shape)
    return whole
