"""Errors of `hypergen passport`, one line each."""


class PassportError(Exception):
    """There is no passport, or it cannot be measured; `str()` is the message for the user."""
