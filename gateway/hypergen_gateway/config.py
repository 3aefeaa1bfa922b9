"""The gateway's settings. Read once at the edge, by the command line, and passed on as a value."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one gateway."""

    # Without a key everybody who reaches the port may use it. Kept out of repr, and so out of logs.
    api_key: str | None = field(default=None, repr=False)
    # The id that clients see; None: the one that the exported model carries.
    model_id: str | None = None
    # Requests that may wait for a place in Triton; the next one gets a 429.
    max_queue_size: int = 100
    # Seconds from a complete request to its pictures. OpenAI's clients give up after 600 by default.
    request_timeout: float = 600.0
    # A prompt of 32,000 characters, each written as two \uXXXX escapes, twice, fits.
    max_body_bytes: int = 1 << 20
    # Seconds that a health check waits for Triton; orchestrators' probes often give up after a few.
    probe_timeout: float = 2.0

    def __post_init__(self) -> None:
        """A setting that would quietly switch protection off is refused here rather than found out later."""
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty; leave it out to serve without one")
        if self.max_queue_size < 0:
            raise ValueError("max_queue_size is negative; 0 already means that nobody waits")
        for name in ("request_timeout", "max_body_bytes", "probe_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is not positive")
