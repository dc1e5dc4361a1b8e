"""Hide library messages that have nothing to do with the job."""

from __future__ import annotations

import logging

# Logger -> the beginning of the message. These loggers' other messages are shown.
NOISE = {
    # torchao 0.18 tries its compiled kernels for each CUDA version and Python, and warns about
    # those for other machines. Remove when torchao logs this at level debug.
    "torchao": "Failed to load ",
    # torchao 0.18 registers two enums as pytree constants, which torch 2.13 does by itself.
    "torch.utils._pytree": "<enum '",
}


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


def quieten() -> None:
    """Drop NOISE in this process. Call it before torch is imported. Idempotent."""
    for name, beginning in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(beginning))
