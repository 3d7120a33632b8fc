"""The harvest's commands: options in, one call, lines out. They import what they need when they are called."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import click

from common.cli import Duration
from common.config import load_config
from common.environment import prepare_environment
from common.errors import BadUsage
from harvest.config import HarvestConfig
from harvest.old_options import as_overrides, wan_distiller


class Bytes(click.ParamType):
    """3T, 500G, 20GB or 1000000."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", str(value).upper())
        if parts is None:
            self.fail(f"{value!r} is no number of bytes; say for example 3T or 500G", param, ctx)
        return int(float(parts[1]) * 1000 ** " KMGT".index(parts[2] or " "))


overrides = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Lay a value over the file's.")
config_file = click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
set_folder = click.argument("set_path", metavar="SET", type=click.Path(path_type=Path))
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")


@click.command()
@config_file
@overrides
@click.option("--strict", is_flag=True, help="Refuse to add to a set whose shards were computed with other numerics.")
@click.option("--slice", "share", metavar="I/N", help="This process's share; a launcher's environment says it too.")
@click.option("--time-limit", type=Duration(), metavar="30m", help="Stop after so long, as by a signal: exit code 75.")
@click.option("--check", is_flag=True, help="One micro-batch through every stage, in a scratch set; then exit.")
@click.option("--student", "student_path", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="JSON",
              help="When all is done: a student's first weights, into the set's assets.")  # fmt: skip
@click.option("--child-of", type=int, hidden=True)
@click.option("--planned", hidden=True)
@wan_distiller
def run(config_path: Path, overrides: tuple[str, ...], strict: bool, share: str | None, time_limit: float | None,
        check: bool, student_path: Path | None, child_of: int | None, planned: str | None,
        **old: Any) -> None:  # fmt: skip
    """Harvest what CONFIG asks for. The same command again goes on where it stopped."""
    from harvest.running.crew import num_workers
    from harvest.running.slices import is_launched, see_own_gpu, slice_of
    from harvest.running.workers import die_with, supervise

    if child_of is not None:
        die_with(child_of)
    config = load_config(HarvestConfig, config_path, overrides=(*overrides, *as_overrides(old)))
    prepare_environment()
    part = slice_of(os.environ, share)
    if share is None:
        see_own_gpu(os.environ)
    if check:
        if student_path is not None:
            raise BadUsage(wrong="--student", found="--check, which leaves nothing", mend="give one of the two")
        from harvest.running.check import check as checked

        checked(config)
        return
    count = 1 if share is not None or is_launched(os.environ) else num_workers(config)
    if count == 1:
        from harvest.running.loop import harvest

        harvest(config, strict=strict, part=part, limit_s=time_limit, planned=planned)
    else:
        supervise(config, part, count, strict=strict, limit_s=time_limit)
    if student_path is not None and part.rank == 0:
        from harvest.first_student import leave_student

        leave_student(config, student_path)


@click.command()
@config_file
@overrides
@click.option("--probe", is_flag=True, help="Load the teacher, ask it a few times, and say hours and GPU-hours.")
@click.option("--seconds-per-forward", type=click.FloatRange(min=0, min_open=True), help="Of a micro-batch: no probe.")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="That there are: what fits is proposed.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="That work beside each other.")
@click.option("--disk", type=Bytes(), metavar="3T", help="That the set may take; else what is free.")
def plan(config_path: Path, overrides: tuple[str, ...], probe: bool, seconds_per_forward: float | None,
         hours: float | None, gpus: int, disk: int | None) -> None:  # fmt: skip
    """What a run of CONFIG would do, from its prompts and the teacher's JSON files. Only --probe reads its weights."""
    if hours is not None and not probe and seconds_per_forward is None:
        raise BadUsage(wrong="--hours", found="nothing says how fast the teacher is",
                       mend="add --probe, or --seconds-per-forward")  # fmt: skip
    config = load_config(HarvestConfig, config_path, overrides=overrides)
    prepare_environment()
    from harvest.plan_report import Means, report

    means = Means(hours=hours, gpus=gpus, disk=disk, seconds_per_forward=seconds_per_forward, probe=probe)
    for line in report(config, means):
        click.echo(line)


@click.command()
@config_file
@overrides
def doctor(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Whether this machine, its disk and the teacher's folder are fit for CONFIG; no weight is read."""
    config = load_config(HarvestConfig, config_path, overrides=overrides)
    prepare_environment()
    from harvest.doctor import examine

    for line in examine(config):
        click.echo(line)


@click.command()
@set_folder
@as_json
@click.option(
    "--watch", "every_s", type=float, is_flag=False, flag_value=2.0, metavar="SECONDS", help="Again and again."
)
def status(set_path: Path, as_json: bool, every_s: float | None) -> None:
    """What SET holds and who works on it, from the set alone."""
    from harvest.status import lines, survey

    while True:
        facts = survey(set_path)
        if every_s and not as_json:
            click.clear()
        click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))
        if not every_s:
            return
        time.sleep(every_s)


@click.command()
@set_folder
@config_file
@overrides
def repair(set_path: Path, config_path: Path, overrides: tuple[str, ...]) -> None:
    """Ask the teacher of CONFIG again for the items of SET that hold damaged or quarantined records."""
    config = load_config(HarvestConfig, config_path, overrides=overrides)
    prepare_environment()
    from harvest.granary.repair import repair as mended

    for line in mended(config, set_path):
        click.echo(line)


@click.command("add-samples")
@set_folder
@config_file
@overrides
@click.option("--prompt", "prompts", multiple=True, required=True, help="What is drawn; may be given again.")
def add_samples(set_path: Path, config_path: Path, overrides: tuple[str, ...], prompts: tuple[str, ...]) -> None:
    """Encode and draw prompts by the teacher of CONFIG, for training to look at: into the assets of SET."""
    config = load_config(HarvestConfig, config_path, overrides=overrides)
    prepare_environment()
    from harvest.granary.add_samples import add_samples as added

    for line in added(config, set_path, prompts):
        click.echo(line)


@click.command()
@set_folder
@click.argument("key")
@click.option("--out", type=click.Path(path_type=Path), help="Where the picture goes: a .png.")
def inspect(set_path: Path, key: str, out: Path | None) -> None:
    """The record KEY of SET (the start of it will do): numbers per point and, with --out, its picture."""
    from common.shards import ShardSet
    from harvest.granary.look import describe, find, picture

    shards = ShardSet.open(set_path)
    record, receipt = find(shards, key)
    for line in describe(record, receipt, shards.contract):
        click.echo(line)
    if out is not None:
        prepare_environment()
        picture(shards, record).save(out, format="PNG")
        click.echo(f"picture  {out}")


@click.command()
@config_file
@overrides
@click.option("--out", type=click.Path(path_type=Path), help="Instead of the configuration's teacher.prepared.")
def prepare(config_path: Path, overrides: tuple[str, ...], out: Path | None) -> None:
    """Convert the teacher's weights once, so that it loads as fast as the disk reads."""
    config = load_config(HarvestConfig, config_path, overrides=overrides)
    target = out or config.teacher.prepared
    if target is None:
        raise BadUsage(wrong="--out", found="no teacher.prepared in the configuration", mend="say where to put it")
    prepare_environment()
    from common.log import Log
    from harvest.loading.folder import resolve
    from harvest.loading.parts import choose_dtype
    from harvest.loading.prepare import prepare as prepared

    resolved = resolve(config.teacher.folder, config.teacher.variant, config.teacher.rest)
    prepared(resolved, target, choose_dtype(config.teacher.dtype, config.teacher.device), Log("harvest"))
