"""`raytrain-adv report RUN RUN ...`: runs laid over each other, on the console and as a page."""

from pathlib import Path

import click


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), default=Path("compared.html"),
              metavar="FILE", help="The page (default: compared.html).")  # fmt: skip
def report_command(runs: tuple[Path, ...], html: Path) -> None:
    """Compare runs: their curves, and the keys and results in which they differ.

    RUN is a run's output_dir; of one alone its report.html is written again, with what it has
    reached so far. The page opens from disk and loads nothing.
    """
    from raytrain_adv.report import compared, record
    from raytrain_adv.report.html import write_html
    from raytrain_adv.report.summary import summary

    if len(runs) == 1:
        found = record.read(runs[0])
        print(summary(found))
        print(f"\nwrote {write_html(found, runs[0])}")
        return
    read = compared.read_runs(runs)
    print(compared.render_text(read))
    record.write_text(compared.render(read), html)
    print(f"\nwrote {html}")
