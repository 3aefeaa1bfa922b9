"""Links to images: what opens them, what does not, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.errors import LinkExpiredError, NotFoundError
from hypergen_gateway.generation.images import PNG, FileFormat
from hypergen_gateway.storage.local import LocalLinks
from support.fake_backend import FakeBackend, in_memory, until

GENERATIONS = "/v1/images/generations"
KEY = "sk-correct-horse"
BASE = "http://here:8000/"


@pytest.fixture
def links(tmp_path: Path) -> LocalLinks:
    return LocalLinks(tmp_path / "links", lifetime=60)


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def parts(url: str) -> tuple[str, str, str]:
    """Name, expiry and signature in a link."""
    split = urlsplit(url)
    query = parse_qs(split.query)
    return split.path.rpartition("/")[2], query["expires"][0], query["signature"][0]


class TestLocalLinks:
    async def test_a_link_gives_its_file_and_says_for_how_long(self, links: LocalLinks) -> None:
        url = await links.publish(b"a file", FileFormat("webp"), BASE)
        assert url.startswith("http://here:8000/files/")
        stored = await links.read(*parts(url))
        assert (stored.content, stored.media_type) == (b"a file", "image/webp")
        assert 55 < stored.seconds_left <= 60

    async def test_names_cannot_be_guessed_and_files_are_read_by_their_owner_alone(
        self, links: LocalLinks, tmp_path: Path
    ) -> None:
        contents = [bytes([number]) for number in range(20)]
        names = {parts(await links.publish(content, PNG, BASE))[0] for content in contents}
        assert len(names) == 20
        assert {len(name) for name in names} == {32 + len(".png")}
        folder = tmp_path / "links"
        assert {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())} == {0o700, 0o600}
        stranger = LocalLinks(tmp_path / "other", lifetime=60)
        assert not names & {parts(await stranger.publish(content, PNG, BASE))[0] for content in contents}

    async def test_a_file_that_is_published_again_is_kept_once_and_longer(self, tmp_path: Path) -> None:
        short, long = (LocalLinks(tmp_path, lifetime=lifetime, secret="s" * 16) for lifetime in (60, 600))
        first = parts(await short.publish(b"a file", PNG, BASE))
        second = parts(await long.publish(b"a file", PNG, BASE))
        (kept,) = files_in(tmp_path)
        assert kept.name == first[0] == second[0]
        assert kept.stat().st_mtime == int(second[1]) > int(first[1])
        assert [(await short.read(*link)).content for link in (first, second)] == [b"a file"] * 2

    async def test_whatever_is_changed_in_a_link_closes_it(self, links: LocalLinks) -> None:
        name, expires, signature = parts(await links.publish(b"x", PNG, BASE))
        other, _, other_signature = parts(await links.publish(b"y", PNG, BASE))
        forged = [
            (other, expires, signature),
            (name, str(int(expires) + 1), signature),
            (name, expires, other_signature),
            (name, expires, signature[:-1]),
            (name, expires, ""),
            (name, expires, "ключ"),
            (name, "", signature),
            (name, "٣", signature),
            (name.replace(".png", ".webp"), expires, signature),
            (f"../links/{name}", expires, signature),
            ("", "", ""),
        ]
        for name_, expires_, signature_ in forged:
            with pytest.raises(NotFoundError):
                await links.read(name_, expires_, signature_)

    @pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "..", "a.png", "x" * 32 + ".svg", "x" * 32])
    async def test_no_name_but_ours_reaches_the_folder_not_even_a_signed_one(
        self, links: LocalLinks, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "secret.png").write_bytes(b"secret")
        expires = str(int(time.time()) + 60)
        with pytest.raises(NotFoundError):
            await links.read(name, expires, links._sign(name, expires))

    async def test_an_expired_link_says_so_before_and_after_its_file_is_removed(self, tmp_path: Path) -> None:
        links = LocalLinks(tmp_path, lifetime=-120)
        link = parts(await links.publish(b"x", PNG, BASE))
        with pytest.raises(LinkExpiredError):
            await links.read(*link)
        tidying = asyncio.create_task(links.run())
        await until(lambda: not files_in(tmp_path))
        tidying.cancel()
        with pytest.raises(LinkExpiredError):
            await links.read(*link)

    async def test_a_good_link_whose_file_is_gone_says_that(self, links: LocalLinks, tmp_path: Path) -> None:
        link = parts(await links.publish(b"x", PNG, BASE))
        (tmp_path / "links" / link[0]).unlink()
        with pytest.raises(LinkExpiredError, match="removed"):
            await links.read(*link)

    async def test_tidying_leaves_good_files_young_ones_and_what_is_not_ours(
        self, links: LocalLinks, tmp_path: Path
    ) -> None:
        folder = tmp_path / "links"
        good = parts(await links.publish(b"x", PNG, BASE))[0]
        being_written = folder / f"{'y' * 32}.png"
        being_written.write_bytes(b"")
        stranger = folder / "notes.txt"
        stranger.write_bytes(b"")
        os.utime(stranger, (0, 0))
        links._remove_expired()
        assert {path.name for path in folder.iterdir()} == {good, being_written.name, "notes.txt"}

    async def test_servers_with_one_secret_and_folder_open_each_other_s_links(self, tmp_path: Path) -> None:
        one, two, stranger = (LocalLinks(tmp_path, lifetime=60, secret=secret * 16) for secret in "aab")
        link = parts(await one.publish(b"x", PNG, BASE))
        assert (await two.read(*link)).content == b"x"
        with pytest.raises(NotFoundError):
            await stranger.read(*link)

    async def test_a_folder_that_cannot_be_written_is_our_fault_and_told_to_the_log_alone(
        self, backend: FakeBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_bytes(b"")
        async with in_memory(create_app(Config(link_folder=tmp_path / "file"), backend)) as client:
            answer = await client.post("/v1/images/generations", json={"prompt": "a fox", "response_format": "url"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert str(tmp_path) in caplog.text
        assert str(tmp_path) not in answer.text

    async def test_a_temporary_folder_goes_with_its_links(self) -> None:
        links = LocalLinks(None, lifetime=60)
        await links.publish(b"x", PNG, BASE)
        folder = links._folder
        assert folder.is_dir()
        del links
        assert not folder.exists()


class TestOverHttp:
    @pytest.fixture
    async def client(self, backend: FakeBackend, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
        config = Config(api_key=KEY, link_folder=tmp_path)
        async with in_memory(create_app(config, backend), headers={"Authorization": f"Bearer {KEY}"}) as client:
            yield client

    async def test_a_link_is_opened_without_a_key_and_gives_the_file(self, client: httpx.AsyncClient) -> None:
        body = {"prompt": "a", "n": 2, "response_format": "url", "output_format": "webp"}
        response = await client.post(GENERATIONS, json=body)
        images = response.json()["data"]
        assert all(set(image) == {"url", "revised_prompt", "seed"} for image in images)
        del client.headers["Authorization"]
        for image in images:
            assert image["url"].startswith("http://gateway/files/")
            file = await client.get(image["url"])
            assert (file.status_code, file.headers["content-type"]) == (200, "image/webp")
            assert file.content.startswith(b"RIFF")
            assert file.headers["cache-control"].startswith("private, max-age=3")
            assert file.headers["x-content-type-options"] == "nosniff"
            assert (await client.head(image["url"])).status_code == 200

    async def test_a_request_that_is_asked_again_leaves_one_file(
        self, client: httpx.AsyncClient, tmp_path: Path
    ) -> None:
        body = {"prompt": "a", "response_format": "url"}
        headers = {"Idempotency-Key": "k"}
        answers = [await client.post(GENERATIONS, json=body, headers=headers) for _ in range(2)]
        assert len(files_in(tmp_path)) == 1
        for answer in answers:
            assert (await client.get(answer.json()["data"][0]["url"])).status_code == 200

    @pytest.mark.parametrize("path", ["/files/x", "/files/x.png?expires=1&signature=x", "/files/../../etc/passwd"])
    async def test_anything_else_is_a_404_in_openai_s_shape(self, client: httpx.AsyncClient, path: str) -> None:
        response = await client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")

    async def test_an_expired_link_is_a_410_in_openai_s_shape(self, backend: FakeBackend, tmp_path: Path) -> None:
        async with in_memory(create_app(Config(link_folder=tmp_path, link_lifetime=0.001), backend)) as client:
            body = {"prompt": "a", "response_format": "url"}
            (image,) = (await client.post(GENERATIONS, json=body)).json()["data"]
            response = await client.get(image["url"])
        assert (response.status_code, response.json()["error"]["code"]) == (410, "link_expired")

    async def test_a_public_url_is_what_links_begin_with(self, backend: FakeBackend, tmp_path: Path) -> None:
        config = Config(link_folder=tmp_path, public_url="https://images.example.com/hypergen/")
        async with in_memory(create_app(config, backend)) as client:
            response = await client.post(GENERATIONS, json={"prompt": "a", "response_format": "url"})
        assert response.json()["data"][0]["url"].startswith("https://images.example.com/hypergen/files/")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that speaks S3, with an empty bucket `images`; boto3 finds it as it finds any."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "a-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-test's secret")
        patch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path_factory.mktemp("aws") / "none"))
        client = boto3.client("s3")
        client.create_bucket(Bucket="images", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        yield client
    server.stop()


class TestBucket:
    async def test_a_link_leads_to_the_file_in_the_bucket(self, s3: Any, backend: FakeBackend) -> None:
        config = Config(link_bucket="s3://images/made/here", link_lifetime=600)
        async with in_memory(create_app(config, backend)) as client:
            body = {"prompt": "a", "response_format": "url", "output_format": "jpeg"}
            (image,) = (await client.post(GENERATIONS, json=body)).json()["data"]
            assert (await client.get("/files/x.png")).status_code == 404
        (stored,) = s3.list_objects_v2(Bucket="images")["Contents"]
        assert stored["Key"].startswith("made/here/")
        assert stored["Key"] in image["url"]
        assert "X-Amz-Expires=600" in image["url"]
        async with httpx.AsyncClient() as client:
            file = await client.get(image["url"])
        assert (file.status_code, file.headers["content-type"]) == (200, "image/jpeg")
        assert file.content.startswith(b"\xff\xd8\xff")

    async def test_a_bucket_that_is_not_there_is_said_early_in_the_log_and_a_500_later(
        self, s3: Any, backend: FakeBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert s3
        app = create_app(Config(link_bucket="s3://nowhere"), backend)
        async with app.router.lifespan_context(app):
            await until(lambda: "cannot be used" in caplog.text, 20)
        assert "the bucket 'nowhere' for images cannot be used" in caplog.text
        async with in_memory(app) as client:
            response = await client.post(GENERATIONS, json={"prompt": "a", "response_format": "url"})
        assert response.status_code == 500
        assert "nowhere" not in response.text
