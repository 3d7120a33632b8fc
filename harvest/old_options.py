"""WanDistiller's options of `run`, accepted with a notice that says what to write instead.

@wan_distiller                                        --teacher_device_strategy, --teacher_on_cpu, --teacher_dtype
def run(..., **old): overrides += as_overrides(old)
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
Command = TypeVar("Command", bound=Callable[..., Any])


def wan_distiller(command: Command) -> Command:
    way = click.option("--teacher_device_strategy", metavar="WAY", help="As `--set teacher.placement=WAY`.")
    on_cpu = click.option("--teacher_on_cpu", is_flag=True, help="As `--set teacher.device=cpu`.")
    dtype = click.option("--teacher_dtype", metavar="DTYPE", help="As `--set teacher.dtype=DTYPE`.")
    return way(on_cpu(dtype(command)))


def as_overrides(old: Mapping[str, Any]) -> tuple[str, ...]:
    """What they say in our words, and a line for each on stderr."""
    way, dtype = old["teacher_device_strategy"], old["teacher_dtype"]
    told = {
        "teacher_device_strategy": way and f"teacher.placement={way}",
        "teacher_on_cpu": old["teacher_on_cpu"] and "teacher.device=cpu",
        "teacher_dtype": dtype and f"teacher.dtype={DTYPES.get(dtype, dtype)}",
    }
    for option, override in told.items():
        if override:
            click.echo(f"--{option} is WanDistiller's: taken as --set {override}", err=True)
    return tuple(override for override in told.values() if override)
