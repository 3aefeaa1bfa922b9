"""Signed, expiring links to images, and a local folder from which they are served.

A link is a capability: it gives access to one image without an API key, until it expires. The module `s3` stores the
images in a bucket instead.
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
    # The inline styles are the browser's own, for showing an image on a page by itself.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox",
    # Any website with the link may embed the image.
    "Cross-Origin-Resource-Policy": "cross-origin",
}

# Only names of this form reach the file system, and none of them leads out of the folder.
_NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")
_CLEANING_SECONDS = 60.0
# While a file is being written, its modification time is the current time and not yet the time at which it expires.
_WRITING_SECONDS = 60.0


def name_of(file: bytes, file_format: FileFormat, secret: bytes) -> str:
    """The file name of an image: the same each time it is published, and unguessable without the secret."""
    digest = hmac.digest(secret, file, "sha256")[:24]
    return f"{base64.urlsafe_b64encode(digest).decode()}.{file_format.name}"


class Links(Protocol):
    """Storage for images that clients request as links."""

    async def publish(self, file: bytes, file_format: FileFormat, base_url: str) -> str:
        """Stores a file and returns a link to it. A file that is published again is stored once.

        `base_url` is this server's address as the client sees it.
        """
        ...

    async def run(self) -> None:
        """Background work, such as removing expired files. Cancelled at shutdown."""
        ...


@dataclass(frozen=True)
class StoredFile:
    """An image file as it is served; its link is valid for another `seconds_left` seconds."""

    content: bytes
    media_type: str
    seconds_left: int


class LocalLinks:
    """Stores files in a folder. The modification time of a file is the time at which it expires.

    Servers may share a folder: each removes any expired file. They accept each other's links if they share `secret`.
    """

    def __init__(self, folder: Path | None, *, lifetime: float, secret: str | None = None) -> None:
        """Without a folder, a temporary one is created on first use and removed with this object."""
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
        """Writes the file, readable only by this user."""
        expires = int(time.time() + self._lifetime)
        name = await asyncio.to_thread(self._write, self._folder, file, file_format, self._secret, expires)
        query = urlencode({"expires": expires, "signature": self._sign(name, str(expires))})
        return f"{base_url.rstrip('/')}{FILES_PATH}/{name}?{query}"

    async def read(self, name: str, expires: str, signature: str) -> StoredFile:
        """The file behind a link.

        Raises:
            NotFoundError: no such link was issued.
            LinkExpiredError: the link has expired.
        """
        # The signature is checked first: without a valid one, a client learns nothing, not even which files exist.
        if not hmac.compare_digest(self._sign(name, expires).encode(), signature.encode()) or not _NAME.fullmatch(name):
            raise NotFoundError("File not found. Use links unchanged, with their complete query string.")
        seconds_left = int(expires) - int(time.time())
        if seconds_left <= 0:
            raise LinkExpiredError(
                "This link has expired. Generate the image again: the same seed gives the same image."
            )
        try:
            content = await asyncio.to_thread((self._folder / name).read_bytes)
        except FileNotFoundError as error:
            raise LinkExpiredError("The file of this link has been removed.") from error
        return StoredFile(content, FileFormat(name.partition(".")[2]).media_type, seconds_left)  # type: ignore[arg-type]

    async def run(self) -> None:
        """Removes expired files, including those of earlier runs of the server."""
        while True:
            try:
                await asyncio.to_thread(self._remove_expired)
            except OSError as error:
                logger.warning("expired images cannot be removed: %s", error)
            await asyncio.sleep(_CLEANING_SECONDS)

    def _sign(self, name: str, expires: str) -> str:
        digest = hmac.digest(self._secret, f"{name}\n{expires}".encode(), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    @staticmethod
    def _write(folder: Path, file: bytes, file_format: FileFormat, secret: bytes, expires: int) -> str:
        """Writes the file and returns its name."""
        name = name_of(file, file_format, secret)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link to the final name may be in use already, and must not serve a partial image. The temporary name matches
        # `_NAME`, so a file that is left behind is removed, too.
        part = folder / f"{secrets.token_urlsafe(24)}.{file_format.name}"
        part.touch(mode=0o600, exist_ok=False)
        try:
            part.write_bytes(file)
            os.utime(part, (expires, expires))
            part.replace(folder / name)
        except OSError:
            part.unlink()  # the disk may be full, and a partial image would take up space
            raise
        return name

    def _remove_expired(self) -> None:
        if not self._folder.is_dir():
            return
        for entry in os.scandir(self._folder):
            if _NAME.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _WRITING_SECONDS:
                Path(entry).unlink(missing_ok=True)
