"""python -m raytrain_adv.launch job.yaml [--plan] [key=value ...]: run one job; and how the program
`raytrain-adv` starts.
"""

import sys
from collections.abc import Sequence
from types import ModuleType


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line names; return the exit code. Errors are printed as text."""
    cli = _commands()
    return int(cli.main(argv, cli.MODULE))


def program() -> int:
    """Run the command that this process's command line names, and return its exit code."""
    return int(_commands().main())


def _commands() -> ModuleType:
    """Import the commands, which takes half a second; Ctrl-C then ends the program as later."""
    try:
        from raytrain_adv import cli
    except KeyboardInterrupt:
        from raytrain_adv.errors import EXIT_STOPPED, STOPPED

        sys.stderr.write(STOPPED)
        sys.exit(EXIT_STOPPED)
    return cli


if __name__ == "__main__":
    sys.exit(main())
