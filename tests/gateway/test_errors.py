"""The tree of errors, against what OpenAI's clients read."""

from __future__ import annotations

import pytest

from hypergen_gateway import errors


def every_class(root: type[errors.HyperGenError]) -> list[type[errors.HyperGenError]]:
    return [root, *(found for child in root.__subclasses__() for found in every_class(child))]


@pytest.mark.parametrize("cls", every_class(errors.HyperGenError))
def test_every_class_knows_an_error_status_and_a_type(cls: type[errors.HyperGenError]) -> None:
    assert 400 <= cls.status < 600
    assert cls.type == ("server_error" if cls.status >= 499 else cls.type)
    assert cls.__doc__


def test_the_body_has_openai_s_four_keys() -> None:
    error = errors.InvalidRequestError("n is wrong", "n")
    assert error.body == {
        "error": {"message": "n is wrong", "type": "invalid_request_error", "param": "n", "code": None}
    }


@pytest.mark.parametrize(
    ("seconds", "retry_after", "retry_after_ms"), [(1.0, "1", "1000"), (0.2, "1", "200"), (3.0004, "4", "3001")]
)
def test_a_retryable_error_says_when_in_whole_seconds_and_in_milliseconds(
    seconds: float, retry_after: str, retry_after_ms: str
) -> None:
    error = errors.QueueFullError("full", seconds)
    assert error.headers == {"Retry-After": retry_after, "retry-after-ms": retry_after_ms}


def test_an_internal_error_tells_the_log_what_it_hides_from_the_client() -> None:
    error = errors.InternalError("/srv/secret: broken")
    assert str(error) == "/srv/secret: broken"
    assert "secret" not in str(error.body)
