"""API keys, given directly or in a file.

Only digests are kept. The file is reloaded when it changes, so keys can be added and removed without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hypergen_gateway.http.request_id import RawHeaders

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.@-]{1,64}")
# What every client can send in a header: printable ASCII.
_SENDABLE = re.compile(r"[ -~]+")
_HEADERS = (b"authorization", b"api-key")
_MAX_FILE_BYTES = 1 << 20


class BadKeysError(Exception):
    """Invalid API keys; `str()` is the reason and never contains a key."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """An API key. Its name, if any, is for logs."""

    digest: bytes
    name: str | None = None


def parse_keys(text: str) -> list[Key]:
    """Parse a key file: `KEY` or `NAME: KEY` per line; empty lines and lines that start with # are ignored.

    Raises:
        BadKeysError: a line is malformed, or there is no key.
    """
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1)]
    keys = [_parse_line(number, words) for number, words in lines if words and not words[0].startswith("#")]
    if not keys:
        raise BadKeysError("it contains no key")
    return keys


def _parse_line(number: int, words: list[str]) -> Key:
    # The colon is required, so that a key written before its name is not mistaken for the name and logged.
    *before, key = words
    name = before[0].removesuffix(":") if before else None
    if len(before) > 1 or (name is not None and (name == before[0] or not _NAME.fullmatch(name))):
        raise BadKeysError(f"line {number} must be KEY or NAME: KEY")
    if not _SENDABLE.fullmatch(key):
        raise BadKeysError(f"line {number} contains a character that clients cannot send")
    return Key(digest=_digest(key.encode()), name=name)


def _parse_key(text: str) -> Key:
    """Parse a single key. Surrounding whitespace, such as the newline at the end of a secret, is removed."""
    key = text.strip()
    if not key:
        raise BadKeysError("it is empty; omit it to serve without a key")
    if not _SENDABLE.fullmatch(key):
        raise BadKeysError("it contains a character that clients cannot send")
    return Key(digest=_digest(key.encode()))


def presented_key(headers: RawHeaders) -> bytes | None:
    """The key in `Authorization: Bearer KEY` or, as Azure's clients send it, in `api-key: KEY`.

    None without either header; empty if malformed. `Authorization` takes precedence.
    """
    authorization, azure = ([value for each, value in headers if each == name] for name in _HEADERS)
    if authorization:
        scheme, _, key = authorization[0].partition(b" ")  # any case, any number of spaces: RFC 9110, section 11.4
        return key.strip(b" ") if len(authorization) == 1 and scheme.lower() == b"bearer" else b""
    if azure:
        return azure[0].strip() if len(azure) == 1 else b""
    return None


class Keys:
    """The currently valid API keys; empty if the server is open."""

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        """Read the keys in `given` and in `file`.

        Raises:
            BadKeysError: a key is empty or cannot be sent, or the file is unreadable or malformed.
        """
        self._given = [_parse_key(key) for key in given]
        self._from_file: list[Key] = []
        self._file = file
        self._version: tuple[int, ...] = ()
        if file is not None:
            self._version = _file_version(file)
            self._from_file = _read(file)

    def __bool__(self) -> bool:
        """Whether requests need a key."""
        return bool(self._given or self._from_file)

    def find(self, given: bytes) -> Key | None:
        """The valid key that equals `given`; None if there is none.

        Takes constant time: digests of equal length are compared, and always all of them.
        """
        self._reload_if_changed()
        digest, found = _digest(given), None
        for key in (*self._given, *self._from_file):
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def _reload_if_changed(self) -> None:
        """Reload a changed file; if it is invalid, keep the previous keys."""
        if self._file is None:
            return
        version = _file_version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._from_file = _read(self._file)
        except BadKeysError as error:
            logger.error("%s has changed but is invalid, keeping the previous API keys: %s", self._file, error)
        else:
            logger.info("%s has changed: loaded %d API keys", self._file, len(self._from_file))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _file_version(file: Path) -> tuple[int, ...]:
    """Identifies a version of a file; empty if there is none, and for a pipe, which can be read only once."""
    try:
        status = file.stat()
    except OSError:
        return ()
    if not stat.S_ISREG(status.st_mode):
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(file: Path) -> list[Key]:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise BadKeysError("it is larger than a megabyte")
        return parse_keys(content.decode("utf-8-sig"))  # Windows editors add a byte order mark
    except OSError as error:
        raise BadKeysError(str(error.strerror)) from error
    except UnicodeDecodeError as error:
        raise BadKeysError("it is not text in UTF-8") from error
