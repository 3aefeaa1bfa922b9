"""litellm, unchanged, over a real connection. It has no streams of images."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from support.fake_backend import FakeBackend, on_loopback
from support.image_files import file_of, hole, photo

KEY = "sk-correct-horse"
pytestmark = pytest.mark.filterwarnings("ignore:Item .* on TypedDict class")  # litellm's own types


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Imported here: it takes seconds, which whoever collects these tests without running them need not wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or the import fetches the prices of models
        import litellm

        return litellm


@pytest.fixture
async def options(backend: FakeBackend) -> AsyncIterator[dict[str, Any]]:
    async with on_loopback(create_app(Config(api_key=KEY), backend)) as url:
        yield {"model": "openai/gpt-image-1", "api_base": f"{url}/v1", "api_key": KEY, "max_retries": 0}


def pixels_of(response: Any) -> list[Any]:
    files = [Image.open(io.BytesIO(base64.b64decode(image.b64_json))) for image in response.data]
    return [(file.size, file.getpixel((0, 0))) for file in files]


async def test_it_generates(litellm: Any, options: dict[str, Any]) -> None:
    response = await asyncio.to_thread(
        litellm.image_generation, prompt="a fox", n=2, size="64x64", quality="low", seed=7, **options
    )
    assert pixels_of(response) == [((64, 64), (7, 7, 7)), ((64, 64), (8, 8, 8))]
    assert response.usage.total_tokens == 2 + 2 * 64


async def test_it_generates_without_blocking(litellm: Any, options: dict[str, Any], backend: FakeBackend) -> None:
    extensions = {"seed": 7, "num_inference_steps": 4, "negative_prompt": "text"}
    response = await litellm.aimage_generation(prompt="a fox", **extensions, **options)
    assert pixels_of(response) == [((64, 48), (7, 7, 7))]
    (generation,) = backend.generations
    assert (generation.num_inference_steps, generation.negative_prompt) == (4, "text")


async def test_it_edits_an_open_file_with_a_mask(
    litellm: Any, options: dict[str, Any], backend: FakeBackend, tmp_path: Path
) -> None:
    path = tmp_path / "my photo.png"
    path.write_bytes(file_of(photo()))
    with path.open("rb") as image:
        response = await asyncio.to_thread(
            litellm.image_edit, image=image, mask=file_of(hole()), prompt="a fox", n=2, **options
        )
    assert len(response.data) == 2
    (generation,) = backend.generations
    assert (generation.prompt, generation.num_images, generation.mask is not None) == ("a fox", 2, True)


async def test_it_edits_several_images(litellm: Any, options: dict[str, Any], backend: FakeBackend) -> None:
    images = [file_of(photo()), file_of(photo(96, 64), "JPEG")]
    extensions = {"seed": 7, "strength": 0.5}
    response = await litellm.aimage_edit(image=images, prompt="a fox", n=2, extra_body=extensions, **options)
    assert [size for size, _ in pixels_of(response)] == [(64, 48), (96, 64)]
    assert sorted((generation.seed, generation.strength) for generation in backend.generations) == [(7, 0.5), (8, 0.5)]


@pytest.mark.parametrize("call", ["aimage_generation", "aimage_edit"])
async def test_errors_are_its_own(litellm: Any, options: dict[str, Any], call: str) -> None:
    request: dict[str, Any] = {"prompt": "a fox"} | ({"image": file_of(photo())} if "edit" in call else {})
    with pytest.raises(litellm.AuthenticationError, match="Incorrect API key"):
        await getattr(litellm, call)(**request, **options | {"api_key": "sk-wrong"})
    with pytest.raises(litellm.BadRequestError, match="each side from 1 to 4096"):
        await getattr(litellm, call)(**request, size="9000x7", **options)
