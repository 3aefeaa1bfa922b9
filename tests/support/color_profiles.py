"""Colour profiles as they are embedded in image files, for tests: as short as littlecms reads them (ICC.1:2001-04)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import ImageCms

Matrix = npt.NDArray[np.float64]

# Columns: red, green and blue as XYZ under the light of the profile connection space, D50.
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
_D50 = (0.9642, 1.0, 0.8249)


def srgb_profile() -> bytes:
    """littlecms' own profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def display_profile(primaries: Matrix, gamma: float) -> bytes:
    """The profile of a display with these primaries."""
    colours = {f"{name}XYZ": _xyz(*primaries[:, column]) for column, name in enumerate("rgb")}
    curves = {f"{name}TRC": _curve(gamma) for name in "rgb"}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {"wtpt": _xyz(*_D50), **colours, **curves})


def grey_profile(gamma: float) -> bytes:
    """The profile of greyscale images with this gamma."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {"wtpt": _xyz(*_D50), "kTRC": _curve(gamma)})


def press_profile(inks: Mapping[tuple[int, ...], int]) -> bytes:
    """The profile of a press by which full inks (cyan, magenta, yellow, black) have this lightness, from 0 to 100.

    Other combinations are white.
    """
    corners = [inks.get(each, 100) for each in np.ndindex(2, 2, 2, 2)]
    lab = bytes(byte for lightness in corners for byte in (round(lightness * 2.55), 128, 128))
    identity = struct.pack(">9i", *[65536 if row == column else 0 for row in range(3) for column in range(3)])
    straight = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + straight * 4 + lab + straight * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {"wtpt": _xyz(*_D50), "A2B0": table})


def _xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *[round(value * 65536) for value in values])


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[str, bytes]) -> bytes:
    offset = 128 + 4 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name.encode() + struct.pack(">II", offset + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    header = bytes(4) + b"\x02\x40\0\0" + kind + space + connection + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *[round(value * 65536) for value in _D50]) + bytes(48)
    return struct.pack(">I", offset + len(content)) + header + table + content
