"""Runs one client's driver inside that client's environment: `python driving.py DRIVER RESULTS`.

A driver is what a user of the library would write, and knows nothing of this project: functions `generate(prompt)`,
`edit(prompt, image, mask)`, `stream(prompt)` and `vary(image)`, of which it has those that its library has. Each gives
one image or, of a stream, all of them in order: bytes, base64 or a link. What came back is written as JSON to RESULTS.
Uses the standard library alone.
"""

from __future__ import annotations

import base64
import json
import os
import runpy
import sys
import traceback
import urllib.request
from pathlib import Path
from typing import Any

ARGUMENTS = {
    "generate": ("PROMPT",),
    "edit": ("EDIT_PROMPT", "IMAGE", "MASK"),
    "stream": ("PROMPT",),
    "vary": ("IMAGE",),
}


def main(driver: str, results: str) -> None:
    functions = runpy.run_path(driver)
    found = {name: outcome(functions[name], *argument_values(name)) for name in ARGUMENTS if name in functions}
    Path(results).write_text(json.dumps(found), encoding="utf-8")


def argument_values(name: str) -> list[str]:
    return [os.environ[f"HYPERGEN_{argument}"] for argument in ARGUMENTS[name]]


def outcome(function: Any, *arguments: str) -> dict[str, Any]:
    """The images that came back, in base64, or the error with which the library ended."""
    try:
        returned = function(*arguments)
        images = returned if isinstance(returned, list) else [returned]
        return {"images": [base64.b64encode(content(image)).decode() for image in images]}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def content(image: Any) -> bytes:
    """The file of an image, which libraries give as its bytes, in base64 or as a link."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise TypeError(f"no image came back: {image!r:.200}")
    if image.startswith("http"):
        with urllib.request.urlopen(image, timeout=60) as response:
            return bytes(response.read())
    return base64.b64decode(image.partition(";base64,")[2] or image, validate=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
