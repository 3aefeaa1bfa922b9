"""Who may use the server: its API keys, as they were given or as a file holds them, and whose key a request carries.

Keeps digests rather than keys. A file is read again when it changes, so keys come and go without a restart.
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
# What every client can put into a header: printing ASCII.
_SENDABLE = re.compile(r"[ -~]+")
_HEADERS = (b"authorization", b"api-key")
_LARGEST_FILE = 1 << 20


class BadKeysError(Exception):
    """Keys that cannot be used; `str()` says why and never holds any of them."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key. Its name, if it has one, is for the log."""

    digest: bytes
    name: str | None = None


def parse_keys(text: str) -> list[Key]:
    """The keys in a file: `KEY` or `NAME: KEY` a line, where empty lines and those that begin with # say nothing.

    Raises:
        BadKeysError: a line is neither, or there is no key at all.
    """
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1)]
    keys = [_parse_line(number, words) for number, words in lines if words and not words[0].startswith("#")]
    if not keys:
        raise BadKeysError("it holds no key")
    return keys


def _parse_line(number: int, words: list[str]) -> Key:
    # The colon keeps a key that was written before its name from being taken for the name, and so from the log.
    *before, key = words
    name = before[0].removesuffix(":") if before else None
    if len(before) > 1 or (name is not None and (name == before[0] or not _NAME.fullmatch(name))):
        raise BadKeysError(f"line {number} is neither KEY nor NAME: KEY")
    if not _SENDABLE.fullmatch(key):
        raise BadKeysError(f"line {number} holds a character that clients cannot send")
    return Key(digest=_digest(key.encode()), name=name)


def _parse_given(text: str) -> Key:
    """A key that was given alone. White space around it, as the last line of a secret may leave, is not part of it."""
    key = text.strip()
    if not key:
        raise BadKeysError("it is empty; leave it out to serve without")
    if not _SENDABLE.fullmatch(key):
        raise BadKeysError("it holds a character that clients cannot send")
    return Key(digest=_digest(key.encode()))


def presented_key(headers: RawHeaders) -> bytes | None:
    """The key in `Authorization: Bearer KEY` or, as Azure's clients send it, in `api-key: KEY`.

    None where neither header is there; empty where it is malformed. If both are there, `Authorization` counts.
    """
    authorization, azure = ([value for each, value in headers if each == name] for name in _HEADERS)
    if authorization:
        scheme, _, key = authorization[0].partition(b" ")  # any case, any number of spaces: RFC 9110, section 11.4
        return key.strip(b" ") if len(authorization) == 1 and scheme.lower() == b"bearer" else b""
    if azure:
        return azure[0].strip() if len(azure) == 1 else b""
    return None


class Keys:
    """The keys that are good now; without any, nobody is asked for one."""

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        """Those that are given and those in the file, which is read at once.

        Raises:
            BadKeysError: one is empty or cannot be sent, or the file cannot be read as keys.
        """
        self._given = [_parse_given(key) for key in given]
        self._from_file: list[Key] = []
        self._file = file
        self._stamp: tuple[int, ...] = ()
        if file is not None:
            self._stamp = _stamp(file)
            self._from_file = _read(file)

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._given or self._from_file)

    def find(self, given: bytes) -> Key | None:
        """The key that a request carries, None if it is none of ours.

        Takes the same time for every wrong one: what are compared are digests of one length, and all of them.
        """
        self._follow_file()
        digest, found = _digest(given), None
        for key in (*self._given, *self._from_file):
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def _follow_file(self) -> None:
        """Takes over what a changed file holds; from one that cannot be read nothing, so the keys stay as they were."""
        if self._file is None:
            return
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._from_file = _read(self._file)
        except BadKeysError as error:
            logger.error("%s has changed, and the API keys stay as they were: %s", self._file, error)
        else:
            logger.info("%s has changed: %d API keys are good now", self._file, len(self._from_file))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _stamp(file: Path) -> tuple[int, ...]:
    """What tells one state of a file from another; empty while there is none, and of a pipe, which is read but once."""
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
            content = opened.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise BadKeysError("it is larger than a megabyte")
        return parse_keys(content.decode("utf-8-sig"))  # Windows' editors mark their files
    except OSError as error:
        raise BadKeysError(str(error.strerror)) from error
    except UnicodeDecodeError as error:
        raise BadKeysError("it is not text in UTF-8") from error
