"""A diffusers checkpoint as stable-diffusion.cpp knows it: the text encoder's tensors under their published names.

    python convert_for_sdcpp.py CHECKPOINT OUTPUT

transformers 5 drops `text_model.` from the names when it saves; published checkpoints have it, and it is looked for.
UNet and VAE are linked. Needs the standard library alone: a safetensors file begins with its header's length and JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

PREFIX = "text_model."


def main() -> None:
    checkpoint, output = (Path(argument).resolve() for argument in sys.argv[1:])
    (output / "text_encoder").mkdir(parents=True, exist_ok=True)
    for name in ("unet", "vae"):
        if not (output / name).exists():
            (output / name).symlink_to(checkpoint / name)
    _rename(checkpoint / "text_encoder" / "model.safetensors", output / "text_encoder" / "model.safetensors")


def _rename(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        renamed = {
            name if name == "__metadata__" or name.startswith(PREFIX) else PREFIX + name: entry
            for name, entry in header.items()
        }
        content = json.dumps(renamed).encode()
        content += b" " * (-len(content) % 8)
        new.write(len(content).to_bytes(8, "little") + content)
        shutil.copyfileobj(old, new)


if __name__ == "__main__":
    main()
