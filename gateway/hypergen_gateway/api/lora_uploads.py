"""LoRA files that clients add: the form, and whether it holds what it says."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from hypergen_gateway.api.bodies import shown
from hypergen_gateway.api.fields import LoraForm
from hypergen_gateway.errors import InvalidRequestError
from hypergen_gateway.storage.lora_files import SUFFIX, is_safetensors

_LEGAL = {
    "name": "1 to 64 letters, digits, '_', '.' or '-', of which the first and the last are letters or digits, "
    f"without {SUFFIX} at the end",
    "file": "a whole file in the format safetensors",
}


def read_upload(form: dict[str, Any], fixed: Collection[str]) -> LoraForm:
    """The validated form. Reads the file's header, which blocks. `fixed` are names that no file may take.

    Raises:
        InvalidRequestError: a field is invalid; `param` is its name.
    """
    try:
        upload = LoraForm.model_validate(form)
    except ValidationError as error:
        raise _invalid(str(error.errors()[0]["loc"][0]), form) from error
    # Requests name ink.safetensors "ink": as a name of its own, it would replace that file, or be mistaken for it.
    if upload.name.lower().endswith(SUFFIX):
        raise _invalid("name", form)
    if upload.name in fixed:
        raise InvalidRequestError(
            f"The LoRA {upload.name!r} was named at the start and stays. Use another name.", "name"
        )
    if not is_safetensors(upload.file.file, upload.file.size):
        raise _invalid("file", form)
    return upload


def _invalid(param: str, form: dict[str, Any]) -> InvalidRequestError:
    if param not in form:
        return InvalidRequestError(f"'{param}' is missing. It must be {_LEGAL[param]}.", param)
    return InvalidRequestError(f"Invalid value for '{param}': {shown(form[param])}. It must be {_LEGAL[param]}.", param)
