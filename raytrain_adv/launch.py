"""python -m raytrain_adv.launch job.yaml [--plan] [key=value ...]: `raytrain-adv launch`.

Exit codes: 0 done, 2 the job file (or what it names), 3 training failed, 4 the cluster refused.
"""

import sys

from raytrain_adv import cli


def main(argv: list[str] | None = None) -> int:
    """Run the job named on the command line; return the exit code. Errors are printed as text."""
    return cli.main(["launch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
