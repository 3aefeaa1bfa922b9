"""Building blocks for command-line options: environment variables, ranges, and the treatment of empty values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

import click

# Upper bounds that gRPC's, asyncio's and the file system's clocks can represent.
A_WEEK = 7 * 24 * 3600
A_YEAR = 365 * 24 * 3600
# What Kubernetes writes into NAME_PORT beside a service called NAME, and Docker beside a linked container.
_LINKED_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


class Number(click.FloatRange):
    """A number within bounds. NaN, which compares as false with every bound, is rejected."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error if it is not one or out of range."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class KeyText(click.types.StringParamType):
    """An API key that a header can carry. An environment variable holds exactly one, even if it contains spaces."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The key, or a usage error that does not show it if no client could send it."""
        key = str(super().convert(value, param, ctx)).strip()
        if not (key.isascii() and key.isprintable()):
            self.fail("an API key must be printable ASCII.", param, ctx)
        return key

    def split_envvar_value(self, rv: str) -> list[str]:
        """The whole value as one key."""
        return [rv]


class _NotEmpty(click.Parameter):
    """Rejects empty values, such as that of `--host "$ADDRESS"` when ADDRESS is not set."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """The converted value. Only the command line can pass an empty one: click ignores empty variables."""
        if "" in (value if self.multiple or self.nargs == -1 else [value]):
            raise click.BadParameter("must not be empty.", ctx, self)
        return super().type_cast_value(ctx, value)


class Argument(_NotEmpty, click.Argument):
    """An argument that rejects an empty value."""


class Option(_NotEmpty, click.Option):
    """An option that rejects an empty value. An empty variable counts as unset, as Compose passes unset ones so."""


class SecretOption(Option):
    """An option that protects the server: its variable may be unset, but not empty."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The variable's value; None if unset."""
        value = super().resolve_envvar_value(ctx)
        if value is None and os.environ.get(str(self.envvar)) is not None:
            raise click.BadParameter("the variable is set but empty; unset it to go without.", ctx, self)
        return value


class PortOption(Option):
    """A port. In its variable, the address of a service of the same name counts as unset: nobody has chosen it.

    HYPERGEN_PORT is `tcp://10.0.0.1:8000` in every pod beside a Kubernetes service called `hypergen`.
    """

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The variable's value; None if unset."""
        value = super().resolve_envvar_value(ctx)
        return None if value is not None and _LINKED_ADDRESS.match(value) else value


def option(*names: str, cls: type[Option] = Option, **settings: Any) -> Callable[[Any], Any]:
    """An option that can also be set by an environment variable: HYPERGEN_API_KEY for --api-key."""
    envvar = "HYPERGEN_" + names[0].lstrip("-").upper().replace("-", "_")
    return click.option(*names, cls=cls, envvar=envvar, show_envvar=True, **settings)
