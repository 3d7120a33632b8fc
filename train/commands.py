"""The training side's commands: options in, one call, lines out. They import what they need when they are called."""

from pathlib import Path
from typing import Literal

import click

from common.config import load_config
from common.environment import prepare_environment
from train.config import TrainConfig

path = click.Path(path_type=Path)


@click.command()
@click.argument("config_path", metavar="CONFIG", type=path)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Lay a value over the file's.")
def run(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Train what CONFIG asks for. The same command again goes on where it stopped."""
    config = load_config(TrainConfig, config_path, overrides=overrides)
    prepare_environment()
    from train.dist import joined
    from train.loop import train

    with joined(config.device, timeout_s=config.deadline_s) as world:
        train(config, world)


@click.command()
@click.option("--teacher", required=True, type=path, help="The teacher's diffusers folder.")
@click.option("--student", "student_path", required=True, type=path, help="A JSON of configs/students/.")
@click.option("--out", required=True, type=path, help="Where the first weights go.")
@click.option("--experts", type=click.Choice(["low", "high", "mean"]), default="low", show_default=True,
              help="Which of two experts the student starts from.")  # fmt: skip
def init(teacher: Path, student_path: Path, out: Path, experts: Literal["low", "high", "mean"]) -> None:
    """A student's first weights, cut from a teacher's folder; reads only the tensors it needs."""
    from train.projection import project
    from train.student_config import read_student_json

    report = project(teacher, read_student_json(student_path), out, experts=experts)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items()))
    click.echo(f"{out}: {counts} tensors; blocks {report.blocks} of the teacher, experts: {report.experts}")


@click.command()
@click.argument("run_dir", metavar="RUN", type=path)
@click.option("--out", required=True, type=path, help="The PNG.")
@click.option("--num", default=16, show_default=True, help="Pictures.")
@click.option("--steps", default=20, show_default=True, help="Of the solver.")
def sample(run_dir: Path, out: Path, num: int, steps: int) -> None:
    """Pictures by RUN's student above the teacher's own, from the same noise."""
    from train.sample import sample as draw_sheet

    sheet = draw_sheet(run_dir, num=num, steps=steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    click.echo(f"{out}: {num} pairs, the student's above its teacher's")


@click.command()
@click.argument("run_dir", metavar="RUN", type=path)
def status(run_dir: Path) -> None:
    """Where RUN stands, from its folder alone."""
    from train.run_folder import status_lines

    for line in status_lines(run_dir):
        click.echo(line)
