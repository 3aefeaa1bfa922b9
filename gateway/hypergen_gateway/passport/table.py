"""A passport for people: a table for a terminal, which is also Markdown, and a sheet of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from hypergen_gateway.generation.backend import Pixels, Quality
from hypergen_gateway.passport.record import Passport

_HEAD = ("", "PSNR, dB", "lowest", "SSIM", "lowest", "latents", "highest", "time")
AS_SERVED = "as served"
_SHEET_SIDE = 128
_LABEL_WIDTH, _LINE, _GAP = 150, 14, 4

Row = TypeVar("Row")


def name_of(fields: Mapping[str, int | float | str]) -> str:
    """A setting's name: what its requests say beside the defaults."""
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or AS_SERVED


def description(passport: Passport) -> str:
    """What was compared with what."""
    request = passport.request
    what = f"{passport.engine} {passport.dtype}".strip() or "Triton"
    images = len(passport.settings[0].images)
    return (
        f"{passport.model}, {what}, compared with {passport.reference} over {images} prompts: "
        f"{request['width']}x{request['height']}, {request['num_inference_steps']} steps, "
        f"guidance scale {request['guidance_scale']:g}; measured {passport.measured}"
    )


def by_setting(rows: Sequence[Quality]) -> dict[str, Quality]:
    """Each setting's quality by its name."""
    return {name_of(row.fields): row for row in rows}


def together(precisions: Mapping[str, Mapping[str, Row]]) -> dict[str, Row]:
    """The settings of several precisions as one list, in which their names say the precision; of one as they are."""
    if len(precisions) == 1:
        return dict(*precisions.values())
    return {
        dtype if setting == AS_SERVED else f"{dtype}, {setting}": row
        for dtype, rows in precisions.items()
        for setting, row in rows.items()
    }


def table(rows: Mapping[str, Quality]) -> str:
    """Named rows, aligned, in Markdown."""
    cells = [_HEAD, *((name, *_cells(row)) for name, row in rows.items())]
    widths = [max(len(line[column]) for line in cells) for column, _ in enumerate(_HEAD)]
    lines = [
        "| " + " | ".join(_align(cell, widths[column], column) for column, cell in enumerate(line)) + " |"
        for line in cells
    ]
    rule = (
        "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths)) + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(row: Quality) -> tuple[str, ...]:
    return (
        f"{row.psnr:.1f}",
        f"{row.lowest_psnr:.1f}",
        f"{row.ssim:.4f}",
        f"{row.lowest_ssim:.4f}",
        _percent(row.latents_error),
        _percent(row.highest_latents_error),
        f"{row.time:.2f}",
    )


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def _align(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def sheet(rows: Mapping[str, Sequence[Pixels]]) -> Image.Image:
    """Images side by side: a labelled row for each setting, a column for each prompt; large images are made smaller."""
    height, width = next(iter(rows.values()))[0].shape[:2]
    scale = min(1.0, _SHEET_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = max(map(len, rows.values()))
    whole = Image.new("RGB", (_LABEL_WIDTH + columns * (size[0] + _GAP), len(rows) * (size[1] + _GAP)), "white")
    draw = ImageDraw.Draw(whole)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (size[1] + _GAP)
        lines = name.split(", ")
        for line, text in enumerate(lines):
            draw.text((_GAP, top + size[1] // 2 - _LINE * len(lines) // 2 + line * _LINE), text, fill="black")
        for column, pixels in enumerate(images):
            image = Image.fromarray(np.asarray(pixels)).resize(size, Image.Resampling.LANCZOS)
            whole.paste(image, (_LABEL_WIDTH + column * (size[0] + _GAP), top))
    return whole
