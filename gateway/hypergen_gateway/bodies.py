"""Bodies to plain values. Knows JSON, forms and media types, and nothing of what a field means."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from hypergen_gateway.errors import InvalidRequestError, UnsupportedMediaTypeError
from hypergen_gateway.faults import raise_if_disk_is_full
from hypergen_gateway.threads import off_the_loop

# A tenth of a millisecond of parsing; an image as base64 takes a good part of a second.
_QUICK_BYTES = 128 << 10
# Seventeen files and some twenty fields are legal.
_MAX_FILES = 32
_MAX_FIELDS = 100
# Starlette would take any of Python's codecs, some of which take their time, and some of which are no charset at all.
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii"})


@dataclass(frozen=True, eq=False)
class UploadedFile:
    """A file that came with a form; open as long as the request is read. Its name and type are the client's guess."""

    file: BinaryIO
    size: int


@asynccontextmanager
async def read_form(request: Request, fields: Container[str]) -> AsyncIterator[dict[str, Any]]:
    """The fields of a form: a text or a file, or a list of files where `name` or `name[]` comes several times.

    `fields` are those that an error may name.
    """
    if media_type(request) != "multipart/form-data":
        raise UnsupportedMediaTypeError("The body must be a form, sent with 'Content-Type: multipart/form-data'.")
    if _charset(request) not in _CHARSETS:
        raise UnsupportedMediaTypeError("A form is read as UTF-8; leave the charset out of its Content-Type.")
    try:
        form = await request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS)
    except OSError as error:  # files go to disk as they come
        raise_if_disk_is_full(error)
        raise
    except HTTPException as error:
        raise InvalidRequestError(f"The form cannot be read: {error.detail}") from error
    try:
        yield _form_fields(form, fields)
    finally:
        await form.close()


def _form_fields(form: FormData, known: Container[str]) -> dict[str, Any]:
    texts: dict[str, str] = {}
    files: dict[str, list[UploadedFile]] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name in texts or (name in files and isinstance(value, str)):
            raise InvalidRequestError(f"The field {shown(name)} appears twice.", name if name in known else None)
        if isinstance(value, str):
            texts[name] = value
        else:
            files.setdefault(name, []).append(UploadedFile(value.file, value.size or 0))
    return {**texts, **{name: several if len(several) > 1 else several[0] for name, several in files.items()}}


async def read_json(request: Request, fields: Container[str]) -> dict[str, Any]:
    """The JSON object that a request carries; `fields` are those that an error may name."""
    body = await request.body()
    # An empty body says more about what is wrong than its type, which clients then leave out.
    if body and media_type(request) != "application/json":
        raise UnsupportedMediaTypeError("The body must be JSON, sent with 'Content-Type: application/json'.")
    return await off_the_loop(functools.partial(parse_json, body, fields), len(body), quick=_QUICK_BYTES)


def _charset(request: Request) -> bytes:
    _, parameters = parse_options_header(request.headers["content-type"])
    return parameters.get(b"charset", b"utf-8").strip().lower()


def media_type(request: Request) -> str:
    """The type of a request's body, without its parameters; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(body: bytes, fields: Container[str] = ()) -> dict[str, Any]:
    """The JSON object in a body. Stricter than `json.loads`: no NaN, no key twice, nothing but UTF-8."""
    if not body:
        raise InvalidRequestError("The body is empty; it must be a JSON object.")
    unique_keys = functools.partial(_unique_keys, fields)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise InvalidRequestError("The body is not valid UTF-8.") from error
    except RecursionError as error:
        raise InvalidRequestError("The body is nested too deeply.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequestError(f"The body is not valid JSON: {error.msg} at {where}.") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidRequestError("The body holds a number with too many digits.") from error
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The body must be a JSON object, not {shown(value)}.")
    return value


def shown(value: object) -> str:
    """A value as a client wrote it, short enough for a message."""
    if isinstance(value, UploadedFile):
        return "a file"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}… ({len(text)} characters)"


def _refuse_constant(name: str) -> None:
    raise InvalidRequestError(f"{name} is not JSON: numbers must be finite.")


def _unique_keys(fields: Container[str], pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys: set[str] = set()
    for key, _ in pairs:
        if key in keys:
            raise InvalidRequestError(f"The key {shown(key)} appears twice.", key if key in fields else None)
        keys.add(key)
    return dict(pairs)
