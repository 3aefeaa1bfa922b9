"""Settings of the gateway, created by the command line and passed on as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from hypergen_gateway.generation.sizes import LONGEST_SIDE, PolicyName, SizePolicy
from hypergen_gateway.http.keys import BadKeysError, Keys
from hypergen_gateway.http.protocol import KEEP_ALIVE_SECONDS
from hypergen_gateway.options import A_WEEK, A_YEAR

MAX_QUEUE_SIZE = 1_000_000
_POSITIVE = (
    "request_timeout",
    "body_timeout",
    "keep_alive",
    "max_body_bytes",
    "max_upload_bytes",
    "max_json_upload_bytes",
    "max_lora_bytes",
    "probe_timeout",
    "heartbeat_interval",
    "link_lifetime",
)
_ZERO_MEANS = {
    "max_queue_size": "no request waits",
    "retry_grace": "generation stops at a disconnect",
    "retry_seconds": "no finished results are kept",
    "retry_bytes": "no finished results are kept",
}
# Upper bounds, as the clocks of gRPC, asyncio and the file system overflow somewhere.
_AT_MOST = {
    "request_timeout": A_WEEK,
    "body_timeout": A_WEEK,
    "keep_alive": A_WEEK,
    "probe_timeout": A_WEEK,
    "heartbeat_interval": A_WEEK,
    "retry_grace": A_WEEK,
    "retry_seconds": A_WEEK,
    "link_lifetime": A_YEAR,
    "max_queue_size": MAX_QUEUE_SIZE,
}
_MIN_SECRET_LENGTH = 16
_MAX_S3_LIFETIME = A_WEEK  # AWS signature version 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one gateway."""

    # One key or several; without any, the server is open. Not in repr, so that logs cannot show them.
    api_key: str | tuple[str, ...] | None = field(default=None, repr=False)
    # File of API keys, reloaded when it changes.
    api_key_file: Path | None = None
    # Whether /metrics requires the key, too. Metrics show how much is generated, never what.
    metrics_need_key: bool = False
    # The model id that clients see; None: that of the exported model.
    model_id: str | None = None
    # Other names by which clients can look up the model; the list of models contains its id only.
    model_aliases: tuple[str, ...] = ()
    # fit: accept any size and scale from the nearest that the model generates; strict: accept only those.
    sizes: PolicyName = "fit"
    # Largest width and height of a request; an image takes three bytes per pixel while it is encoded.
    max_side: int = 4096
    # The syntax of weights in prompts of requests that do not say; None: none. Models without weights ignore it.
    prompt_weighting: str | None = None
    # How many of CLIP's last layers are left out for requests that do not say; None: the checkpoint's own number.
    clip_skip: int | None = None
    # Whether <lora:NAME:SCALE> in a prompt selects a LoRA, as in web UIs; otherwise it is text like any other.
    prompt_loras: bool = False
    # Folder of LoRA files, and the names of the API keys that may add and remove some.
    lora_dir: Path | None = None
    lora_admins: tuple[str, ...] = ()
    # A LoRA of rank 256 for SDXL has 1.3 GB in float16; usual ones have a tenth of that.
    max_lora_bytes: int = 2 << 30
    # Requests that may wait for a slot in Triton; more get a 429.
    max_queue_size: int = 100
    # Seconds from a complete request to its images. OpenAI's clients time out after 600 by default.
    request_timeout: float = 600.0
    # Seconds that generation continues after a disconnect: OpenAI's clients retry after half a second, then one.
    retry_grace: float = 5.0
    # How long finished results are kept for clients whose response was lost, and their total size.
    retry_seconds: float = 120.0
    retry_bytes: int = 256 << 20
    # Seconds without an event after which a stream sends a comment to keep the connection alive.
    heartbeat_interval: float = 15.0
    # Websites whose scripts may use the API, such as https://app.example.com; * allows all.
    cors_origins: tuple[str, ...] = ()
    # Base URL of links to images; None: the request's Host.
    public_url: str | None = None
    # Seconds until links to images expire; OpenAI's expire after an hour.
    link_lifetime: float = 3600.0
    # Signs links. None: a random secret, so that links are valid for this process only.
    link_secret: str | None = field(default=None, repr=False)
    # Folder for linked images; None: a temporary folder that is removed at exit.
    link_folder: Path | None = None
    # s3://BUCKET/PREFIX for linked images, instead of the folder.
    link_bucket: str | None = None
    # Seconds to receive a request body, plus one per 32 KiB.
    body_timeout: float = 30.0
    # Seconds that idle connections stay open. Longer than proxies reuse theirs, usually 60: a request sent while the
    # connection closes is lost.
    keep_alive: float = KEEP_ALIVE_SECONDS
    # A prompt of 32,000 characters, each written as two \uXXXX escapes, twice, fits.
    max_body_bytes: int = 1 << 20
    # Forms are spooled to disk. Sixteen images of 50 MB would be legal, but are not realistic.
    max_upload_bytes: int = 256 << 20
    # JSON stays in memory: one image of 50 MB as base64, and little else.
    max_json_upload_bytes: int = 72 << 20
    # Seconds that a health check waits for Triton; orchestrators' probes often time out after a few.
    probe_timeout: float = 2.0

    def __post_init__(self) -> None:
        """Reject invalid settings, above all those that would silently turn off protection."""
        self._check_numbers()
        self._check_addresses()
        self._check_keys()
        if not all(alias.strip("/. ") for alias in self.model_aliases):
            raise ValueError("a model alias is empty")
        if self.link_secret is not None and len(self.link_secret) < _MIN_SECRET_LENGTH:
            raise ValueError(f"the secret for links is shorter than {_MIN_SECRET_LENGTH} characters")
        if self.link_bucket is not None and self.link_lifetime > _MAX_S3_LIFETIME:
            raise ValueError("links to a bucket last seven days at most")

    def _check_numbers(self) -> None:
        for name, meaning in _ZERO_MEANS.items():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; 0 means that {meaning}")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if not 1 <= self.max_side <= LONGEST_SIDE:
            raise ValueError(f"max_side must be from 1 to {LONGEST_SIDE:,}")
        for name, largest in _AT_MOST.items():
            if not getattr(self, name) <= largest:  # also true for NaN
                raise ValueError(f"{name} must be at most {largest}")

    def _check_keys(self) -> None:
        if self.api_keys and self.api_key_file is not None:
            raise ValueError("--api-key and --api-key-file are mutually exclusive")
        if self.lora_admins and (self.api_key_file is None or self.lora_dir is None):
            raise ValueError("--lora-admin needs --lora-dir and --api-key-file, whose keys have names")
        try:
            _ = self.keys
        except BadKeysError as error:
            file = self.api_key_file
            what = "invalid API key" if file is None else f"cannot read API keys from {file}"
            raise ValueError(f"{what}: {error}") from error

    def _check_addresses(self) -> None:
        if self.public_url is not None and not _is_url(self.public_url, "http", "https"):
            raise ValueError("the public URL must look like https://images.example.com")
        if self.link_bucket is not None and not _is_url(self.link_bucket, "s3"):
            raise ValueError("the bucket for links must look like s3://BUCKET or s3://BUCKET/PREFIX")
        if not all(origin == "*" or _is_origin(origin) for origin in self.cors_origins):
            raise ValueError("an origin for CORS must look like https://app.example.com, or be *")

    @property
    def size_policy(self) -> SizePolicy:
        """Which sizes are accepted."""
        return SizePolicy(name=self.sizes, max_side=self.max_side)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys given directly, as opposed to by file."""
        return (self.api_key,) if isinstance(self.api_key, str) else self.api_key or ()

    @cached_property
    def keys(self) -> Keys:
        """All keys. The file is opened once, as a shell's `<(…)` can be read only once."""
        return Keys(self.api_keys, self.api_key_file)

    @property
    def needs_key(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.keys)


def _is_url(text: str, *schemes: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in schemes and bool(parts.netloc) and not (parts.query or parts.fragment)


def _is_origin(text: str) -> bool:
    """Whether `text` is an origin as browsers send it: scheme, host and optional port, in lower case."""
    return _is_url(text, "http", "https") and text == "{0.scheme}://{0.netloc}".format(urlsplit(text)).lower()
