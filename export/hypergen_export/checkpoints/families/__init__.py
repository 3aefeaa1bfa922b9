"""The model families. A new family is a module here with its rows, and its wrappers in `conversion/wrappers`."""

from __future__ import annotations

from hypergen_export.checkpoints.families.chroma import CHROMA
from hypergen_export.checkpoints.families.flux1 import FLUX1
from hypergen_export.checkpoints.families.flux2 import FLUX2
from hypergen_export.checkpoints.families.qwen_image import QWEN_IMAGE
from hypergen_export.checkpoints.families.sana import SANA
from hypergen_export.checkpoints.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from hypergen_export.checkpoints.families.unet import UNETS
from hypergen_export.checkpoints.families.z_image import Z_IMAGE
from hypergen_export.checkpoints.family import Family

FAMILIES: tuple[Family, ...] = (*UNETS, *STABLE_DIFFUSION_3, *FLUX1, *CHROMA, *FLUX2, *Z_IMAGE, *QWEN_IMAGE, *SANA)
