"""Passports: what is measured of two lots of images, what is kept, and what is said when nothing can be."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

from hypergen_gateway.cli import main
from hypergen_gateway.embedded.errors import EmbeddedError
from hypergen_gateway.embedded.export_cache import ExportOptions
from hypergen_gateway.generation.backend import Backend, GenerationRequest
from hypergen_gateway.passport.errors import PassportError
from hypergen_gateway.passport.measure import Measured, PassportOptions, check_psnr, describe, measure
from hypergen_gateway.passport.prompts import PROMPTS, choose_prompts, read_prompts
from hypergen_gateway.passport.record import (
    ImageQuality,
    Passport,
    SettingQuality,
    open_repository,
    read_passport,
    write_passport,
)
from hypergen_gateway.passport.samples import Sample, SampleStore, sample_all
from hypergen_gateway.passport.similarity import psnr, relative_error, ssim
from hypergen_gateway.passport.table import sheet
from hypergen_gateway.serving import TritonOptions
from support.fake_backend import FakeBackend
from support.fake_triton import PARAMETERS, FakeTriton, serving

REQUESTS = [
    GenerationRequest(prompt=prompt, width=64, height=48, num_inference_steps=4, guidance_scale=2.0, seed=seed)
    for seed, prompt in enumerate(["a rocket", "a dog", "a cat"])
]


def passport(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["passport", *map(str, arguments)], env={"HYPERGEN_MODEL": ""})


def error_line(result: Result) -> str:
    assert result.exit_code in (1, 2), (result.output, result.exception)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


def image_quality(prompt: str, value: float, seconds: float = 1.0) -> ImageQuality:
    return ImageQuality(prompt=prompt, seed=0, psnr=value, ssim=value / 100, latents_error=1 / value, seconds=seconds)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What an export leaves, as far as a passport is concerned."""
    folder = tmp_path / "repository"
    config = model_config_pb2.ModelConfig(name="diffusion")
    for name, value in PARAMETERS.items():
        config.parameters[name].string_value = value
    text = text_format.MessageToString(config)
    (folder / "diffusion").mkdir(parents=True)
    (folder / "diffusion" / "config.pbtxt").write_text(text)
    files = {"diffusion/config.pbtxt": len(text), "unet/1/model.onnx": 3}
    source: dict[str, Any] = {
        "model": "acme/emoji",
        "vae": None,
        "text_encoders": [],
        "prediction_type": None,
        "embeddings": [],
    }
    record = {"key": "k1", "engine": "openvino", "dtype": "bfloat16", "source": source, "files": files}
    (folder / "hypergen.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def measured() -> Passport:
    images = (image_quality("a rocket", 40.0), image_quality("a dog", 20.0, seconds=3.0))
    fewer = (image_quality("a rocket", 10.0), image_quality("a dog", 30.0))
    return Passport(
        key="k1",
        model="acme/emoji",
        engine="openvino",
        dtype="bfloat16",
        reference="openvino float32",
        reference_seconds=2.0,
        measured="2026-01-01T00:00:00+00:00",
        request={"width": 64, "height": 48, "num_inference_steps": 4, "guidance_scale": 2.0},
        settings=(
            SettingQuality(fields={}, images=images),
            SettingQuality(fields={"guidance_start": 0.2, "guidance_end": 0.8}, images=fewer),
        ),
    )


class TestSimilarity:
    def test_psnr_is_that_of_the_mean_square_and_finite_for_equal_images(self) -> None:
        image = np.zeros((16, 16, 3), np.uint8)
        other = image.copy()
        other[0, 0] = 255
        assert psnr(other, image) == pytest.approx(10 * math.log10(256))
        assert psnr(image, image) == 100

    def test_ssim_is_one_for_equal_images_and_less_for_noise(self) -> None:
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        assert ssim(image, image) == pytest.approx(1)
        assert ssim(image[::-1].copy(), image) < 0.1

    def test_the_error_of_latents_is_relative(self) -> None:
        assert relative_error(*np.array([[3.3, 4.4], [3, 4]], np.float32)) == pytest.approx(0.1, rel=1e-5)


class TestPrompts:
    def test_those_of_a_file_are_its_lines(self, tmp_path: Path) -> None:
        (tmp_path / "prompts").write_text("\ufeff a fox \n\n an owl, é\r\n")
        assert read_prompts(tmp_path / "prompts") == ("a fox", "an owl, é")

    @pytest.mark.parametrize(
        ("content", "says"),
        [(b"", "no prompt"), (b" \n\n", "no prompt"), (b"\xff\xfe", "not UTF-8"), (b"x\n" * 1001, "at most 1000")],
    )
    def test_a_file_without_any_is_refused(self, tmp_path: Path, content: bytes, says: str) -> None:
        (tmp_path / "prompts").write_bytes(content)
        line = error_line(passport("hypergen/emoji", "--measure", "--prompts", tmp_path / "prompts"))
        assert "--prompts" in line
        assert says in line

    def test_a_file_that_cannot_be_read_is_named_with_the_reason(self, tmp_path: Path) -> None:
        for file, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
            line = error_line(passport("hypergen/emoji", "--measure", "--prompts", file))
            assert str(file) in line
            assert reason in line

    def test_without_a_file_some_of_the_models_own_are_taken_and_others_for_models_without(self) -> None:
        suggestions = [str(number) for number in range(16)]
        assert choose_prompts((), suggestions, None) == tuple(suggestions[::2])
        assert choose_prompts((), (), None) == PROMPTS
        assert choose_prompts((), (), 100) == PROMPTS
        assert choose_prompts(("a", "b", "c", "d"), suggestions, 2) == ("a", "c")
        assert choose_prompts(tuple(suggestions), (), None) == tuple(suggestions)


class TestSamples:
    @pytest.fixture
    def connect(self, backend: FakeBackend) -> Callable[[], Any]:
        @asynccontextmanager
        async def connected() -> AsyncIterator[Backend]:
            yield backend

        return connected

    async def test_what_an_interrupted_measurement_has_generated_is_not_generated_again(
        self, backend: FakeBackend, connect: Callable[[], Any], tmp_path: Path
    ) -> None:
        await sample_all(connect, REQUESTS[:2], SampleStore(tmp_path, "k1"), "test")
        store = SampleStore(tmp_path, "k1")
        samples = await sample_all(connect, REQUESTS, store, "test")
        assert [request.prompt for request in backend.generations] == ["a rocket", "a dog", "a cat"]
        assert [int(sample.pixels[0, 0, 0]) for sample in samples] == [0, 1, 2]
        assert samples[0].seconds == pytest.approx(0.036, abs=0.03)
        store.clear()
        assert SampleStore(tmp_path, "k1").find(REQUESTS[0]) is None

    async def test_exports_and_requests_do_not_share_samples(self, tmp_path: Path) -> None:
        sample = Sample(pixels=np.zeros((4, 4, 3), np.uint8), latents=np.ones((1, 2, 2), np.float32), seconds=1.0)
        SampleStore(tmp_path, "k1").keep(REQUESTS[0], sample)
        found = SampleStore(tmp_path, "k1").find(REQUESTS[0])
        assert found is not None
        assert found.latents is not None
        np.testing.assert_array_equal(found.latents, 1)
        assert SampleStore(tmp_path, "k2").find(REQUESTS[0]) is None
        assert SampleStore(tmp_path, "k1").find(replace(REQUESTS[0], cache_interval=2)) is None

    def test_a_damaged_one_is_generated_again(self, tmp_path: Path) -> None:
        sample = Sample(pixels=np.zeros((4, 4, 3), np.uint8), latents=None, seconds=1.0)
        SampleStore(tmp_path, "k1").keep(REQUESTS[0], sample)
        (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
        file.write_bytes(file.read_bytes()[:100])
        assert SampleStore(tmp_path, "k1").find(REQUESTS[0]) is None


class TestRecord:
    def test_it_is_read_as_it_was_written_and_the_export_stays_as_the_exporter_knows_it(
        self, repository: Path, measured: Passport
    ) -> None:
        opened = open_repository(repository)
        assert read_passport(opened) is None
        write_passport(opened, measured)
        again = open_repository(repository)
        assert read_passport(again) == measured
        first, second = again.description.passport
        assert first == measured.summaries[0]
        assert (first.psnr, first.lowest_psnr, first.latents_error, first.time) == (30, 20, 0.0375, 0.5)
        assert second.fields == {"guidance_start": 0.2, "guidance_end": 0.8}
        size = (repository / "diffusion" / "config.pbtxt").stat().st_size
        assert again.record["files"] == {"diffusion/config.pbtxt": size, "unet/1/model.onnx": 3}

    def test_that_of_another_export_is_none(self, repository: Path, measured: Passport) -> None:
        write_passport(open_repository(repository), replace(measured, key="k0"))
        assert read_passport(open_repository(repository)) is None
        assert "has no passport" in error_line(passport(repository))

    @pytest.mark.parametrize(
        ("file", "part"),
        [
            ("hypergen.json", '"source"'),
            ("hypergen.json", '"text_encoders"'),
            ("diffusion/config.pbtxt", '"max_num_images"'),
        ],
    )
    def test_an_export_of_an_earlier_version_is_said(self, repository: Path, file: str, part: str) -> None:
        text = (repository / file).read_text()
        (repository / file).write_text(text.replace(part, '"another"'))
        line = error_line(passport(repository))
        assert f"{repository}: exported by an earlier version of HyperGen" in line

    @pytest.mark.parametrize(("content", "says"), [("{", "cannot be read"), ("[]", "not a passport")])
    def test_a_damaged_one_is_said(self, repository: Path, content: str, says: str) -> None:
        (repository / "passport.json").write_text(content)
        assert says in error_line(passport(repository))


class TestCommand:
    def test_it_shows_the_passport_as_a_table_and_holds_it_to_a_threshold(
        self, repository: Path, measured: Passport
    ) -> None:
        write_passport(open_repository(repository), measured)
        shown = passport(repository, "--min-psnr", "30")
        assert shown.exit_code == 0
        assert "acme/emoji, openvino bfloat16, compared with openvino float32 over 2 prompts" in shown.output
        assert (
            "| as served                            |     30.0 |   20.0 | 0.3000 | 0.2000 |    3.8% |    5.0% | 0.50 |"
            in shown.output
        )
        refused = passport(repository, "--min-psnr", "30.1")
        line = error_line(refused)
        assert refused.exit_code == 1
        assert "PSNR is 30.0 dB on average over 2 prompts, below --min-psnr 30.1" in line
        assert "lowest 20.0 dB for 'a dog'" in line

    async def test_a_running_triton_is_asked_for_its_own(self, measured: Passport) -> None:
        fake = FakeTriton()
        async with serving(fake) as url:
            fake.parameters["passport"] = json.dumps([asdict(quality) for quality in measured.summaries])
            triton = TritonOptions(model="", url=url, export=None)
            assert (await describe(triton)).passport == measured.summaries

    @pytest.mark.parametrize(
        ("changes", "is_instead"),
        [
            ({"export_key": "k2"}, "another export of it"),
            ({"export_key": "k2", "dtype": "float32"}, "acme/tiny-emoji (openvino bfloat16)"),
            ({"export_key": "k2", "model_id": "acme/other"}, "acme/tiny-emoji (openvino bfloat16)"),
        ],
    )
    async def test_a_running_triton_of_another_export_is_refused(
        self, repository: Path, changes: dict[str, str], is_instead: str
    ) -> None:
        fake = FakeTriton()
        fake.parameters |= changes
        export = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=repository.parent)
        async with serving(fake) as url:
            triton = TritonOptions(model=str(repository), url=url, export=None)
            with pytest.raises(PassportError) as refused:
                await measure([PassportOptions(triton=triton, export=export)])
        stated = "{model_id} ({engine} {dtype})".format(**fake.parameters)
        assert str(refused.value) == f"Triton at {url} serves {stated}, but {repository} is {is_instead}"
        assert not fake.requests

    async def test_an_export_that_is_refused_is_so_before_another_one_is_measured(
        self, repository: Path, tmp_path: Path
    ) -> None:
        fake = FakeTriton()
        export = ExportOptions(dtype="float32", max_batch_size=8, cache_dir=tmp_path)
        async with serving(fake) as url:
            running = TritonOptions(model="", url=url, export=None)
            refused = TritonOptions(model=str(repository), url=None, export=replace(export, lora_rank=4))
            both = [PassportOptions(triton=each, export=export, reference_url=url) for each in (running, refused)]
            with pytest.raises(EmbeddedError, match="pass --lora-rank to"):
                await measure(both)
        assert not fake.requests

    def test_a_folder_without_one_says_how_to_measure_it(self, repository: Path) -> None:
        line = error_line(passport(repository))
        assert f"{repository} has no passport; --measure measures it" in line

    def test_a_triton_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        line = error_line(passport("--measure", "--triton-url", "127.0.0.1:1", "--cache-dir", tmp_path))
        assert "No model is available at 127.0.0.1:1" in line

    def test_what_was_not_exported_says_what_to_do(self, tmp_path: Path) -> None:
        line = error_line(passport("hypergen/emoji", "--cache-dir", tmp_path))
        assert "hypergen/emoji has not been exported with these options" in line
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--with", "size=64x64", "--measure"), "--with must be FIELD=VALUE with num_inference_steps,"),
            (("--with", "cache_interval=two", "--measure"), "--with cache_interval must be a number"),
            (("--with", "num_inference_steps=99999999999", "--measure"), "--with num_inference_steps is too large"),
            (("--count", "2"), "are for --measure"),
            (("--min-psnr", "nan"), "--min-psnr"),
            (("--reference", "a", "--reference-url", "b:1", "--measure"), "exclude each other"),
            (("--reference-url", "nowhere", "--measure"), "HOST:PORT"),
            (("--beside", "int8"), "are for --measure"),
            (("--beside", "int8", "--measure"), "--beside: MODEL must be a checkpoint"),
        ],
    )
    def test_options_that_mean_nothing_are_refused(self, repository: Path, options: Any, says: str) -> None:
        assert says in error_line(passport(repository, *options))

    def test_a_passport_without_images_as_served_has_no_threshold(self, measured: Passport) -> None:
        with pytest.raises(PassportError, match="as served"):
            check_psnr(measured.summaries[1:], measured, 1)


def test_precisions_are_measured_one_after_another_and_shown_together(
    measured: Passport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shades = {"bfloat16": 10, "int8": 60, "int4-weights": 110}

    async def of_all(precisions: Sequence[PassportOptions]) -> list[Measured]:
        return [of_shade(options) for options in precisions]

    def of_shade(options: PassportOptions) -> Measured:
        assert options.triton.export
        dtype = options.triton.export.dtype
        return Measured(
            passport=replace(measured, dtype=dtype, settings=measured.settings[: 2 if dtype == "bfloat16" else 1]),
            reference=[np.full((32, 32, 3), 200, np.uint8)],
            images={"as served": [np.full((32, 32, 3), shades[dtype], np.uint8)]},
        )

    monkeypatch.setattr("hypergen_gateway.cli.measure_passport", of_all)
    options = ("--dtype", "bf16", "--beside", "int8", "--beside", "bfloat16", "--beside", "int4-weights")
    result = passport("acme/emoji", "--measure", *options, "--cache-dir", tmp_path, "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1].strip() for line in result.output.splitlines() if line.startswith("| ")]
    assert rows == ["", "bfloat16", "bfloat16, guidance_start=0.2, guidance_end=0.8", "int8", "int4-weights"]
    made = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert [int(made[16 + 36 * row, -20, 0]) for row in range(4)] == [200, *shades.values()]


def test_a_sheet_that_cannot_be_written_is_refused_before_anything_is_measured(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypergen_gateway.cli.measure_passport", lambda _: pytest.fail("it was measured"))
    refused = passport(repository, "--measure", "--sheet", tmp_path / "missing" / "sheet.png")
    assert error_line(refused) == f"Error: --sheet: {tmp_path / 'missing'} is no folder that can be written to"


def test_a_sheet_has_a_row_for_each_setting() -> None:
    images = [np.full((32, 64, 3), shade, np.uint8) for shade in (10, 200)]
    made = np.asarray(sheet({"float32": images, "as served": images[::-1]}))
    assert made.shape[0] == 2 * 36
    assert [made[16, -40, 0], made[52, -40, 0]] == [200, 10]
