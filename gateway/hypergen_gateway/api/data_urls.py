"""Files in a JSON body: data URLs and base64, decoded as browsers do (WHATWG's Fetch and Infra standards)."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

_SCHEME = "data:"
_BASE64 = re.compile(r";[ ]*base64[ \t\n\f\r]*", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_WHITE_SPACE = "\t\n\f\r "


def file_in(text: str) -> bytes:
    """The content of a data URL, or of bare base64.

    Raises:
        ValueError: the text is neither; `str()` completes "It …".
    """
    text = text.strip(_WHITE_SPACE)
    if text[: len(_SCHEME)].lower() == _SCHEME:
        return _content(text[len(_SCHEME) :])
    if _URL.match(text):
        raise ValueError("must be a data URL, 'data:image/png;base64,…'. URLs are never fetched")
    if not text:
        raise ValueError("is empty")
    return _from_base64(text)


def _content(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("has no comma between the head of its data URL and the data")
    content = unquote_to_bytes(body) if "%" in body else body.encode()
    # Only the part after the last semicolon is matched: a head may be as long as the body.
    is_base64 = _BASE64.fullmatch(head, max(head.rfind(";"), 0)) is not None
    return _from_base64(content.decode("ascii", "replace")) if is_base64 else content


def _from_base64(text: str) -> bytes:
    """Infra's "forgiving-base64 decode": white space is ignored and padding is optional."""
    for each in _WHITE_SPACE:
        text = text.replace(each, "")
    if len(text) % 4 == 0:
        text = text[:-2] + text[-2:].replace("=", "")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise ValueError("is not valid base64") from error
