"""Links to pictures: signed, good for a while, and worthless afterwards.

Knows how a link is signed and a local folder from which its file is served. A link is a capability: who has it may
read that one picture without a key, until it expires. Another place for the files is in `s3`.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode

from hypergen_gateway.errors import LinkExpiredError, NotFoundError
from hypergen_gateway.generation.images import FileFormat

logger = logging.getLogger(__name__)

FILES_PATH = "/files"
FILE_HEADERS = {
    # The styles are a browser's own, with which it shows a picture by itself.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox",
    # Who has the link may show the picture.
    "Cross-Origin-Resource-Policy": "cross-origin",
}

# What we name files: nothing else reaches the file system, and the dot is no way up.
_NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")
_CLEANING_SECONDS = 60.0
# A file that is being written bears the time of now until it bears that of its end.
_WRITING_SECONDS = 60.0


def name_of(file: bytes, file_format: FileFormat, secret: bytes) -> str:
    """The name of a picture's file: the same whenever it is published, and not to be guessed without the secret."""
    digest = hmac.digest(secret, file, "sha256")[:24]
    return f"{base64.urlsafe_b64encode(digest).decode()}.{file_format.name}"


class Links(Protocol):
    """Where pictures are kept for clients that asked for a link."""

    async def publish(self, file: bytes, file_format: FileFormat, base_url: str) -> str:
        """Keeps a file, once however often it is published, and gives a link to it.

        `base_url` is where the client reaches this server.
        """
        ...

    async def run(self) -> None:
        """Tidies up until it is cancelled."""
        ...


@dataclass(frozen=True)
class StoredFile:
    """A picture's file as it is served; `seconds_left` is how long its link is still good."""

    content: bytes
    media_type: str
    seconds_left: int


class LocalLinks:
    """Keeps files in a folder, with the end of its life as each one's time of modification.

    Servers may share a folder: each removes whatever has expired. They open each other's links if they share `secret`.
    """

    def __init__(self, folder: Path | None, *, lifetime: float, secret: str | None = None) -> None:
        """Without a folder, a temporary one is made when it is needed; it goes with this object."""
        self._given_folder = folder
        self._lifetime = lifetime
        self._secret = secrets.token_bytes(32) if secret is None else secret.encode()

    @functools.cached_property
    def _folder(self) -> Path:
        if self._given_folder is not None:
            return self._given_folder
        folder = tempfile.mkdtemp(prefix="hypergen-links-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    async def publish(self, file: bytes, file_format: FileFormat, base_url: str) -> str:
        """Writes the file, readable by this user alone."""
        expires = int(time.time() + self._lifetime)
        name = await asyncio.to_thread(self._write, self._folder, file, file_format, self._secret, expires)
        query = urlencode({"expires": expires, "signature": self._sign(name, str(expires))})
        return f"{base_url.rstrip('/')}{FILES_PATH}/{name}?{query}"

    async def read(self, name: str, expires: str, signature: str) -> StoredFile:
        """The file behind a link.

        Raises:
            NotFoundError: no such link was ever given.
            LinkExpiredError: it was, and its time is over.
        """
        # The signature comes first: who cannot sign learns nothing, not even which files there are.
        if not hmac.compare_digest(self._sign(name, expires).encode(), signature.encode()) or not _NAME.fullmatch(name):
            raise NotFoundError("There is no such file. Links are used as they came, with their whole query.")
        seconds_left = int(expires) - int(time.time())
        if seconds_left <= 0:
            raise LinkExpiredError("This link has expired. Make the picture again; its seed gives the same one.")
        try:
            content = await asyncio.to_thread((self._folder / name).read_bytes)
        except FileNotFoundError as error:
            raise LinkExpiredError("The file of this link has been removed.") from error
        return StoredFile(content, FileFormat(name.partition(".")[2]).media_type, seconds_left)  # type: ignore[arg-type]

    async def run(self) -> None:
        """Removes expired files, those of earlier lives of the server included."""
        while True:
            try:
                await asyncio.to_thread(self._remove_expired)
            except OSError as error:
                logger.warning("expired pictures cannot be removed: %s", error)
            await asyncio.sleep(_CLEANING_SECONDS)

    def _sign(self, name: str, expires: str) -> str:
        digest = hmac.digest(self._secret, f"{name}\n{expires}".encode(), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    @staticmethod
    def _write(folder: Path, file: bytes, file_format: FileFormat, secret: bytes, expires: int) -> str:
        """The name that it has then."""
        name = name_of(file, file_format, secret)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Its links may be open already: nobody reads half a picture. It is tidied up, too, if it stays behind.
        part = folder / f"{secrets.token_urlsafe(24)}.{file_format.name}"
        part.touch(mode=0o600, exist_ok=False)
        try:
            part.write_bytes(file)
            os.utime(part, (expires, expires))
            part.replace(folder / name)
        except OSError:
            part.unlink()  # half a picture is in the way of the next
            raise
        return name

    def _remove_expired(self) -> None:
        if not self._folder.is_dir():
            return
        for entry in os.scandir(self._folder):
            if _NAME.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _WRITING_SECONDS:
                Path(entry).unlink(missing_ok=True)
