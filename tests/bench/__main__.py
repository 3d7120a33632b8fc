"""Speed beside peers and limits, in one run.

    python -m tests.bench                            the next three, as `make bench` does
    python -m tests.bench store                      reading a shard set beside raw, webdataset, MDS, litdata, LMDB ...
    python -m tests.bench loading                    half a billion parameters from disk, beside the library's own load
    python -m tests.bench harvest                    a harvest beside its bare forwards and the library's pipeline
    python -m tests.bench shrink --set out/demo/set  students cut by importance, by first rows, at random
    python -m tests.bench training                   a step's wait for data, a second process, memory, checkpointing
    python -m tests.bench students                   what students keep of the shapes teacher's score, by size
    python -m tests.bench store --points 256 --rounds 2 --receipts 500        a quick look, some seconds
    python -m tests.bench store --pages read         as a training run finds a set that came from elsewhere
    python -m tests.bench store --json out/store.json --keep

Peers are the extra `bench` of pyproject.toml, and two whose own requirements contradict ours (they ask for
torchvision, numpy < 2.2, transformers < 5, and need none of them to read):

    pip install -c constraints.txt -e '.[bench]' && pip install --no-deps litdata==0.2.76 mosaicml-streaming==0.13.0

One that is not installed is named and left out. 0.6 GB per format are written to --out, 5 GB in all.
"""

import json
import shutil
from pathlib import Path

import click


@click.group(invoke_without_command=True, help="Speed beside peers and limits, in one run.")
@click.pass_context
def main(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        for name in ("store", "loading", "harvest"):
            ctx.invoke(main.commands[name])


@main.command(help="Reading a shard set, beside raw reads and the peers' formats.")
@click.option("--points", "num_points", default=1536, show_default=True, help="393 kB each, once per format on disk")
@click.option("--rounds", "num_rounds", default=7, show_default=True)
@click.option("--receipts", "num_receipts", default=20_000, show_default=True, help="of the set that is only opened")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), default=Path("out/bench"), show_default=True)
@click.option(
    "--pages",
    type=click.Choice(["written", "read"]),
    default="written",
    show_default=True,
    help="what lies in the page cache: files as they were just written, or dropped and read back by a shuffled "
    "epoch, as by a training run whose set came from elsewhere",
)
@click.option("--keep", is_flag=True, help="leave the formats on disk")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="write every single figure there")
def store(
    num_points: int, num_rounds: int, num_receipts: int, out_dir: Path, pages: str, keep: bool, json_path: Path | None
) -> None:
    from tests.bench.report import store_report

    folder = out_dir / "store"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        figures = store_report(folder, num_points, num_rounds, num_receipts, pages)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1))


@main.command(help="A transformer into memory, beside the library's own load and a raw read.")
@click.option("--rounds", "num_rounds", default=5, show_default=True)
@click.option("--layers", default=12, show_default=True, help="46 million parameters each")
def loading(num_rounds: int, layers: int) -> None:
    from tests.bench.loading import run

    click.echo("\n".join(run(rounds=num_rounds, layers=layers)))


@main.command(help="A harvest beside the bare forwards that it needs, and beside the library's pipeline.")
@click.option("--rounds", "num_rounds", default=3, show_default=True)
@click.option("--records", default=32, show_default=True)
@click.option("--out", "out_dir", type=click.Path(path_type=Path), default=Path("out/bench"), show_default=True)
def harvest(num_rounds: int, records: int, out_dir: Path) -> None:
    from tests.bench.harvesting import run

    click.echo("\n".join(run(rounds=num_rounds, records=records, out_dir=out_dir / "harvest")))


@main.command(help="Students cut by importance, first rows or at random, before and while they learn; wants a set.")
@click.option("--teacher", type=click.Path(path_type=Path), default=Path("configs/teachers/shapes"), show_default=True)
@click.option("--set", "set_path", type=click.Path(path_type=Path), default=Path("out/demo/set"), show_default=True)
@click.option("--steps", default=300, show_default=True)
@click.option("--out", "out_dir", type=click.Path(path_type=Path), default=Path("out/bench"), show_default=True)
def shrink(teacher: Path, set_path: Path, steps: int, out_dir: Path) -> None:
    from tests.bench.shrink import run

    for line in run(teacher, set_path, out_dir / "shrink", steps=steps):
        click.echo(line)


@main.command(help="A training step's wait for data, a second process, memory, gradient checkpointing.")
@click.option("--steps", default=300, show_default=True)
@click.option("--rounds", "num_rounds", default=3, show_default=True)
@click.option("--set", "set_path", type=click.Path(path_type=Path), help="with --init; else a small one is harvested")
@click.option("--init", type=click.Path(path_type=Path))
@click.option("--out", "out_dir", type=click.Path(path_type=Path), default=Path("out/bench"), show_default=True)
def training(steps: int, num_rounds: int, set_path: Path | None, init: Path | None, out_dir: Path) -> None:
    from tests.bench.training import run

    for line in run(out_dir / "training", steps=steps, rounds=num_rounds, set_path=set_path, init=init):
        click.echo(line)


@main.command(help="Students of the shapes teacher, from one harvest to their grades; an hour.")
@click.option("--teacher", type=click.Path(path_type=Path), default=Path("configs/teachers/shapes"), show_default=True)
@click.option("--only", multiple=True, help="a student's name; several times for several")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), default=Path("out/bench"), show_default=True)
def students(teacher: Path, only: tuple[str, ...], out_dir: Path) -> None:
    from tests.bench.students import run

    for line in run(teacher, out_dir / "students", only=only):
        click.echo(line)


if __name__ == "__main__":
    main()
