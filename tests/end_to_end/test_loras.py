"""LoRAs beside the checkpoint as it is, through the real Triton, against diffusers."""

from __future__ import annotations

import asyncio
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from safetensors.numpy import load_file

from hypergen_export.checkpoints.lora import read_loras
from hypergen_export.repository.export import export
from hypergen_export.repository.request import ExportRequest
from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository
from support.loras import lora_weights, save_by_diffusers, save_by_kohya, save_with_magnitudes
from support.pipelines import pipeline_of
from support.running_server import (
    KEY,
    Pixels,
    Server,
    generate,
    generate_all,
    generate_together,
    start_server,
    stop_server,
)

# Of 255, as in test_parity and test_batching.
TOLERANCE = 0.1
LARGEST_DIFFERENCE = 1
# Of the rank pool: four each for ink, words and clay, and for one more.
COLUMNS = 16
OTHER_KEY = "a-guests-key"
WISH: dict[str, Any] = {"prompt": "a red rocket", "num_inference_steps": 8, "guidance_scale": 3.0}


@dataclass(frozen=True)
class Files:
    """All change UNet and text encoder, but `words` the text encoder alone; `norms` is one that must be merged.

    `pen` and `brush` come while the server runs.
    """

    ink: Path
    clay: Path
    words: Path
    norms: Path
    pen: Path
    brush: Path


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("loras")
    both = ("unet", "text_encoder")
    words = lora_weights(checkpoint, "text_encoder", seed=8)
    return Files(
        ink=save_by_diffusers(folder / "ink", lora_weights(checkpoint, *both)),
        clay=save_by_kohya(folder / "clay.safetensors", lora_weights(checkpoint, *both, seed=9), alpha=2.0),
        words=save_by_kohya(folder / "words.safetensors", words, alpha=4.0),
        norms=save_with_magnitudes(folder / "norms.safetensors", checkpoint, "text_encoder"),
        pen=save_by_diffusers(folder / "pen", lora_weights(checkpoint, *both, seed=10)),
        brush=save_by_diffusers(folder / "brush", lora_weights(checkpoint, *both, seed=11)),
    )


@pytest.fixture(scope="module")
def loras(files: Files) -> tuple[str, ...]:
    """With a name and a scale, and without either."""
    return f"ink={files.ink}:0.5", str(files.words), str(files.clay), f"{files.norms}:0.8"


@pytest.fixture(scope="module")
def repository(checkpoint: Path, exported: Path, cache_dir: Path, loras: tuple[str, ...]) -> Path:
    """Where the server finds it: an export takes longer than a start may."""
    assert exported.parent == cache_dir
    options = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=cache_dir, loras=loras, lora_rank=COLUMNS)
    return asyncio.run(find_repository(str(checkpoint), options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server gets as --lora-dir."""
    return tmp_path_factory.mktemp("lora-dir")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KEY may add and remove LoRAs, another one may not."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"admin: {KEY}\nguest: {OTHER_KEY}\n")
    return file


@pytest.fixture(scope="module")
def server(checkpoint: Path, repository: Path, loras: tuple[str, ...], folder: Path, keys: Path) -> Iterator[Server]:
    given = [word for lora in loras for word in ("--lora", lora)]
    given += ["--lora-rank", str(COLUMNS), "--lora-dir", str(folder)]
    given += ["--api-key-file", str(keys), "--lora-admin", "admin", "--cache-dir", str(repository.parent)]
    running = start_server("--dtype", "float32", *given, model=str(checkpoint), key=None)
    yield running
    assert stop_server(running) == 0, "\n".join(running.lines)


def by_diffusers(checkpoint: Path, files: Files, scales: dict[str, float], fields: dict[str, Any]) -> Pixels:
    pipeline = pipeline_of(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is an adapter already
        for name in scales:
            pipeline.load_lora_weights(str(getattr(files, name)), adapter_name=name)
    pipeline.set_adapters(list(scales), list(scales.values()))
    given = {name: value for name, value in fields.items() if name != "seed"}
    return np.asarray(pipeline(**given, generator=torch.Generator().manual_seed(fields["seed"])).images[0])


def differences(ours: Pixels, theirs: Pixels) -> Any:
    return np.abs(ours.astype(int) - theirs.astype(int))


def test_the_server_says_at_its_start_which_loras_it_has(server: Server) -> None:
    (line,) = [line for line in server.lines if line.startswith("Serving ")]
    words = "with the LoRA ink at 0.5, with the LoRA words at 1, with the LoRA clay at 1, with the LoRA norms at 0.8"
    assert line.endswith(f"(cpu, with an API key, {words})")


def test_only_a_merged_lora_is_a_further_model(repository: Path) -> None:
    models = {folder.name for folder in repository.iterdir() if (folder / "1" / "model.onnx").exists()}
    assert models == {"text_encoder", "unet", "vae_decoder", "vae_encoder", "text_encoder.norms@0.8"}
    columns = [np.flatnonzero(_down(repository, name).any(axis=0)).tolist() for name in ("text_encoder", "unet")]
    assert columns == [list(range(12)), [0, 1, 2, 3, 8, 9, 10, 11]], "each LoRA in columns of its own"


def _down(repository: Path, component: str) -> Any:
    """A layer's half of the rank pool, [in, columns]."""
    pool = load_file(repository / component / "1" / "lora_pool.safetensors")
    name = next(name for name in pool if "to_q.down" in name or "q_proj.down" in name)
    assert pool[name].shape[1] == COLUMNS
    return pool[name]


def test_other_loras_need_no_conversion(repository: Path, checkpoint: Path, files: Files, tmp_path: Path) -> None:
    output = repository.with_name("others")
    request = ExportRequest(
        model=str(checkpoint), output=output, loras=read_loras([f"{files.words}:2"]), lora_rank=COLUMNS
    )
    before = _down(repository, "text_encoder")
    assert export(request).converted == ()
    assert np.flatnonzero(_down(output, "text_encoder").any(axis=0)).tolist() == [0, 1, 2, 3]
    assert np.array_equal(_down(repository, "text_encoder"), before), "not in the file of the other export"
    shutil.move(output, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "scales",
    [{"ink": 0.5}, {"words": -1.0}, {"clay": 0.7, "ink": 0.35}, {"ink": -0.4, "words": 0.9, "clay": 1.2}],
    ids=str,
)
async def test_images_equal_load_lora_weights_and_set_adapters_of_diffusers(
    scales: dict[str, float], server: Server, checkpoint: Path, files: Files
) -> None:
    async with server.async_client() as client:
        plain = await generate(client, **WISH, seed=5)
        loras = [{"name": name, "scale": scale} for name, scale in scales.items()]
        ours = await generate(client, **WISH, seed=5, loras=loras)
        found = differences(ours, by_diffusers(checkpoint, files, scales, WISH | {"seed": 5}))
        print(f"{scales}: mean difference {found.mean():.4f}/255, largest {found.max()}/255; ", end="")
        print(f"to the checkpoint as it is {differences(ours, plain).mean():.1f}/255")
        assert found.mean() <= TOLERANCE
        assert found.max() <= LARGEST_DIFFERENCE
        assert differences(ours, plain).mean() > 1


async def test_a_scale_of_0_is_the_checkpoint_as_it_is_and_lora_path_is_another_way_to_ask(server: Server) -> None:
    async with server.async_client() as client:
        plain = await generate(client, **WISH, seed=6)
        assert np.array_equal(plain, await generate(client, **WISH, seed=6, lora_path="ink", lora_scale=0))
        by_default = await generate(client, **WISH, seed=6, lora_path="ink")
        assert not np.array_equal(plain, by_default)
        listed = await generate(client, **WISH, seed=6, loras=[{"name": "ink", "scale": 0.5}])
        assert np.array_equal(by_default, listed)


async def test_requests_with_different_loras_at_once_give_the_images_that_each_gives_alone(server: Server) -> None:
    loras: list[dict[str, float]] = [{}, {"ink": 0.5}, {"words": 1.0, "norms": 0.8}, {"ink": -0.5, "clay": 1.0}, {}]
    steps = 20  # DDIM calls the UNet once at each
    same = {**WISH, "num_inference_steps": steps, "scheduler": "ddim"}
    bodies = [
        {**same, "seed": seed, "loras": [{"name": name, "scale": scale} for name, scale in scales.items()]}
        for seed, scales in enumerate(loras)
    ]
    async with server.async_client() as client:
        alone = [await generate(client, **fields) for fields in bodies]
        together, executions = await generate_together(server, [generate(client, **fields) for fields in bodies])
    assert max(differences(*pair).max() for pair in zip(alone, together, strict=True)) <= LARGEST_DIFFERENCE
    assert executions == {len(bodies) * 2: steps}


def test_what_is_not_there_is_refused_with_what_is(server: Server) -> None:
    known = "'ink', 'words', 'clay', 'norms'"
    with server.client() as client:
        for fields, param, message in (
            ({"lora_path": "oil"}, "lora_path", f"It must be one of {known}."),
            ({"loras": [{"name": "oil"}]}, "loras", f"names of {known}."),
            ({"loras": [{"name": "norms", "scale": 1}]}, "loras", "'norms' is served at 0.8; 0 disables it."),
        ):
            with pytest.raises(openai.BadRequestError, match=message) as refused:
                client.images.generate(prompt="cat", extra_body=fields)
            assert refused.value.param == param


def test_there_is_still_one_model_and_its_loras_are_listed(server: Server) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{server.url}/v1/models", headers=key).json()
    assert [model["id"] for model in answer["data"]] == [server.model]
    loras = httpx.get(f"{server.url}/v1/capabilities", headers=key).json()["loras"]
    assert loras[0] == {"name": "ink", "default_scale": 0.5, "scales": []}
    assert loras[-1] == {"name": "norms", "default_scale": 0.8, "scales": [0.8]}


def listed(server: Server) -> dict[str, dict[str, Any]]:
    answer = httpx.get(f"{server.url}/v1/loras", headers={"Authorization": f"Bearer {KEY}"}).json()
    return {lora["name"]: lora for lora in answer["data"]}


def drop(file: Path, target: Path) -> None:
    """At once: half a copy would be listed with an error until it is whole."""
    shutil.copy(file, target.with_suffix(".part"))
    target.with_suffix(".part").rename(target)


async def wait_until_listed(server: Server, *names: str) -> None:
    """Until the LoRAs of the folder are these; fails with the server's log if the exporter or an engine fails."""
    own = {"ink", "words", "clay", "norms"}

    def are_listed() -> bool:
        found = listed(server)
        failed = [name for name, lora in found.items() if lora.get("error", "").endswith("trying again")]
        assert not failed, f"{failed} failed:\n" + "\n".join(server.lines[-80:])
        return found.keys() == own | set(names)

    await asyncio.to_thread(server.wait_until, are_listed, 120, "listed")


async def test_files_come_and_go_while_images_are_generated(
    server: Server, folder: Path, checkpoint: Path, files: Files
) -> None:
    bodies = [{**WISH, "num_inference_steps": 150, "seed": seed, "lora_path": "ink"} for seed in range(4)]
    async with server.async_client() as client:
        alone = [await generate(client, **fields) for fields in bodies]
        meanwhile = asyncio.create_task(generate_all(server, bodies))
        began = time.monotonic()
        drop(files.pen, folder / "pen.safetensors")
        await wait_until_listed(server, "pen")
        print(f"served after {time.monotonic() - began:.1f} s")
        assert listed(server)["pen"] | {"rank": 4, "changes": ["text_encoder", "unet"]} == listed(server)["pen"]
        assert max(differences(*pair).max() for pair in zip(alone, await meanwhile, strict=True)) <= LARGEST_DIFFERENCE
        await assert_as_by_diffusers(client, checkpoint, files, {"pen": 0.8, "ink": -0.5})
        # Only one of the two has room. In the columns of the other, whose texts must not be taken for its own.
        drop(files.brush, folder / "brush.safetensors")
        await wait_until_listed(server, "pen", "brush")
        for name, other in (("brush", "pen"), ("pen", "brush")):
            found = listed(server)
            assert (found[name].get("in_pool"), found[other].get("in_pool")) == (False, True), found
            began = time.monotonic()
            await assert_as_by_diffusers(client, checkpoint, files, {name: 0.8, "ink": -0.5})
            print(f"in the pool after less than {time.monotonic() - began:.1f} s")
        for name in ("pen", "brush"):
            (folder / f"{name}.safetensors").unlink()
        await wait_until_listed(server)
        with pytest.raises(openai.BadRequestError, match="'ink', 'words', 'clay', 'norms'"):
            await generate(client, **WISH, lora_path="pen")


async def test_a_lora_is_added_and_removed_over_http(server: Server, checkpoint: Path, files: Files) -> None:
    admin, guest = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER_KEY))
    url = f"{server.url}/v1/loras"
    async with httpx.AsyncClient(timeout=30) as http, server.async_client() as client:
        form = {"data": {"name": "pen"}, "files": {"file": files.pen.read_bytes()}}
        assert (await http.post(url, headers=guest, **form)).status_code == 403  # type: ignore[arg-type]
        added = await http.post(url, headers=admin, **form)  # type: ignore[arg-type]
        assert (added.status_code, added.json()) == (202, {"object": "lora", "name": "pen", "changes": []})
        await wait_until_listed(server, "pen")
        assert listed(server)["pen"]["in_pool"]
        await assert_as_by_diffusers(client, checkpoint, files, {"pen": 0.8, "ink": -0.5})
        assert (await http.delete(f"{url}/pen", headers=guest)).status_code == 403
        removed = await http.delete(f"{url}/pen", headers=admin)
        assert (removed.status_code, removed.json()["deleted"]) == (200, True)
        await wait_until_listed(server)
        with pytest.raises(openai.BadRequestError, match="'ink', 'words', 'clay', 'norms'"):
            await generate(client, **WISH, lora_path="pen")


async def assert_as_by_diffusers(
    client: openai.AsyncOpenAI, checkpoint: Path, files: Files, scales: dict[str, float]
) -> None:
    loras = [{"name": name, "scale": scale} for name, scale in scales.items()]
    ours = await generate(client, **WISH, seed=5, loras=loras)
    found = differences(ours, by_diffusers(checkpoint, files, scales, WISH | {"seed": 5}))
    assert found.mean() <= TOLERANCE
    assert found.max() <= LARGEST_DIFFERENCE


async def test_a_file_that_cannot_be_served_is_listed_with_the_reason(
    server: Server, folder: Path, files: Files
) -> None:
    (folder / "broken.safetensors").write_bytes(b"<html>")
    drop(files.norms, folder / "dora.safetensors")
    drop(files.words, folder / "words.safetensors")
    await wait_until_listed(server, "broken", "dora", "words.safetensors")
    errors = {name: lora["error"] for name, lora in listed(server).items() if "error" in lora}
    assert errors["broken"].startswith("broken.safetensors: not a safetensors file")
    assert errors["dora"] == "dora.safetensors: is a DoRA, has biases or a rank above 256: only --lora can serve it"
    assert errors["words.safetensors"] == "another LoRA has this name"
    assert str(folder) not in str(errors)
    for name in ("broken", "dora", "words"):
        (folder / f"{name}.safetensors").unlink()
    await wait_until_listed(server)
