"""What a rule is, and what can come of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import httpx

from hypergen_gateway.conformance.server import Server

Result = Literal["pass", "fail", "not offered", "not tried"]
RESULTS: tuple[Result, ...] = ("pass", "fail", "not offered", "not tried")

# Does what the rule is about, and says what was seen; raises `Failed`, `NotOffered` or `NotTried`.
Check: TypeAlias = Callable[[Server], str]

_LONGEST = 160


class Failed(Exception):  # noqa: N818 - no error of ours
    """The rule does not hold; `str()` is what was seen instead."""


class NotOffered(Exception):  # noqa: N818 - no error: a server need not have everything
    """The server says that it does not do this, in the way that the API provides for."""


class NotTried(Exception):  # noqa: N818 - no error either
    """The rule could not be tried; `str()` says what was missing."""


@dataclass(frozen=True)
class Rule:
    """A sentence that is true of a server or not. An extension is HyperGen's own: other servers need not know it."""

    area: str
    text: str
    check: Check
    extension: bool = False


@dataclass(frozen=True)
class Finding:
    """What came of a rule, and what was seen."""

    rule: Rule
    result: Result
    seen: str


class Area:
    """Collects the rules of one part of the API, in the order in which they are written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rules: list[Rule] = []

    def rule(self, text: str, *, extension: bool = False) -> Callable[[Check], Check]:
        """Makes a function the check of a rule."""

        def add(check: Check) -> Check:
            self.rules.append(Rule(self.name, text, check, extension))
            return check

        return add


def need(condition: object, seen: str) -> None:
    """Fails a rule with what was seen, unless the condition holds."""
    if not condition:
        raise Failed(seen)


def findings(rules: Sequence[Rule], server: Server) -> Iterator[Finding]:
    """Tries the rules one after the other. A check that breaks on what it was sent has found a fault too."""
    for rule in rules:
        result, seen = _try(rule.check, server)
        yield Finding(rule, result, _short(seen))


def _try(check: Check, server: Server) -> tuple[Result, str]:
    try:
        return "pass", check(server)
    except Failed as failure:
        return "fail", str(failure)
    except NotOffered as refusal:
        return "not offered", str(refusal)
    except NotTried as reason:
        return "not tried", str(reason)
    except httpx.TimeoutException:
        return "fail", f"no answer within {server.options.timeout:g} s"
    except httpx.TransportError as error:
        return "fail", f"the connection broke: {type(error).__name__} {error}".strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of a shape that nobody expects
        return "fail", f"the answer cannot be read: {type(error).__name__}: {error}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
