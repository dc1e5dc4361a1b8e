"""The console script `raytrain-adv`: launch, submit, status, doctor, plan, preflight, export,
kernels, explain and schema.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from raytrain_adv import __version__
from raytrain_adv.config import compatibility, load
from raytrain_adv.config.arguments import parse
from raytrain_adv.config.explain import explain
from raytrain_adv.config.problems import Problem, job_error
from raytrain_adv.config.rules import check_workers
from raytrain_adv.config.schema import schema
from raytrain_adv.errors import EXIT_DONE, EXIT_NOT_MENDED, JobError, RaytrainAdvError, StorageError
from raytrain_adv.library_noise import quieten
from raytrain_adv.redaction import hide_environment
from raytrain_adv.worker.preconditions import check_files

USAGE = """usage: raytrain-adv COMMAND [...]

  launch job.yaml [--plan] [key=value ...]   run a job
  submit job.yaml [--address URL] [--runtime-env FILE] [key=value ...]
                                             run a job on a running cluster, and follow its log
  status [--address URL] [RUN]               the runs of a cluster, or one of them
  doctor RUN [--fix]                         what is wrong with a run's files; mend it
  plan job.yaml [--workers N] [--verbose] [--assume NAME=VALUE] [key=value ...]
                                             show what a job would do, the memory it takes, and what
                                             many workers move, store and run into
  preflight [job.yaml] [key=value ...]       check the cluster's nodes, for a job or for any
  kernels lock job.yaml [--output FILE] [--torch X.Y] [--cuda X.Y|cpu] [key=value ...]
                                             pin a job's kernels, for a cluster without internet
  kernels fetch | verify FILE                bring the files of a lock file; compare them with it
  export RUN [--checkpoint step_N] [--output DIR] [--merge] [key=value ...]
                                             write a checkpoint's model, and the quantized one
  export MODEL --output DIR enable_qat=true [key=value ...]
                                             quantize a model folder as it is (PTQ)
  explain [FEATURE]                          say what a feature does and goes together with; the
                                             compatibility matrix
  schema [--output FILE]                     print the JSON schema of the job file
  --version                                  print the version"""


EXPORT_USAGE = """usage: raytrain-adv export RUN [--checkpoint STEP] [--output DIR] [key=value ...]
       raytrain-adv export RUN [--checkpoint STEP] [--output DIR] --merge
       raytrain-adv export MODEL --output DIR enable_qat=true [key=value ...]

  RUN           output_dir of a run; its keys hold, and QAT keys given here go before them
  --checkpoint  step_N, or the path of a checkpoint; without it the newest
  --output      for a run: gets model, and with QAT model-quantized (default: in RUN);
                for a model folder: the quantized folder
  --merge       after LoRA: one model with the adapter merged into the base it was trained on, also
                into a quantized one, which is then written in bf16
  MODEL         a Hugging Face folder, quantized as it is, without training for it (PTQ)
  key=value     enable_qat=true qat_weight_dtype=int4 qat_activation_dtype=int8 qat_group_size=32
                qat_quantize_embedding=false qat_exclude=down_proj"""


SUBMIT_USAGE = """usage: raytrain-adv submit job.yaml [--address URL] [--runtime-env FILE]
                           [key=value ...]

  Sends this folder (without checkpoints, data and environments) and runs the job there; its log is
  followed to the end, and its exit code is this command's. Ctrl-C stops the job, with a checkpoint.

  --address      of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
                 http://127.0.0.1:8265)
  --runtime-env  what travels, and the environment there (default: jobs/runtime_env.yaml)
  key=value      as for launch; output_dir has to be an absolute path on storage of the cluster"""

STATUS_USAGE = """usage: raytrain-adv status [--address URL] [RUN]

  --address      of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
                 http://127.0.0.1:8265)
  RUN            a run's name, or its output_dir; without it all runs that the cluster knows"""


DOCTOR_USAGE = """usage: raytrain-adv doctor RUN [--fix]

  Says what is wrong with the files of a run that is not running, what each thing means for a rerun
  with resume_from_checkpoint: true, and which checkpoint that goes on from. Exit code 0: nothing is
  wrong (any more); 5: something is; 2: there is no such run, or it is alive.

  RUN     output_dir of a run; its checkpoints are looked at too, wherever they are
  --fix   mend what can be mended. Nothing is deleted: what is taken out lies in RUN/set-aside
          afterward. Without it nothing is changed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code. Errors are printed as text."""
    quieten()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except RaytrainAdvError as error:
        _print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, as in `raytrain-adv schema | head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return EXIT_DONE
    if command in ("--version", "version"):
        print(f"raytrain-adv {__version__}")
        return EXIT_DONE
    if command not in COMMANDS:
        if command.endswith((".yaml", ".yml")):
            fix = f"write raytrain-adv launch {command}"
        else:
            fix = f"write one of {', '.join(COMMANDS)} first"
        raise job_error("The command line", [Problem(f"{command!r} is not a command", fix)])
    return COMMANDS[command](rest)


def _launch(arguments: list[str]) -> int:
    parse(arguments, "raytrain-adv launch")
    from raytrain_adv import launch

    return launch.main(arguments)


def _submit(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(SUBMIT_USAGE)
        return EXIT_DONE
    flags, rest = _flags(arguments, ("--address", "--runtime-env"), "raytrain-adv submit --help")
    parsed = parse(rest, "raytrain-adv submit")
    if parsed.plan_only:
        wrong = Problem("a plan is made here", "write raytrain-adv plan job.yaml")
        raise job_error("The command line", [wrong])
    from raytrain_adv.driver.commands.submit import submit

    address, env = flags.get("--address"), flags.get("--runtime-env")
    return submit(parsed.path, parsed.overrides, address, env)


def _status(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(STATUS_USAGE)
        return EXIT_DONE
    flags, rest = _flags(arguments, ("--address",), "raytrain-adv status --help")
    if len(rest) > 1 or any(argument.startswith("-") for argument in rest):
        wrong = Problem(f"status takes no {' '.join(rest)!r}", "write raytrain-adv status --help")
        raise job_error("The command line", [wrong])
    from raytrain_adv.driver.commands.status import show

    show(flags.get("--address"), rest[0] if rest else None)
    return EXIT_DONE


def _doctor(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(DOCTOR_USAGE)
        return EXIT_DONE
    rest = [argument for argument in arguments if argument != "--fix"]
    if len(rest) != 1 or rest[0].startswith("-"):
        wrong = f"doctor takes no {' '.join(rest)!r}" if rest else "no run is named"
        problem = Problem(wrong, "write raytrain-adv doctor RUN [--fix], RUN being its output_dir")
        raise job_error("The command line", [problem])
    from raytrain_adv.driver.commands.doctor import show

    return EXIT_DONE if show(Path(rest[0]), fix="--fix" in arguments) else EXIT_NOT_MENDED


def _plan(arguments: list[str]) -> int:
    parsed = parse(arguments, "raytrain-adv plan", plans=True)
    job = load(parsed.path, parsed.overrides)
    check_workers(job, parsed.workers)
    from raytrain_adv.driver.plan.plan import show

    show(job, parsed.workers, parsed.verbose, parsed.assumed)
    return EXIT_DONE


def _preflight(arguments: list[str]) -> int:
    job = None
    if arguments:
        parsed = parse(arguments, "raytrain-adv preflight")
        job = load(parsed.path, parsed.overrides)
        check_files(job)
    from raytrain_adv.driver.commands.preflight import show

    show(job)
    return EXIT_DONE


def _kernels(arguments: list[str]) -> int:
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        print(f"usage: {KERNELS_USAGE}")
        return EXIT_DONE
    if action == "lock":
        flags, rest = _flags(rest, ("--output", "--torch", "--cuda"), KERNELS_USAGE)
        parsed = parse(rest, "raytrain-adv kernels lock")
        job = load(parsed.path, parsed.overrides)
        from raytrain_adv.driver.commands import kernels

        file = Path(flags.get("--output", "kernels.lock.json"))
        kernels.lock(job, file, flags.get("--torch"), flags.get("--cuda"))
        return EXIT_DONE
    if action not in ("fetch", "verify") or len(rest) != 1:
        wrong = Problem(f"kernels takes no {' '.join(arguments)!r}", f"write {KERNELS_USAGE}")
        raise job_error("The command line", [wrong])
    from raytrain_adv.driver.commands import kernels

    (kernels.fetch if action == "fetch" else kernels.verify)(Path(rest[0]))
    return EXIT_DONE


def _flags(
    arguments: list[str], names: tuple[str, ...], usage: str
) -> tuple[dict[str, str], list[str]]:
    """Return the flags with a value that are among the arguments, and the others."""
    flags: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name not in names:
            rest.append(f"{name}{equals}{value}")
            continue
        if not equals and waiting:
            value = waiting.pop(0)
        if not value:
            problem = Problem(f"{name} has no value", f"write {usage}")
            raise job_error("The command line", [problem])
        flags[name] = value
    return flags, rest


def _export(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(EXPORT_USAGE)
        return EXIT_DONE
    options = {"--checkpoint": "", "--output": ""}
    merge = "--merge" in arguments
    sources: list[str] = []
    overrides: list[str] = []
    problems: list[Problem] = []
    rest = [argument for argument in arguments if argument != "--merge"]
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name in options:
            options[name] = value if equals else rest.pop(0) if rest else ""
            if not options[name]:
                problems.append(Problem(f"{name} has no value", f"write {name} VALUE"))
        elif argument.startswith("-"):
            known = ", ".join([*options, "--merge"])
            problems.append(Problem(f"there is no option {name}", f"there are {known}"))
        elif equals and not Path(argument).is_dir():
            overrides.append(argument)
        else:
            sources.append(argument)
    if len(sources) != 1:
        found = (
            f"{len(sources)} folders are named: {', '.join(sources)}" if sources else "no folder"
        )
        problems.append(Problem(found, "name one: a run's output_dir or a model folder"))
    if problems:
        raise job_error("The command line", problems)
    from raytrain_adv.driver.commands.export import run

    run(sources[0], options["--checkpoint"], options["--output"], overrides, merge)
    return EXIT_DONE


def _explain(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(f"usage: {EXPLAIN_USAGE}")
        return EXIT_DONE
    flags = [argument for argument in arguments if argument.startswith("-")]
    if not flags:
        print(explain(" ".join(arguments)) if arguments else compatibility.table())
        return EXIT_DONE
    if flags[0] not in ("--check", "--write") or len(arguments) != 2:
        wrong = Problem(f"explain takes no {' '.join(arguments)!r}", f"write {EXPLAIN_USAGE}")
        raise job_error("The command line", [wrong])
    (page,) = (Path(argument) for argument in arguments if argument not in flags)
    try:
        old = page.read_text()
        new = compatibility.update_table(old)
        if flags[0] == "--write":
            page.write_text(new)
            return EXIT_DONE
    except (OSError, ValueError) as error:
        raise StorageError("The page cannot be read or written", str(error), "name one") from None
    if new != old:
        raise JobError(
            f"The compatibility matrix in {page} is stale",
            "the features' own rules say something else",
            f"raytrain-adv explain --write {page}",
        )
    return EXIT_DONE


def _schema(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print("usage: raytrain-adv schema [--output FILE]")
        return EXIT_DONE
    text = json.dumps(schema(), indent=2) + "\n"
    if not arguments:
        print(text, end="")
        return EXIT_DONE
    flag, equals, path = arguments[0].partition("=")
    values = [path, *arguments[1:]] if equals else arguments[1:]
    if flag not in ("--output", "-o") or len(values) != 1 or not values[0]:
        wrong = " ".join(arguments)
        raise job_error(
            "The command line",
            [Problem(f"schema takes no {wrong!r}", "write schema --output FILE")],
        )
    try:
        Path(values[0]).write_text(text)
    except (OSError, ValueError) as error:
        raise StorageError(
            "The schema cannot be written", str(error), "name a file in a folder you can write"
        ) from None
    return EXIT_DONE


EXPLAIN_USAGE = (
    "raytrain-adv explain [FEATURE], or raytrain-adv explain --check | --write PAGE: whether the "
    "matrix in a page of Markdown is up to date; bring it up to date"
)

KERNELS_USAGE = (
    "raytrain-adv kernels lock job.yaml [--output FILE] [--torch X.Y] [--cuda X.Y|cpu], or "
    "raytrain-adv kernels fetch | verify FILE"
)

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "launch": _launch,
    "submit": _submit,
    "status": _status,
    "doctor": _doctor,
    "plan": _plan,
    "preflight": _preflight,
    "kernels": _kernels,
    "export": _export,
    "explain": _explain,
    "schema": _schema,
}


def _print_error(text: str) -> None:
    """Print to stderr whatever its encoding is able to show."""
    encoding = sys.stderr.encoding or "utf-8"
    shown = hide_environment(text).encode(encoding, "backslashreplace").decode(encoding)
    print(f"\n{shown}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
