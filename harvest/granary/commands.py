"""The commands on whole sets: options in, one call, lines out."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import click

from common.environment import prepare_environment
from common.errors import BadUsage, Corrupt
from common.log import human_bytes
from common.shard_reader import CONTAINERS
from common.shards import ShardSet
from harvest.granary.told import Told

path = click.Path(path_type=Path)
set_folder = click.argument("set_path", metavar="SET", type=path)
target_folder = click.argument("out", metavar="OUT", type=path)
containers = click.Choice(list(CONTAINERS))


class Share(click.ParamType):
    """0.1% or 0.001: a part of the whole."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            self.fail(f"{value!r} is no share; say for example 0.1%", param, ctx)
        return share


@click.command()
@set_folder
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of words.")
@click.option("--recompute", type=Share(), metavar="0.1%", help="Also ask the teacher of --config again for so many.")
@click.option("--config", "config_path", type=path, help="What the set was harvested with.")
def verify(set_path: Path, as_json: bool, recompute: float | None, config_path: Path | None) -> None:
    """Read every byte of SET against its checksums; exit 5 if one is not what was written."""
    from harvest.granary.verify import verify as damages_of
    from harvest.granary.verify import verify_assets, verify_notes

    if recompute is not None and config_path is None:
        raise BadUsage(wrong="--recompute", found="no --config", mend="say with which configuration it was harvested")
    shards = ShardSet.open(set_path)
    num_damages = 0
    manifest = shards.manifest()
    told = Told("verify", manifest.receipts)
    for damage in itertools.chain(damages_of(shards, told), verify_assets(shards), verify_notes(shards)):
        num_damages += 1
        click.echo(json.dumps(dataclasses.asdict(damage)) if as_json else str(damage))
    if num_damages:
        raise Corrupt(
            wrong=f"{set_path} is damaged in {num_damages} files",
            found="see above",
            mend="copy those again, or `python -m harvest repair SET CONFIG`",
        )
    whole = {"shards": len(manifest.receipts), "records": manifest.num_records, "bytes": manifest.num_bytes}
    words = f"{whole['shards']} shards, {whole['records']} records, {human_bytes(manifest.num_bytes)}: whole"
    click.echo(json.dumps(whole) if as_json else words)
    if recompute is not None and config_path is not None:
        _recompute(set_path, config_path, recompute)


def _recompute(set_path: Path, config_path: Path, share: float) -> None:
    from common.config import load_config
    from harvest.config import HarvestConfig

    config = load_config(HarvestConfig, config_path)
    prepare_environment()
    from harvest.granary.recompute import recompute as asked_again

    for line in asked_again(config, set_path, share):
        click.echo(line)


@click.command()
@set_folder
def rebuild(set_path: Path) -> None:
    """Make lost or damaged receipts of SET again from its shards."""
    from harvest.granary.rebuild import rebuild as receipts_of

    faults = []
    for made in receipts_of(ShardSet.open(set_path)):
        faults += [made] if isinstance(made, Corrupt) else []
        click.echo(str(made) if isinstance(made, Corrupt) else f"item {made.item}: whole again")
    if faults:
        raise faults[0]


@click.command()
@set_folder
@target_folder
@click.option("--to", "container", required=True, type=containers)
def convert(set_path: Path, out: Path, container: str) -> None:
    """Write the records of SET to OUT in another container; digests stay equal."""
    from harvest.granary.select import convert as converted

    shards = ShardSet.open(set_path)
    _say(converted(shards, out, container, Told("convert", shards.manifest().receipts)))


@click.command()
@click.argument("set_paths", metavar="SET...", nargs=-1, required=True, type=path)
@target_folder
def merge(set_paths: tuple[Path, ...], out: Path) -> None:
    """Join SETs of one contract in OUT; a record that several hold is taken from the first."""
    from harvest.granary.select import merge as merged

    sets = [ShardSet.open(set_path) for set_path in set_paths]
    receipts = [receipt for shards in sets for receipt in shards.manifest().receipts]
    _say(merged(sets, out, Told("merge", receipts)))


@click.command()
@set_folder
@target_folder
@click.option("--prompt", "prompts", multiple=True, help="A shell pattern; one of several must match.")
@click.option("--size", "sizes", multiple=True, metavar="HxW")
@click.option("--sigma", metavar="LOW:HIGH", help="Points with LOW <= sigma < HIGH.")
@click.option("--held-out/--not-held-out", default=None, help="Only the held-out records, or only the others.")
def subset(set_path: Path, out: Path, prompts: tuple[str, ...], sizes: tuple[str, ...], sigma: str | None,
           held_out: bool | None) -> None:  # fmt: skip
    """Write some of SET to OUT."""
    from harvest.granary.select import Choice
    from harvest.granary.select import subset as chosen

    choice = Choice(
        prompts=prompts,
        sizes=tuple((int(h), int(w)) for h, w in (_pair("--size", size, "x") for size in sizes)),
        sigmas=_pair("--sigma", sigma, ":") if sigma else None,
        held_out=held_out,
    )
    shards = ShardSet.open(set_path)
    _say(chosen(shards, out, choice, Told("subset", shards.manifest().receipts)))


@click.command()
@click.argument("first", type=path)
@click.argument("second", type=path)
def diff(first: Path, second: Path) -> None:
    """What two sets have in common and what not; exit 1 if they differ."""
    from harvest.granary.compare import compare

    difference = compare(ShardSet.open(first), ShardSet.open(second))
    click.echo("\n".join(difference.lines()))
    raise SystemExit(0 if difference.none else 1)


@click.command()
@set_folder
@target_folder
@click.option("--free", is_flag=True, help="Remove from SET what has arrived; SET still knows that it is done.")
def push(set_path: Path, out: Path, free: bool) -> None:
    """Copy SET to OUT, resumed and verified on arrival."""
    _carry(set_path, out, free)


@click.command()
@click.argument("there", metavar="THERE", type=path)
@click.argument("here", metavar="HERE", type=path)
def pull(there: Path, here: Path) -> None:
    """Copy the set THERE to HERE, resumed and verified on arrival."""
    _carry(there, here, free=False)


def _carry(source: Path, target: Path, free: bool) -> None:
    from harvest.granary.carry import carry
    from harvest.granary.place import LocalPlace
    from harvest.plan import moved_keys

    shards = ShardSet.open(source)
    manifest, num_shards, num_bytes = shards.manifest(), 0, 0
    told, elsewhere = Told("carry", manifest.receipts), moved_keys(shards).keys() - manifest.by_item.keys()
    for receipt in carry(LocalPlace(source), LocalPlace(target), free=free):
        num_shards, num_bytes = num_shards + 1, num_bytes + receipt.num_bytes
        told(receipt)
    click.echo(f"{num_shards} shards, {human_bytes(num_bytes)} stand whole in {target}")
    if elsewhere and (elsewhere := elsewhere - ShardSet.open(target).manifest().by_item.keys()):
        click.echo(f"{len(elsewhere)} items of {source} had been carried elsewhere before: they are not among them")


def _pair(option: str, text: str, separator: str) -> tuple[float, float]:
    low, found, high = text.partition(separator)
    try:
        if not found:
            raise ValueError
        return float(low), float(high)
    except ValueError:
        raise BadUsage(wrong=option, found=text, mend=f"two numbers with '{separator}' between them") from None


def _say(shards: ShardSet) -> None:
    manifest = shards.manifest()
    held = f"{len(manifest.receipts)} shards, {manifest.num_records} records, {human_bytes(manifest.num_bytes)}"
    click.echo(f"{shards.path}: {held}")
