"""Parsing of request bodies, JSON and multipart forms, to plain Python values.

Does not depend on the meaning of any field.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from hypergen_gateway.concurrency import run_in_thread_if_large
from hypergen_gateway.errors import (
    InvalidRequestError,
    MalformedRequestError,
    UnsupportedEncodingError,
    UnsupportedMediaTypeError,
)

# Parsing this much takes a tenth of a millisecond; a base64 image takes a good part of a second.
_QUICK_BYTES = 128 << 10
# A legal form has at most 17 files and about 20 fields.
_MAX_FILES = 32
_MAX_FIELDS = 100
# Starlette would accept any Python codec; some are slow, and some are not character encodings at all.
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii"})

# Clients may or may not number the files of a field: image[0], image[].
_INDEX = re.compile(r"\[[0-9]*\]$")


@dataclass(frozen=True, eq=False)
class UploadedFile:
    """A file uploaded in a form, open while the request is read.

    The name and media type are not kept: they are the client's guess.
    """

    file: BinaryIO
    size: int


class _FormParser(MultiPartParser):
    """Starlette's parser, made strict: by itself it accepts truncated forms, and texts that are not valid UTF-8."""

    def __init__(self, request: Request, fields: Container[str]) -> None:
        super().__init__(request.headers, request.stream(), max_files=_MAX_FILES, max_fields=_MAX_FIELDS)
        self._fields = fields
        self._is_whole = False

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Called with a chunk of a text or file."""
        text = self._current_part
        if text.file is None and len(text.data) + end - start > self.max_part_size:
            raise self._not_a_text(f"a text of more than {self.max_part_size:,} bytes")
        super().on_part_data(data, start, end)

    def on_part_end(self) -> None:
        """Called at the end of a text or file."""
        if self._current_part.file is None:
            try:
                self._current_part.data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._not_a_text("not valid UTF-8") from error
        super().on_part_end()

    def on_end(self) -> None:
        """Called at the closing boundary."""
        self._is_whole = True

    async def parse(self) -> FormData:
        """Parses the form.

        Raises:
            InvalidRequestError: the body is not a form, or it is truncated.
        """
        try:
            form = await super().parse()
        except MultiPartException as error:
            raise InvalidRequestError(f"The form cannot be read: {error.message}") from error
        if not self._is_whole:
            # Closing the files of `form` is not enough: the truncated file has not been added to it yet.
            for file in self._files_to_close_on_error:
                file.close()
            raise MalformedRequestError(
                "The form ends before its last boundary. A Content-Length counts bytes, not characters."
            )
        return form

    def _not_a_text(self, problem: str) -> InvalidRequestError:
        name = _INDEX.sub("", self._current_part.field_name)
        return InvalidRequestError(
            f"{_named(name, self._fields)} is {problem}. "
            "A part of a form is a file if its Content-Disposition has a filename.",
            name if name in self._fields else None,
        )


@asynccontextmanager
async def read_form(request: Request, fields: Container[str]) -> AsyncIterator[dict[str, Any]]:
    """The fields of a form: a text or a file each, or a list of files if `name`, `name[]` or `name[0]` is repeated.

    Fields left empty are absent: browsers send them as an empty text, or as a file without name and content. `fields`
    are the names that an error may report.
    """
    if media_type(request) != "multipart/form-data":
        raise UnsupportedMediaTypeError("The body must be a form, sent with 'Content-Type: multipart/form-data'.")
    if _charset(request) not in _CHARSETS:
        raise UnsupportedMediaTypeError("Forms must be UTF-8; omit the charset from the Content-Type.")
    _refuse_encoded(request)
    form = await _FormParser(request, fields).parse()
    try:
        yield _form_fields(form, fields)
    finally:
        await form.close()


def _form_fields(form: FormData, known: Container[str]) -> dict[str, Any]:
    texts: dict[str, str] = {}
    files: dict[str, list[UploadedFile]] = {}
    for key, value in form.multi_items():
        if _is_absent(value):
            continue
        name = _INDEX.sub("", key)
        if name in texts or (name in files and isinstance(value, str)):
            raise InvalidRequestError(f"The field {shown(name)} appears twice.", name if name in known else None)
        if isinstance(value, str):
            texts[name] = value
        else:
            files.setdefault(name, []).append(UploadedFile(value.file, value.size or 0))
    return {**texts, **{name: several if len(several) > 1 else several[0] for name, several in files.items()}}


def _is_absent(value: str | UploadFile) -> bool:
    return not value if isinstance(value, str) else not (value.filename or value.size)


async def read_json(request: Request, fields: Container[str]) -> dict[str, Any]:
    """The JSON object in a request's body; `fields` are the names that an error may report."""
    body = await request.body()
    # Clients omit the Content-Type of an empty body, and the empty body is the more helpful error.
    if body and media_type(request) != "application/json":
        raise UnsupportedMediaTypeError("The body must be JSON, sent with 'Content-Type: application/json'.")
    _refuse_encoded(request)
    return await run_in_thread_if_large(functools.partial(parse_json, body, fields), len(body), quick=_QUICK_BYTES)


def _charset(request: Request) -> bytes:
    _, parameters = parse_options_header(request.headers["content-type"])
    return parameters.get(b"charset", b"utf-8").strip().lower()


def _refuse_encoded(request: Request) -> None:
    coding = request.headers.get("content-encoding", "")
    if coding.lower() not in ("", "identity"):
        raise UnsupportedEncodingError(
            f"Content-Encoding {shown(coding)} is not supported; send the body uncompressed."
        )


def media_type(request: Request) -> str:
    """The media type of a request's body, without parameters; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(body: bytes, fields: Container[str] = ()) -> dict[str, Any]:
    """The JSON object in a body, which may begin with a byte order mark.

    Stricter than `json.loads`: NaN, duplicate keys, encodings other than UTF-8 and lone surrogates are errors, so every
    value that is read can be encoded again.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    if not body:
        raise InvalidRequestError("The body is empty; it must be a JSON object.")
    unique_keys = functools.partial(_unique_keys, fields)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        if error.end == len(body) and error.reason == "unexpected end of data":
            raise _cut("in the middle of a character") from error
        raise InvalidRequestError("The body is not valid UTF-8.") from error
    except RecursionError as error:
        raise InvalidRequestError("The body is nested too deeply.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
            raise _cut(f"{error.msg} at {where}") from error
        raise InvalidRequestError(f"The body is not valid JSON: {error.msg} at {where}.") from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise InvalidRequestError("The body contains a number with too many digits.") from error
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The body must be a JSON object, not {shown(value)}.")
    if b"\\ud" in body.lower():  # only such an escape produces a lone surrogate
        _refuse_half_characters(value, fields)
    return value


def _cut(where: str) -> MalformedRequestError:
    return MalformedRequestError(
        f"The body is not valid JSON: it ends too early ({where}). A Content-Length counts bytes, not characters."
    )


def _refuse_half_characters(value: dict[str, Any], fields: Container[str]) -> None:
    for name, item in value.items():
        try:
            json.dumps([name, item], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{_named(name, fields)} contains half a character: an unpaired surrogate, "
                "which is left when a text is cut inside an emoji.",
                name if name in fields else None,
            ) from error


def shown(value: object) -> str:
    """A value as the client wrote it, shortened for an error message."""
    if isinstance(value, UploadedFile):
        return "a file"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}… ({len(text)} characters)"


def _named(name: str, fields: Container[str]) -> str:
    """A field's name for an error message; an unknown name is shown like any other value of the client's."""
    return f"'{name}'" if name in fields else shown(name)


def _refuse_constant(name: str) -> None:
    raise InvalidRequestError(f"{name} is not JSON: numbers must be finite.")


def _unique_keys(fields: Container[str], pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys: set[str] = set()
    for key, _ in pairs:
        if key in keys:
            raise InvalidRequestError(f"The key {shown(key)} appears twice.", key if key in fields else None)
        keys.add(key)
    return dict(pairs)
