"""A repository that was changed after its export: it has another id, and weights of its engines overflow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from onnxscript import ir
from tokenizers import Tokenizer

from support.running_server import Server, start_server, stop_server

# Of float32, whose square is infinite.
HUGE = np.float32(1e38)


@pytest.fixture(scope="module")
def altered(checkpoint: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = Path(shutil.copytree(exported, tmp_path_factory.mktemp("altered") / "repository"))
    config = repository / "diffusion" / "config.pbtxt"
    text = config.read_text()
    assert str(checkpoint) in text
    config.write_text(text.replace(str(checkpoint), "my-painter"))
    cat = Tokenizer.from_file(str(repository / "diffusion" / "tokenizer.json")).token_to_id("cat</w>")
    multiply(repository / "text_encoder", "token_embedding.weight", cat)
    multiply(repository / "vae_decoder", "post_quant_conv.weight", ...)
    running = start_server("--cache-dir", str(repository.with_name("cache")), model=str(repository))
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


def multiply(component: Path, weight: str, rows: Any) -> None:
    """Make these rows of a weight huge."""
    path = component / "1" / "model.onnx"
    model = ir.load(path)
    (value,) = (value for name, value in model.graph.initializers.items() if name.endswith(weight))
    assert value.const_value is not None
    values = value.const_value.numpy().copy()
    values[rows] *= HUGE
    value.const_value = ir.tensor(values, name=value.name)
    ir.save(model, path)


def test_it_keeps_its_own_id(altered: Server) -> None:
    with altered.client() as client:
        assert [model.id for model in client.models.list()] == ["my-painter"]
    assert any(line.startswith("Serving my-painter on ") for line in altered.lines)


@pytest.mark.parametrize("prompt", ["red", "cat"], ids=["the VAE's", "the text encoder's"])
@pytest.mark.parametrize("streams", [False, True])
def test_an_image_of_values_that_are_not_finite_is_an_error(prompt: str, streams: bool, altered: Server) -> None:
    """Whichever component computed them: the image would be black."""
    given: dict[str, Any] = {"partial_images": 1, "stream": True} if streams else {}
    with altered.client() as client, pytest.raises(openai.APIError, match="not finite") as caught:
        list(client.images.generate(prompt=prompt, extra_body={"num_inference_steps": 2}, **given))
    assert caught.value.code == "image_not_finite"
