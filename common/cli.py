"""The frame of both command lines: a click group that imports a command only when it is called, and that prints
a Fault as one line.

    main = LazyGroup(name="harvest", commands={"run": Command("harvest.running.loop:run_command", "its help")})

`--help` costs no more than click itself: the one-line helps stand here with the names, not in the commands' modules.
"""

import importlib
import re
import sys
from typing import Any, NamedTuple

import click

from common.errors import Fault, Partial
from common.files import FULL


class Duration(click.ParamType):
    """30m, 2h, 1h30m, 90s or 90: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", str(value))
        if not value or parts is None:
            self.fail(f"{value!r} is not a time; say for example 30m, 2h or 90s", param, ctx)
        hours, minutes, seconds = (float(part or 0) for part in parts.groups())
        return 3600 * hours + 60 * minutes + seconds


class Command(NamedTuple):
    target: str
    """module:function, a click command."""
    help: str


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def __init__(self, *, commands: dict[str, Command], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._targets = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._targets)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self._targets:
            return None
        module, function = self._targets[name].target.split(":")
        command = getattr(importlib.import_module(module), function)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in self._targets.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and args[0] not in self._targets and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self._targets, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" There are: {', '.join(self._targets)}."
            ctx.fail(f"No such command '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except Fault as told:
            fault = told
        except OSError as error:
            if error.errno not in FULL:
                raise
            fault = Partial(wrong="no space left", found=str(error), mend="make room, and run the same command again")
        click.echo(f"{self.name}: {fault}", err=True)
        sys.exit(fault.exit_code)
