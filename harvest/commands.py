"""The harvest's commands: options in, one call, lines out. They import what they need when they are called."""

import json
from pathlib import Path

import click

from common.config import load_config
from common.environment import prepare_environment
from common.errors import BadUsage
from harvest.config import HarvestConfig

overrides = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Lay a value over the file's.")
config_file = click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
set_folder = click.argument("set_path", metavar="SET", type=click.Path(path_type=Path))
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")


@click.command()
@config_file
@overrides
@click.option("--strict", is_flag=True, help="Refuse to add to a set whose shards were computed with other numerics.")
def run(config_path: Path, overrides: tuple[str, ...], strict: bool) -> None:
    """Harvest what CONFIG asks for. The same command again goes on where it stopped."""
    config = load_config(HarvestConfig, config_path, overrides=overrides)
    prepare_environment()
    from harvest.loop import harvest

    harvest(config, strict=strict)


@click.command()
@config_file
@overrides
def plan(config_path: Path, overrides: tuple[str, ...]) -> None:
    """What a run of CONFIG would do, from its prompts and the teacher's JSON files: no weight is read."""
    config = load_config(HarvestConfig, config_path, overrides=overrides)
    from harvest.plan_report import report

    for line in report(config):
        click.echo(line)


@click.command()
@set_folder
@as_json
def status(set_path: Path, as_json: bool) -> None:
    """What SET holds and who works on it, from the set alone."""
    from harvest.status import lines, survey

    facts = survey(set_path)
    click.echo(json.dumps(facts) if as_json else "\n".join(lines(facts)))


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
    from harvest.folder import resolve
    from harvest.parts import choose_dtype
    from harvest.prepare import prepare as prepared

    resolved = resolve(config.teacher.folder, config.teacher.variant)
    prepared(resolved, target, choose_dtype(config.teacher.dtype, config.teacher.device), Log("harvest"))
