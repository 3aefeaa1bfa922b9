"""Rules and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import httpx

from hypergen_gateway.conformance.server import Server

Result = Literal["pass", "fail", "not offered", "not tested"]
RESULTS: tuple[Result, ...] = ("pass", "fail", "not offered", "not tested")

# Tests a rule and returns what was observed; raises `Failed`, `NotOffered` or `NotTested`.
Check: TypeAlias = Callable[[Server], str]

_LONGEST = 160


class Failed(Exception):  # noqa: N818 - a result, not an error
    """The server violates the rule; `str()` is what was observed."""


class NotOffered(Exception):  # noqa: N818 - a result, not an error
    """The server reports, in a way that the API provides for, that it does not support this."""


class NotTested(Exception):  # noqa: N818 - a result, not an error
    """The rule could not be tested; `str()` is what was missing."""


@dataclass(frozen=True)
class Rule:
    """A statement about a server, and its test. Extensions are specific to HyperGen."""

    area: str
    text: str
    check: Check
    extension: bool = False


@dataclass(frozen=True)
class Finding:
    """The result of a rule, and what was observed."""

    rule: Rule
    result: Result
    seen: str


class Area:
    """Collects the rules of one part of the API, in definition order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rules: list[Rule] = []

    def rule(self, text: str, *, extension: bool = False) -> Callable[[Check], Check]:
        """Decorator that registers a function as the check of a rule."""

        def add(check: Check) -> Check:
            self.rules.append(Rule(self.name, text, check, extension))
            return check

        return add


def need(condition: object, seen: str) -> None:
    """Raise `Failed` with the observation `seen` unless `condition` is true."""
    if not condition:
        raise Failed(seen)


def findings(rules: Sequence[Rule], server: Server) -> Iterator[Finding]:
    """Test the rules in order. A check that cannot parse a response, or gets none, fails its rule."""
    for rule in rules:
        result, seen = _try(rule.check, server)
        yield Finding(rule, result, _short(seen))


def _try(check: Check, server: Server) -> tuple[Result, str]:
    try:
        return "pass", check(server)
    except Failed as failure:
        return "fail", str(failure)
    except NotOffered as reason:
        return "not offered", str(reason)
    except NotTested as reason:
        return "not tested", str(reason)
    except httpx.TimeoutException:
        return "fail", f"no response within {server.options.timeout:g} s"
    except httpx.TransportError as error:
        return "fail", f"connection lost: {type(error).__name__} {error}".strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # an unexpected structure
        return "fail", f"the response cannot be parsed: {type(error).__name__}: {error}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
