"""python -m raytrain_adv.launch job.yaml [--plan] [key=value ...]: run one job."""

import sys
from collections.abc import Sequence

from raytrain_adv import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line names; return the exit code. Errors are printed as text."""
    return cli.main(argv, cli.MODULE)


if __name__ == "__main__":
    sys.exit(main())
