"""Host memory in whole pages, locked for copies that a GPU makes by itself."""

import os
from typing import Any

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")


def locked_pages(nbytes: int) -> tuple[torch.Tensor, int]:
    """Return whole pages, as bytes, and the status of CUDA: 0 if they are locked. `pin_memory`
    would round up to a power of two.
    """
    pages = torch.empty(nbytes + 2 * PAGE, dtype=torch.uint8)
    start = -pages.data_ptr() % PAGE  # no page of it is another's, which may be locked too
    whole = pages[start : start + -(-nbytes // PAGE) * PAGE]
    whole.zero_()  # allocates the pages now, not while the GPU waits
    cuda: Any = torch.cuda
    return whole, int(cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0))


def unlock(pages: torch.Tensor) -> None:
    """Have pages be ordinary memory again."""
    cuda: Any = torch.cuda
    cuda.cudart().cudaHostUnregister(pages.data_ptr())
