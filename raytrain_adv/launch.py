"""python -m raytrain_adv.launch job.yaml [--plan] [key=value ...]: run one job; and how the program
`raytrain-adv` starts.
"""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from raytrain_adv import errors
from raytrain_adv.imports import interrupt_later


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line names; return the exit code. Errors are printed as text."""
    cli = _commands()
    return int(cli.main(argv, cli.MODULE))


def program() -> int:
    """Run the command that this process's command line names, and return its exit code."""
    return int(_commands().main())


def _commands() -> ModuleType:
    """Import the commands, which takes half a second; Ctrl-C meanwhile ends the program after that:
    libraries would make an error of it.
    """
    try:
        with interrupt_later():
            cli = importlib.import_module("raytrain_adv.cli")
    except KeyboardInterrupt:
        sys.stderr.write(errors.STOPPED)
        sys.exit(errors.EXIT_STOPPED)
    return cli


if __name__ == "__main__":
    sys.exit(main())
