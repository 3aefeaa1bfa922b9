"""Options of the command line: their environment variables, the numbers that they hold, and what an empty value means.

Knows click, and no option by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import click

# Longer than anybody waits, and short enough for every clock: gRPC's, asyncio's and the file system's.
A_WEEK = 7 * 24 * 3600
A_YEAR = 365 * 24 * 3600


class Number(click.FloatRange):
    """A number within bounds. NaN, which compares to nothing, is in no range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a usage error where it is none or out of its range."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class KeyText(click.types.StringParamType):
    """An API key as a header can carry it. An environment variable holds one, whatever is in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The key; a usage error, which does not show it, where no client could send it."""
        key = str(super().convert(value, param, ctx)).strip()
        if not (key.isascii() and key.isprintable()):
            self.fail("an API key is printing ASCII.", param, ctx)
        return key

    def split_envvar_value(self, rv: str) -> list[str]:
        """All of it."""
        return [rv]


class _NotEmpty(click.Parameter):
    """A parameter that is not empty, as `--host "$ADDRESS"` is where the shell has no such variable."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """The value, converted. Only the command line has an empty one: click takes an empty variable for none."""
        if "" in (value if self.multiple or self.nargs == -1 else [value]):
            raise click.BadParameter("it is empty.", ctx, self)
        return super().type_cast_value(ctx, value)


class Argument(_NotEmpty, click.Argument):
    """An argument that is not empty."""


class Option(_NotEmpty, click.Option):
    """An option that is not empty. An empty variable counts as absent, as Compose writes those that are not set."""


class SecretOption(Option):
    """An option without which the server is less protected: its variable may be absent, but not set to nothing."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The variable's value, None where it is absent."""
        value = super().resolve_envvar_value(ctx)
        if value is None and os.environ.get(str(self.envvar)) is not None:
            raise click.BadParameter("it is set but empty; unset it if none is meant.", ctx, self)
        return value


def option(*names: str, secret: bool = False, **settings: Any) -> Callable[[Any], Any]:
    """An option that is an environment variable too: --api-key is HYPERGEN_API_KEY."""
    envvar = "HYPERGEN_" + names[0].lstrip("-").upper().replace("-", "_")
    return click.option(*names, cls=SecretOption if secret else Option, envvar=envvar, show_envvar=True, **settings)
