"""The gateway's settings. Read once at the edge, by the command line, and passed on as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from hypergen_gateway.generation.sizes import LONGEST_SIDE, PolicyName, SizePolicy
from hypergen_gateway.http.keys import BadKeysError, Keys
from hypergen_gateway.http.protocol import KEEP_ALIVE_SECONDS
from hypergen_gateway.options import A_WEEK, A_YEAR

MOST_WAITING = 1_000_000
_POSITIVE = (
    "request_timeout",
    "body_timeout",
    "keep_alive",
    "max_body_bytes",
    "max_upload_bytes",
    "max_json_upload_bytes",
    "probe_timeout",
    "heartbeat_interval",
    "link_lifetime",
)
_ZERO_MEANS = {
    "max_queue_size": "nobody waits",
    "retry_grace": "work ends with its client",
    "retry_seconds": "nothing finished is kept",
    "retry_bytes": "nothing finished is kept",
}
# No clock holds for ever: gRPC's, asyncio's and the file system's end somewhere, and nobody waits for longer.
_AT_MOST = {
    "request_timeout": A_WEEK,
    "body_timeout": A_WEEK,
    "keep_alive": A_WEEK,
    "probe_timeout": A_WEEK,
    "heartbeat_interval": A_WEEK,
    "retry_grace": A_WEEK,
    "retry_seconds": A_WEEK,
    "link_lifetime": A_YEAR,
    "max_queue_size": MOST_WAITING,
}
_SHORTEST_SECRET = 16
_LONGEST_S3_LIFETIME = A_WEEK  # of a signature of version 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one gateway."""

    # One key or several; without any, everybody who reaches the port may use it. Kept out of repr, and so out of logs.
    api_key: str | tuple[str, ...] | None = field(default=None, repr=False)
    # A file with more of them, which is read again when it changes.
    api_key_file: Path | None = None
    # Whether /metrics asks for the key, too. Scrapers come without one, and learn how much is drawn, never what.
    metrics_need_key: bool = False
    # The id that clients see; None: the one that the exported model carries.
    model_id: str | None = None
    # Other names under which clients look the model up; the list of models has its id alone.
    model_aliases: tuple[str, ...] = ()
    # fit: any size may be asked for, and is scaled from the nearest that the model draws; strict: only those it draws.
    sizes: PolicyName = "fit"
    # Pixels a side that may be asked for; an image is three bytes a pixel while it is made into a file.
    max_side: int = 4096
    # Requests that may wait for a place in Triton; the next one gets a 429.
    max_queue_size: int = 100
    # Seconds from a complete request to its pictures. OpenAI's clients give up after 600 by default.
    request_timeout: float = 600.0
    # Seconds work goes on for a client that may come back for it: OpenAI's clients do after half a second, then one.
    retry_grace: float = 5.0
    # Finished work is kept for a client whose answer was lost: this many seconds, and bytes of all of it together.
    retry_seconds: float = 120.0
    retry_bytes: int = 256 << 20
    # Quiet seconds in a stream after which a comment shows that the server is still there.
    heartbeat_interval: float = 15.0
    # Websites whose scripts may use the API, such as https://app.example.com; * is every website.
    cors_origins: tuple[str, ...] = ()
    # Where clients reach this server, for links; None: where the request came to.
    public_url: str | None = None
    # Seconds that a link to a picture is good for; OpenAI's are good for an hour.
    link_lifetime: float = 3600.0
    # Signs links. None: a random one, so that links end with the process and no other server opens them.
    link_secret: str | None = field(default=None, repr=False)
    # Where pictures with links are kept; None: a temporary folder that goes with the process.
    link_folder: Path | None = None
    # s3://BUCKET/PREFIX to keep them there instead.
    link_bucket: str | None = None
    # Seconds for a body to arrive, and one more for each 32 KiB of it.
    body_timeout: float = 30.0
    # Seconds that an idle connection is kept. Proxies reuse theirs for 60 or so: one that is closed under a request
    # loses it.
    keep_alive: float = KEEP_ALIVE_SECONDS
    # A prompt of 32,000 characters, each written as two \uXXXX escapes, twice, fits.
    max_body_bytes: int = 1 << 20
    # A form with images goes to disk as it comes. Sixteen images of 50 MB would be legal; nobody sends those.
    max_upload_bytes: int = 256 << 20
    # JSON stays in memory: one image of 50 MB as base64, and little else.
    max_json_upload_bytes: int = 72 << 20
    # Seconds that a health check waits for Triton; orchestrators' probes often give up after a few.
    probe_timeout: float = 2.0

    def __post_init__(self) -> None:
        """A setting that would quietly switch protection off is refused here rather than found out later."""
        self._check_numbers()
        self._check_addresses()
        self._check_keys()
        if not all(alias.strip("/. ") for alias in self.model_aliases):
            raise ValueError("an alias of the model is empty")
        if self.link_secret is not None and len(self.link_secret) < _SHORTEST_SECRET:
            raise ValueError(f"the secret for links is shorter than {_SHORTEST_SECRET} characters")
        if self.link_bucket is not None and self.link_lifetime > _LONGEST_S3_LIFETIME:
            raise ValueError("links into a bucket are good for seven days at most")

    def _check_numbers(self) -> None:
        for name, meaning in _ZERO_MEANS.items():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is negative; 0 already means that {meaning}")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is not positive")
        if not 1 <= self.max_side <= LONGEST_SIDE:
            raise ValueError(f"max_side is not from 1 to {LONGEST_SIDE:,}")
        for name, largest in _AT_MOST.items():
            if not getattr(self, name) <= largest:  # of NaN, both are false
                raise ValueError(f"{name} is above {largest}")

    def _check_keys(self) -> None:
        if self.api_keys and self.api_key_file is not None:
            raise ValueError("API keys and a file of them exclude each other: --api-key and --api-key-file")
        try:
            _ = self.keys
        except BadKeysError as error:
            file = self.api_key_file
            what = "an API key cannot be used" if file is None else f"the API keys cannot be read from {file}"
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
        """Which sizes a request may ask for."""
        return SizePolicy(name=self.sizes, max_side=self.max_side)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys that were given."""
        return (self.api_key,) if isinstance(self.api_key, str) else self.api_key or ()

    @cached_property
    def keys(self) -> Keys:
        """All of them. A file is read once, as what a shell writes `<(…)` can be."""
        return Keys(self.api_keys, self.api_key_file)

    @property
    def needs_key(self) -> bool:
        """Whether clients are asked for a key."""
        return bool(self.keys)


def _is_url(text: str, *schemes: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme in schemes and bool(parts.netloc) and not (parts.query or parts.fragment)


def _is_origin(text: str) -> bool:
    """Whether browsers call a website so: scheme, host and perhaps a port, in small letters."""
    return _is_url(text, "http", "https") and text == "{0.scheme}://{0.netloc}".format(urlsplit(text)).lower()
