"""Every error that a client can see, as one class hierarchy.

A class defines its HTTP status, the type and code that OpenAI's clients expect, and its headers. One middleware turns
raised errors into responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar


class HyperGenError(Exception):
    """The base class. `message` is sent to the client, so it never contains a path, a key or a traceback."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def headers(self) -> Mapping[str, str]:
        """The additional headers of the response."""
        return {}

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The body of the response, in OpenAI's format."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(HyperGenError):
    """The request is invalid; `param` names the field."""

    status = 400
    type = "invalid_request_error"


class IdempotencyKeyReusedError(InvalidRequestError):
    """The key was used for another request. Not a 409, which OpenAI's clients would retry."""

    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used for a different request. Use a new key for each request.")


class AuthenticationError(InvalidRequestError):
    """The API key is missing, malformed or wrong."""

    status = 401
    code = "invalid_api_key"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class PermissionDeniedError(InvalidRequestError):
    """The API key is valid, but does not have this right."""

    status = 403
    code = "permission_denied"


class CrossSiteError(InvalidRequestError):
    """A website that may not use this server sent a request through a visitor's browser."""

    status = 403
    code = "cross_site_request"

    def __init__(self) -> None:
        super().__init__(
            "This server rejects requests from other websites. Its operator can allow a website with --cors-origin; if "
            "the website is the server itself, --public-url must be its address."
        )


class PreflightError(InvalidRequestError):
    """A CORS preflight is rejected: the website's script may not send this request."""

    code = "cross_site_request"

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}. This server's operator can allow a website with --cors-origin.")


class NotFoundError(InvalidRequestError):
    """The route or resource does not exist."""

    status = 404
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """The requested model is not the one that is served."""

    code = "model_not_found"


class LinkExpiredError(NotFoundError):
    """A link to an image that has expired."""

    status = 410
    code = "link_expired"


class MethodNotAllowedError(InvalidRequestError):
    """The route exists, but not for this method."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Allow": self.allow}


class RequestTimeoutError(InvalidRequestError):
    """The request did not arrive in time. The connection is closed, as the rest of the request may still arrive."""

    status = 408
    code = "request_timeout"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Connection": "close"}


class BodyTooLargeError(InvalidRequestError):
    """The body is larger than the server accepts."""

    status = 413
    code = "request_too_large"


class AddressTooLongError(InvalidRequestError):
    """The path and query are longer than any route needs."""

    status = 414
    code = "uri_too_long"


class HeadTooLargeError(InvalidRequestError):
    """The headers are more, or longer, than any client needs."""

    status = 431
    code = "headers_too_large"

    def __init__(self) -> None:
        super().__init__("The headers are too large: at most 100 headers and 32 KiB in total are accepted.")


class MalformedRequestError(InvalidRequestError):
    """The request is truncated, or another server may parse it differently, as in request smuggling.

    The connection is closed after the response, as any further bytes cannot be trusted.
    """

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Connection": "close"}


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body's media type is not accepted by the route."""

    status = 415
    code = "unsupported_media_type"


class UnsupportedEncodingError(UnsupportedMediaTypeError):
    """The body is compressed."""

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Accept-Encoding": "identity"}


class RetryableError(HyperGenError):
    """The same request may succeed later; `retry_after` is the wait in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        return {
            "Retry-After": str(math.ceil(self.retry_after)),
            "retry-after-ms": str(math.ceil(self.retry_after * 1000)),
        }


class QueueFullError(RetryableError):
    """The queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class DeadlineTooShortError(QueueFullError):
    """The images would be too late. `retry_after` is None if even an idle server could not generate them in time."""

    code = "deadline_too_short"

    def __init__(self, expected: float, deadline: float, retry_after: float | None) -> None:
        even = " even on an idle server" if retry_after is None else ""
        message = f"The images would take about {expected:.3g} s{even}, and the request allows {deadline:.3g} s."
        super().__init__(message, retry_after or 0.0)
        self.could_be_met = retry_after is not None

    @property
    def headers(self) -> Mapping[str, str]:
        return super().headers if self.could_be_met else {"x-should-retry": "false"}


class ClientClosedRequestError(HyperGenError):
    """The client disconnected before the response was ready. The response is never read; the status is for the log."""

    status = 499
    code = "client_closed_request"


class InternalError(HyperGenError):
    """An error of the server. `detail` goes to the log and is never sent to the client."""

    code = "internal_error"

    def __init__(self, detail: str) -> None:
        super().__init__(
            "The server had an error while processing the request. Its log has the details under the request id."
        )
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class NonFiniteImageError(HyperGenError):
    """The model computed infinities or NaN for this image. A retry of the same request would fail again."""

    code = "image_not_finite"

    def __init__(self) -> None:
        super().__init__(
            "The model computed values that are not finite, so there is no image. "
            "Another scheduler, guidance_scale or LoRA scale may help."
        )

    @property
    def headers(self) -> Mapping[str, str]:
        return {"x-should-retry": "false"}


class UnavailableError(RetryableError):
    """Triton, or a model that it should serve, is not ready. `detail` is the reason, for the operator only."""

    status = 503
    code = "service_unavailable"

    def __init__(self, message: str, retry_after: float = 1.0, *, detail: str = "") -> None:
        super().__init__(message, retry_after)
        self.detail = detail


class StorageFullError(HyperGenError):
    """The disk for images or uploads is full."""

    status = 507
    code = "insufficient_storage"


class DeadlineExceededError(HyperGenError):
    """The images were not ready in time."""

    status = 504
    code = "timeout"
