"""README, docs/ and other pages match the code: options, fields, headers, tensors, metrics, files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from hypergen_gateway.api.openapi import describe_api
from hypergen_gateway.cli import main
from hypergen_gateway.errors import HyperGenError
from hypergen_gateway.generation.admission import Admission
from hypergen_gateway.http.origins import cors, security_headers
from hypergen_gateway.observability.metrics import Metrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".github/SECURITY.md")),
    *(ROOT / name for name in ("docker/README.md", "export/emoji/README.md", "export/emoji_flow/README.md")),
    *sorted(DOCS.glob("*.md")),
]
# What the file map lists: these folders with all rooms in them.
MAPPED = ("gateway/hypergen_gateway", "export/hypergen_export", "model_repository/diffusion/1")
COMMANDS = ("serve", "generate", "export", "estimate", "passport", "conformance")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of the same or a higher level."""
    level = len(heading) - len(heading.lstrip("#"))
    after = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table's rows, without their heads."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and not set("".join(cells)) <= {"-"}:
            yield cells


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", without_code(page.read_text()), flags=re.MULTILINE)
    for link in (inline or reference for inline, reference in links):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    folders = r"(?:gateway|export|model_repository|tests|docker|\.ci)"
    named = re.findall(rf"(?<![\w./-]){folders}/[\w./-]*\w", page.read_text())
    placeholder = re.compile(r"/[A-Z]+$")
    assert [name for name in named if not (ROOT / name).exists() and not placeholder.search(name)] == []


def modules_of(folder: str) -> set[str]:
    files = [file for pattern in ("*.py", "*.js") for file in (ROOT / folder).rglob(pattern)]
    return {page_id(file) for file in files if not is_only_a_docstring(file)}


def is_only_a_docstring(file: Path) -> bool:
    return file.name == "__init__.py" and len(ast.parse(file.read_text()).body) <= 1


def mapped_modules() -> list[str]:
    """The files of the map: each of its headings is a folder, the first cell of a row a file in it."""
    file_map = section((DOCS / "architecture.md").read_text(), "## File map")
    _, *rooms = re.split(r"^### `([^`]+)/`$", file_map, flags=re.MULTILINE)
    return [
        f"{folder}/{code_in(cells[0])[0]}"
        for folder, text in zip(rooms[::2], rooms[1::2], strict=True)
        for cells in rows(text)
        if code_in(cells[0])
    ]


def test_the_file_map_has_every_module_once_and_no_other() -> None:
    modules = {module for folder in MAPPED for module in modules_of(folder)}
    mapped = mapped_modules()
    assert set(mapped) == modules
    assert len(mapped) == len(modules)


def options_of(command: str) -> dict[str, click.Option]:
    context = click.Context(main)
    found = main.get_command(context, command)
    assert found is not None
    return {parameter.opts[-1]: parameter for parameter in found.params if isinstance(parameter, click.Option)}


def documented(text: str) -> dict[str, list[str]]:
    """The rows of options, by the last name of each that is long."""
    found = {}
    for cells in rows(text):
        names = [name for name in code_in(cells[0]) if name.startswith("--")]
        if names:
            found[names[-1]] = cells
    return found


def documented_options(command: str) -> dict[str, list[str]]:
    configuration = (DOCS / "configuration.md").read_text()
    found = documented(section(configuration, f"## `hypergen {command}`"))
    if command in ("generate", "passport"):
        found |= documented(section(configuration, "### Model and Triton"))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_and_no_other(command: str) -> None:
    names = {name for option in options_of(command).values() for name in option.opts if name.startswith("--")}
    rows_of_options = documented_options(command).values()
    assert {name for cells in rows_of_options for name in code_in(cells[0]) if name.startswith("--")} == names


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_documented_with_their_variable_and_default(command: str) -> None:
    options = options_of(command)
    for name, (_, variable, default, meaning) in documented_options(command).items():
        option = options[name]
        assert variable == (f"`{option.envvar}`" if option.envvar else ""), name
        assert meaning, name
        if isinstance(option.show_default, str):
            assert default.strip("`") == option.show_default, name
        elif option.is_flag:
            assert default == "off", name
        elif isinstance(option.default, str | int | float | Path):
            value = option.default
            assert default == (f"`{value:g}`" if isinstance(value, float) else f"`{value}`"), name


def request_fields() -> set[str]:
    description = describe_api(None, secured=True)
    bodies = [
        content["schema"]["$ref"].rpartition("/")[2]
        for operations in description["paths"].values()
        for operation in operations.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
    ]
    return {field for body in bodies for field in description["components"]["schemas"][body]["properties"]}


def test_every_request_field_has_a_row_in_the_api_and_no_other_has() -> None:
    api = (DOCS / "api.md").read_text()
    tables = "".join(section(api, f"## {name}") for name in ("Fields of OpenAI", "HyperGen's own fields", "LoRA files"))
    assert {field for cells in rows(tables) for field in code_in(cells[0])} == request_fields()


def test_the_api_lists_the_schedulers_that_are_offered() -> None:
    from hypergen_export.checkpoints.schedulers import SELECTABLE

    table = section((DOCS / "api.md").read_text(), "## HyperGen's own fields")
    (values,) = [cells[1] for cells in rows(table) if cells[0] == "`scheduler`"]
    assert code_in(values) == list(SELECTABLE)


def response_headers() -> set[str]:
    description: dict[str, Any] = describe_api(None, secured=True)
    described = {
        name
        for operations in description["paths"].values()
        for operation in operations.values()
        for response in operation["responses"].values()
        for name in response.get("headers", {})
    }
    (layer,) = cors(("*",))
    exposed: Any = layer.kwargs["expose_headers"]
    always = [name.decode() for name, _ in security_headers(())]
    return {name.lower() for name in (*described, *exposed, *always)}


def test_every_response_header_has_a_row_in_the_api() -> None:
    api = section((DOCS / "api.md").read_text(), "## Headers").partition("| response header |")[2]
    assert response_headers() <= {header.lower() for cells in rows(api) for header in code_in(cells[0])}


def errors_below(kind: type[HyperGenError]) -> Iterator[type[HyperGenError]]:
    for error in kind.__subclasses__():
        yield error
        yield from errors_below(error)


def test_every_error_has_a_row_in_the_api_with_its_status_and_code() -> None:
    table = list(rows(section((DOCS / "api.md").read_text(), "## Errors")))
    written = {(status, code) for cells in table for status in cells[0].split(", ") for code in code_in(cells[1])}
    for error in errors_below(HyperGenError):
        if error.code is not None:
            cells = [each for each in table if f"`{error.code}`" in each[1]]
            assert [str(error.status) in each[0] for each in cells].count(True) == 1, error
    assert {code for _, code in written} == {error.code for error in errors_below(HyperGenError)} - {None}


def test_every_tensor_of_the_sampler_is_in_its_contract() -> None:
    config = (ROOT / "model_repository" / "diffusion" / "config.pbtxt").read_text()
    contract = section((DOCS / "architecture.md").read_text(), "## The contract of the model `diffusion`")
    inputs, outputs = config.split("\noutput [")
    tables = re.split(r"^\| (?:input|output|error) \|.*$", contract, flags=re.MULTILINE)
    for tensors, table in ((inputs, tables[1]), (outputs, tables[2])):
        names = re.findall(r"\{ name: \"(\w+)\"", tensors)
        assert [name for cells in rows(table) for name in code_in(cells[0])] == names


def test_every_metric_of_the_gateway_and_every_alert_is_documented() -> None:
    production = (DOCS / "production.md").read_text()
    exposition = Metrics(Admission(1)).exposition().decode()
    metrics = set(re.findall(r"^# TYPE (hypergen_\w+) ", exposition, flags=re.MULTILINE))
    metrics -= {name for name in metrics if name.endswith("_created")}
    documented_metrics = {name for cells in rows(section(production, "## Metrics")) for name in code_in(cells[0])}
    assert metrics == {name for name in documented_metrics if name.startswith("hypergen_gateway_")}
    rules = "".join(file.read_text() for file in (ROOT / "docker" / "observability").glob("*rules.yaml"))
    documented_alerts = {name for cells in rows(section(production, "## Alerts")) for name in code_in(cells[0])}
    assert documented_alerts == set(re.findall(r"alert: (\w+)", rules))
