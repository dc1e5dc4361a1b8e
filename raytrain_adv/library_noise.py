"""Messages of libraries that say nothing about the job, and would stand before everything that
does.
"""

from __future__ import annotations

import logging

# Logger -> how the message begins. Everything else these loggers say is shown.
NOISE = {
    # torchao 0.18 tries the compiled kernels of each CUDA version and Python; those it does not
    # find are for other machines. Remove when torchao says it at level debug.
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
    """Drop NOISE in this process; to be called before torch is imported. Again is nothing."""
    for name, beginning in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(beginning))
