"""The training side's commands: options in, one call, lines out. They import what they need when they are called."""

import json
import os
import sys
from pathlib import Path
from typing import Literal

import click

from common.cli import Duration
from common.config import load_config
from common.environment import prepare_environment
from common.errors import BadUsage
from train.config import TrainConfig
from train.extras import require_extras

path = click.Path(path_type=Path)
steps_option = click.option("--steps", type=click.IntRange(min=1),
                            help="Of the solver; else as many as its teacher took, or its segments.")  # fmt: skip

device_option = click.option("--device", "device_name", metavar="cpu|cuda|cuda:N",
                             help="Else the GPU where there is one.")  # fmt: skip
guidance_option = click.option("--guidance", type=float, metavar="W",
                               help="For a student that is told the guidance; else the set's own.")  # fmt: skip

overrides_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                                help="Lay a value over the file's.")  # fmt: skip


@click.command()
@click.argument("config_path", metavar="CONFIG", type=path)
@overrides_option
@click.option("--time-limit", type=Duration(), help="Save and leave with exit code 75 after so long, e.g. 30m.")
@click.option("--follow", type=Duration(), default=0.0, help="Wait so long for more shards at an epoch's beginning.")
@click.option("--check", "only_check", is_flag=True, help="One batch through everything, each part timed; then stop.")
def run(config_path: Path, overrides: tuple[str, ...], time_limit: float | None, follow: float,
        only_check: bool) -> None:  # fmt: skip
    """Train what CONFIG asks for. The same command again goes on where it stopped."""
    config = load_config(TrainConfig, config_path, overrides=overrides)
    prepare_environment()
    require_extras(config)
    from train.launch import adopt_srun, processes_to_start, start_processes

    adopt_srun(os.environ)
    num = processes_to_start(config, os.environ)
    if num > 1:
        sys.exit(start_processes(num, sys.argv[1:]))
    from train.check import check
    from train.dist import joined
    from train.loop import train

    with joined(config.device, timeout_s=config.deadline_s) as world:
        check(config, world) if only_check else train(config, world, limit_s=time_limit, follow_s=follow)


@click.command()
@click.argument("config_path", metavar="CONFIG", type=path)
@overrides_option
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--memory", "gigabytes", default=24.0, show_default=True, help="Of each GPU, in GB.")
@click.option("--samples-per-s", type=float, help="Over all GPUs; else what a run of CONFIG measured.")
def plan(config_path: Path, overrides: tuple[str, ...], gpus: int, gigabytes: float,
         samples_per_s: float | None) -> None:  # fmt: skip
    """What training CONFIG would need: memory by part, steps, time. From headers alone."""
    config = load_config(TrainConfig, config_path, overrides=overrides)
    from train.plan import plan_lines

    for line in plan_lines(config, num_gpus=gpus, gpu_bytes=gigabytes * 1e9, samples_per_s=samples_per_s):
        click.echo(line)


@click.command()
@click.option("--teacher", type=path, help="The teacher's diffusers folder.")
@click.option("--student", "student_path", required=True, type=path, help="A JSON of configs/students/.")
@click.option("--out", required=True, type=path, help="Where the first weights go.")
@click.option("--set", "set_path", type=path, help="What it will learn from: the student is checked against it "
              "and cut by the activations that a harvest saw.")  # fmt: skip
@click.option("--experts", default="low", show_default=True, metavar="EXPERT[,...]",
              help="Which of two experts the student starts from: low, high, mean; or one for each block of the "
                   "teacher, with commas.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="No teacher's weights: a random start, for any set (--set).")
@click.option("--adapt", is_flag=True, help="Write OUT/student.json with what --set wants, and go on with it.")
def init(teacher: Path | None, student_path: Path, out: Path, set_path: Path | None,
         experts: str, fresh: bool, adapt: bool) -> None:  # fmt: skip
    """A student's first weights, cut from a teacher's folder; reads only the tensors it needs."""
    from common.shards import ShardSet
    from train.student.config import read_student_json
    from train.student.fitting import fitted
    from train.student.fresh import start_fresh
    from train.student.projection import project, statistics_of

    if (teacher is None) != fresh or (set_path is None and (fresh or adapt)):
        raise BadUsage(wrong="where the student's weights come from", found="not one of the two ways",
                       mend="give --teacher DIR, or --fresh --set SET; --adapt wants --set too")  # fmt: skip
    shards = None if set_path is None else ShardSet.open(set_path)
    mended_path = out / "student.json" if adapt else None
    if shards is None:
        student = read_student_json(student_path)
    else:
        student = fitted(student_path, shards, mended_path=mended_path)
    if teacher is None:
        report = start_fresh(student, out)
    else:
        statistics_path = None if shards is None else statistics_of(shards)
        report = project(teacher, student, out, experts=experts, statistics_path=statistics_path)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items()))
    click.echo(f"{out}: {counts} tensors; blocks {report.blocks} of the teacher, experts: {report.experts}, "
               f"chosen by {report.chosen_by}")  # fmt: skip


@click.command()
@click.argument("run_dir", metavar="RUN", type=path)
@click.option("--out", required=True, type=path, help="The PNG.")
@click.option("--num", default=16, show_default=True, type=click.IntRange(min=1), help="Pictures.")
@steps_option
@click.option("--prompt", "prompts", multiple=True, help="Any words, with --text-encoder; once for each picture.")
@click.option("--text-encoder", type=path, help="The teacher's folder: its text encoder and tokenizer are loaded.")
@click.option("--seed", default=0, show_default=True, help="Of the noise, with --prompt.")
@guidance_option
@device_option
def sample(run_dir: Path, out: Path, num: int, steps: int | None, prompts: tuple[str, ...], text_encoder: Path | None,
           seed: int, guidance: float | None, device_name: str | None) -> None:  # fmt: skip
    """Pictures by RUN's student above the teacher's own, from the same noise; or of your own words."""
    if bool(prompts) != (text_encoder is not None):
        raise BadUsage(wrong="--prompt and --text-encoder go together", found="one of them",
                       mend="give both, or neither: then the set's own prompts are drawn")  # fmt: skip
    prepare_environment()
    from train.dist import device_of
    from train.sample import beside
    from train.sample import sample as draw_sheet

    device = device_of(device_name)
    if text_encoder is not None:
        from train.texts import draw_words

        drawn = draw_words(run_dir, prompts, text_encoder, seed=seed, steps=steps, device=device, guidance=guidance)
        out.parent.mkdir(parents=True, exist_ok=True)
        beside(drawn).save(out, format="PNG")
        click.echo(f"{out}: {len(prompts)} pictures")
        return
    sheet = draw_sheet(run_dir, num=num, steps=steps, device=device, guidance=guidance)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    click.echo(f"{out}: {num} pairs, the student's above its teacher's")


@click.command("eval")
@click.argument("run_dir", metavar="RUN", type=path)
@click.option("--num", default=256, show_default=True, type=click.IntRange(min=1), help="Pictures.")
@steps_option
@click.option("--grader", "grader_name", metavar="MODULE:FUNCTION", help="(picture, prompt) -> its grade.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@device_option
def evaluate(run_dir: Path, num: int, steps: int | None, grader_name: str | None, as_json: bool,
             device_name: str | None) -> None:  # fmt: skip
    """How far the student of RUN, or of one of its checkpoints, is from its teacher, in answers and in pictures."""
    prepare_environment()
    from train.dist import device_of
    from train.evaluate import evaluate as measure
    from train.evaluate import load_grader, report_lines

    grader = load_grader(grader_name) if grader_name else None
    report = measure(run_dir, num=num, steps=steps, grader=grader, device=device_of(device_name))
    for line in [json.dumps(report)] if as_json else report_lines(report):
        click.echo(line)


@click.command()
@click.argument("checkpoint_or_run", type=path)
def verify(checkpoint_or_run: Path) -> None:
    """Every byte of a checkpoint, or of all checkpoints of a run, against its checksums."""
    from train.state import verify_lines

    for line in verify_lines(checkpoint_or_run):
        click.echo(line)


@click.command()
@click.argument("run_dir", metavar="RUN", type=path)
def status(run_dir: Path) -> None:
    """Where RUN stands, from its folder alone."""
    from train.run_folder import status_lines

    for line in status_lines(run_dir):
        click.echo(line)


@click.command()
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=path)
@click.option("--out", required=True, type=path, help="A new folder; with comfyui a new file.")
@click.option("--format", "form", type=click.Choice(["diffusers", "comfyui", "wanlite"]),
              help="diffusers unless said.")  # fmt: skip
@click.option("--adapter", "only_adapter", is_flag=True, help="Of a run with `lora`: its adapters, as peft opens them.")
@guidance_option
@click.option("--raw", is_flag=True, help="The weights themselves instead of their moving average.")
@click.option(
    "--text-encoder", type=path, help="A pipeline folder whose text encoder and tokenizer come along, linked."
)
@click.option("--copy", is_flag=True, help="Copied instead of linked.")
@click.option("--license", "license_name", default="unknown", show_default=True, help="Said in the model card.")
def export(source: Path, out: Path, form: Literal["diffusers", "comfyui", "wanlite"] | None, only_adapter: bool,
           guidance: float | None, raw: bool, text_encoder: Path | None, copy: bool,
           license_name: str) -> None:  # fmt: skip
    """A student in a form that other tools open."""
    if only_adapter and form:
        raise BadUsage(wrong="--adapter and --format", found=f"both, --format {form}", mend="give one of them")
    from train.export import Form
    from train.export import export as write

    chosen: Form = "adapter" if only_adapter else form or "diffusers"
    note = write(
        source,
        out,
        form=chosen,
        averaged=not raw,
        guidance=guidance,
        text_encoder=text_encoder,
        copy=copy,
        license_name=license_name,
    )
    click.echo(f"{out}: {chosen}")
    if note:
        click.echo(note)
