"""Links to images in a bucket, on S3 or any service with a compatible API.

boto3 finds credentials, region and endpoint in its usual places: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3, a profile, a
role. Only the links expire; images stay in the bucket until a lifecycle rule of the bucket removes them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

from hypergen_gateway.errors import InternalError
from hypergen_gateway.generation.images import FileFormat
from hypergen_gateway.storage.local import name_of

logger = logging.getLogger(__name__)

_BOTO_CONFIG = BotoConfig(
    signature_version="s3v4", connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 3}
)


class S3Links:
    """Stores files under `s3://BUCKET/PREFIX` and signs links to them, valid for `lifetime` seconds."""

    def __init__(self, url: str, *, lifetime: float) -> None:
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._lifetime = int(lifetime)
        self._secret = secrets.token_bytes(32)
        self._client: Any = boto3.session.Session().client("s3", config=_BOTO_CONFIG)

    async def publish(self, file: bytes, file_format: FileFormat, base_url: str) -> str:  # noqa: ARG002
        """Uploads the file. The link leads to the bucket, so `base_url` is ignored."""
        try:
            return await asyncio.to_thread(self._upload, file, file_format)
        except (BotoCoreError, ClientError) as error:
            raise InternalError(f"an image cannot be stored in the bucket {self._bucket!r}: {error}") from error

    async def run(self) -> None:
        """Checks the bucket at startup: otherwise an error would appear only after the first image is generated."""
        try:
            await asyncio.to_thread(self._client.head_bucket, Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            logger.warning("the bucket %r for images cannot be used: %s", self._bucket, error)

    def _upload(self, file: bytes, file_format: FileFormat) -> str:
        name = name_of(file, file_format, self._secret)
        key = f"{self._prefix}/{name}" if self._prefix else name
        place = {"Bucket": self._bucket, "Key": key}
        self._client.put_object(**place, Body=file, ContentType=file_format.media_type)
        link: str = self._client.generate_presigned_url("get_object", Params=place, ExpiresIn=self._lifetime)
        return link
