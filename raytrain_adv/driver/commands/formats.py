"""`raytrain-adv export`: its arguments, and several formats from one source."""

from pathlib import Path

import click

from raytrain_adv.config.problems import command_error
from raytrain_adv.ops.fake_quant.targets import TARGETS
from raytrain_adv.text import split_names


@click.command("export")
@click.argument("source", nargs=-1, required=True, metavar="RUN|MODEL [key=value]...")
@click.option("--checkpoint", default="", metavar="step_N", help="Of a run, instead of its best "
              "(load_best_model_at_end) or newest checkpoint; a name or a path.")  # fmt: skip
@click.option("--output", default="", metavar="DIR", help="For a run: gets model and, with QAT, "
              "the converted model (default: RUN). For a model: the converted folder.")  # fmt: skip
@click.option("--merge", is_flag=True, help="After LoRA: one model, the adapter merged into its "
              "base; a base of 4 or 8 bits is then written in bf16.")  # fmt: skip
@click.option("--format", "formats", default="", metavar="NAME,NAME", help="Values of qat_target: "
              "each becomes a folder DIR/NAME of its own.")  # fmt: skip
def export_command(
    source: tuple[str, ...], checkpoint: str, output: str, merge: bool, formats: str
) -> None:
    """Export a run's model, or convert any model as after QAT.

    RUN is a run's output_dir; QAT keys given here replace those of its job. MODEL is a Hugging Face
    folder; it needs --output DIR and enable_qat=true or --format. `raytrain-adv explain QAT` lists
    the keys.
    """
    overrides = [one for one in source if "=" in one and not Path(one).is_dir()]
    folders = [one for one in source if one not in overrides]
    if len(folders) != 1:
        named = f"{len(folders)} folders are named: {', '.join(folders)}"
        fix = "name one: a run's output_dir or a model folder"
        raise command_error(named if folders else "no folder", fix)
    names = split_names(formats)
    _check(names, output, merge)
    from raytrain_adv.driver.commands.export import refuse_unwritable, run

    keys = {name: ["enable_qat=true", f"qat_target={name}", *overrides] for name in names}
    for name in names[1:]:  # before the first is written
        refuse_unwritable(folders[0], str(Path(output) / name), keys[name])
    for name in names:
        run(folders[0], checkpoint, str(Path(output) / name), keys[name])
    if not names:
        run(folders[0], checkpoint, output, overrides, merge)


def _check(names: list[str], output: str, merge: bool) -> None:
    """Refuse formats that do not exist, or that have no place, before the first is written."""
    if unknown := [name for name in names if name not in TARGETS]:
        raise command_error(
            f"there is no format {unknown[0]}", f"choose among {', '.join(TARGETS)}"
        )
    if names and not output:
        raise command_error("--format writes one folder for each name", "name where: --output DIR")
    if names and merge:
        raise command_error(
            "--format converts a model, and a merged one is as it was trained",
            "keep one of --merge and --format",
        )
    if there := [name for name in names if (Path(output) / name).exists()]:
        raise command_error(
            f"{Path(output) / there[0]} exists already", "name another --output DIR"
        )
