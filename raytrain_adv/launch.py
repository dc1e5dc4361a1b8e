"""python -m raytrain_adv.launch job.yaml [--plan] [key=value ...]: one job, from its file to its
report.

Exit codes: 0 done, 2 the job file (or what it names), 3 training failed, 4 the cluster refused.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from raytrain_adv.config import JobConfig, load
from raytrain_adv.config.arguments import parse
from raytrain_adv.config.rules import check_workers
from raytrain_adv.errors import EXIT_DONE, RaytrainAdvError
from raytrain_adv.library_noise import quieten
from raytrain_adv.redaction import hide_environment
from raytrain_adv.worker.preconditions import check_files


def main(argv: list[str] | None = None) -> int:
    """Run the job named on the command line; return the exit code. Errors are printed as text."""
    quieten()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        job = load(arguments.path, arguments.overrides)
        if arguments.plan_only:
            check_workers(job, arguments.workers)
            from raytrain_adv.driver.plan.plan import show

            show(job, arguments.workers, arguments.verbose, arguments.assumed)
            return EXIT_DONE
        _run(job)
    except RaytrainAdvError as error:
        print(f"\n{hide_environment(str(error))}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("raytrain_adv"):
            raise
        print(
            f"\n{error.name} is not installed for {sys.executable}\n"
            "  fix:   activate the environment (. .venv/bin/activate), or pip install -e .",
            file=sys.stderr,
        )
        return RaytrainAdvError.exit_code
    except BrokenPipeError:
        # The reader of --plan, as in `... --plan | head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(
            "\nStopped. resume_from_checkpoint: true goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 130
    return EXIT_DONE


def _has_ended(job: JobConfig) -> bool:
    """Whether the job is done: asked for again it shows its report, with or without its files."""
    if job.output.resume_from_checkpoint is not True:
        return False
    from raytrain_adv.driver.output import output_dir

    return output_dir.has_ended(Path(job.output.output_dir))


def _run(job: JobConfig) -> None:
    if not _has_ended(job):
        check_files(job)
    if job.sweep is not None:
        from raytrain_adv.driver.sweep import sweep

        sweep.run(job)
    else:
        from raytrain_adv.driver.training import trainer

        trainer.run(job)


if __name__ == "__main__":
    sys.exit(main())
