"""`hypergen conformance`: check servers against OpenAI's Images API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
import httpx

from hypergen_gateway.conformance import auth, edits, generations, headers, mistakes, models, report, streams
from hypergen_gateway.conformance.rules import Finding, Rule, findings
from hypergen_gateway.conformance.server import MODELS, Options, Server
from hypergen_gateway.options import A_WEEK, Argument, KeyText, Number, Option, SecretOption, option

AREAS = (
    models.AREA,
    models.HEALTH,
    auth.AREA,
    generations.AREA,
    streams.AREA,
    edits.AREA,
    edits.VARIATION,
    mistakes.AREA,
    mistakes.FIELDS,
    headers.AREA,
    headers.LOAD,
    mistakes.ABUSE,
)
RULES: tuple[Rule, ...] = tuple(rule for area in AREAS for rule in area.rules)


@click.command()
@click.argument("urls", cls=Argument, nargs=-1, required=True, metavar="URL...")
@option("--api-key", cls=SecretOption, type=KeyText(), metavar="KEY", help="API key of the servers.")
@click.option(
    "--timeout", cls=Option, type=Number(1, A_WEEK), default=600.0, help="Time limit of a response in seconds."
)
@click.option(
    "--extra-body", cls=Option, metavar="JSON", default="{}", help="Fields for every request, such as fewer steps."
)
@click.option(
    "--burst",
    cls=Option,
    type=click.IntRange(0, 1000),
    default=0,
    help="Concurrent requests to fill the queue; 0: none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all results as JSON.")
@click.option("--markdown", is_flag=True, help="Print tables with a column per server.")
def conformance(*, urls: Sequence[str], extra_body: str, as_json: bool, markdown: bool, **given: Any) -> None:
    """Check the server at each URL against OpenAI's Images API.

    Generates about fifty small images. Rules for HyperGen's additions to the API are marked as extensions. The exit
    code is 1 if a rule fails that is not an extension.
    """
    options = Options(extra_body=_read_fields(extra_body), **given)
    quiet = as_json or markdown
    by_server = {url: _run(url, options, quiet) for url in urls}
    if quiet:
        click.echo(report.to_json(by_server) if as_json else report.to_markdown(by_server))
    everything = [finding for found in by_server.values() for finding in found]
    if any(finding.result == "fail" and not finding.rule.extension for finding in everything):
        raise SystemExit(1)


def _run(url: str, options: Options, quiet: bool) -> list[Finding]:
    server = Server(url, options)
    found: list[Finding] = []
    try:
        _check_reachable(server)
        for finding in findings(RULES, server):
            if not quiet:
                is_first_of_area = not found or found[-1].rule.area != finding.rule.area
                click.echo((f"\n{finding.rule.area}\n" if is_first_of_area else "") + report.line(finding))
            found.append(finding)
    finally:
        server.close()
    click.echo(f"\n{url}: {report.summary(found)}", err=quiet)
    return found


def _check_reachable(server: Server) -> None:
    try:
        server.send("GET", MODELS)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise click.ClickException(f"{server.url} cannot be reached: {error}") from error


def _read_fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # it must be possible to send it
    except ValueError as error:
        raise click.UsageError(f"--extra-body is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise click.UsageError("--extra-body must be a JSON object.")
    return fields
