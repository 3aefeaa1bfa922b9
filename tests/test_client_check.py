"""The parts of `make clients`: the recording relay, the check of responses, and the report page."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clients import driving, judging
from clients.check import Client, all_clients
from clients.judging import References, WrongImageError
from clients.relay import parse, relay_to
from support.image_files import file_of
from world import COLOURS

PAGE = (Path(__file__).parents[1] / "docs/clients.md").read_text(encoding="utf-8")


def plain(colour: str, side: int = 64, mark: tuple[int, int, int] = (90, 90, 90)) -> Image.Image:
    """A background with something in its middle: a rocket, if it is grey."""
    image = Image.new("RGB", (side, side), COLOURS[colour])
    image.paste(mark, (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    return image


REFERENCES = References([np.asarray(plain("yellow"))], [np.asarray(plain("yellow", mark=(200, 20, 20)))])


class TestJudge:
    def test_what_was_asked_for_passes_at_any_size(self) -> None:
        judging.check_rocket(plain("yellow", 1024), REFERENCES)
        judging.check_size(plain("yellow", 1024), "1024x1024", judging.NATIVE)
        judging.check_size(plain("yellow"), "auto", judging.NATIVE)

    def test_another_size_is_named(self) -> None:
        with pytest.raises(WrongImageError, match="64×64 instead of 1024×1024"):
            judging.check_size(plain("yellow"), "1024x1024", judging.NATIVE)

    def test_another_background_is_named(self) -> None:
        with pytest.raises(WrongImageError, match="on green instead of yellow"):
            judging.check_rocket(plain("green"), REFERENCES)

    def test_another_thing_is_no_rocket(self) -> None:
        with pytest.raises(WrongImageError, match="no rocket"):
            judging.check_rocket(plain("yellow", mark=(200, 10, 10)), REFERENCES)

    def test_an_edit_keeps_what_the_mask_keeps(self) -> None:
        before, after = plain("yellow", 512), plain("blue", 512)
        with pytest.raises(WrongImageError, match="has changed"):
            judging.check_edit(after, before, masked=True)
        judging.check_edit(after, before, masked=False)
        after.paste(before.crop((0, 0, 128, 512)), (0, 0))
        judging.check_edit(after, before, masked=True)

    def test_an_edit_that_changed_nothing_is_found(self) -> None:
        with pytest.raises(WrongImageError, match="yellow instead of blue"):
            judging.check_edit(plain("yellow"), plain("yellow"), masked=False)

    def test_a_variation_is_not_the_image_itself(self) -> None:
        with pytest.raises(WrongImageError, match="the image itself"):
            judging.check_variation(plain("yellow"), plain("yellow"), REFERENCES)

    def test_what_is_no_image_is_said(self) -> None:
        with pytest.raises(WrongImageError, match="no image"):
            judging.decode(b"nothing")


def test_images_are_taken_as_bytes_as_base64_and_as_data_urls() -> None:
    file = file_of(plain("yellow"))
    text = base64.b64encode(file).decode()
    assert [driving.content(image) for image in (file, text, f"data:image/png;base64,{text}")] == [file] * 3
    with pytest.raises(TypeError, match="no image came back"):
        driving.content(None)


class TestRelay:
    @pytest.fixture
    def echo(self) -> Iterator[int]:
        """A server that sends back what it gets; its port."""
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                client, _ = listener.accept()
                with client:
                    while data := client.recv(65536):
                        client.sendall(data)

            threading.Thread(target=serve, daemon=True).start()
            yield listener.getsockname()[1]

    def test_bytes_pass_as_they_are_and_are_kept(self, echo: int) -> None:
        said = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n\r\n\x00\xff"
        with relay_to("127.0.0.1", echo) as relay:
            with socket.create_connection(("127.0.0.1", relay.port)) as client:
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                heard = b"".join(iter(lambda: client.recv(65536), b""))
            assert heard == said
            assert [request.target for request in relay.requests()] == ["/v1/images/generations"]

    def test_a_request_that_asks_for_another_protocol_does_not_hide_the_next(self) -> None:
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        )
        body = json.dumps({"size": "1024x1024"})
        one = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        found = list(parse((one * 2).encode()))
        assert [(request.headers["upgrade"], request.fields["size"]) for request in found] == [("h2c", "1024x1024")] * 2

    def test_a_form_gives_its_fields_and_the_names_of_its_files(self) -> None:
        parts = [
            "Content-Disposition: form-data; name=prompt\r\n\r\na fox",
            'Content-Disposition: form-data; name="image[]"; filename=a.png\r\nContent-Type: \r\n\r\n\x00\r\n',
        ]
        body = "".join(f"--b=1\r\n{part}\r\n" for part in parts) + "--b=1--\r\n"
        head = 'POST / HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary="b=1"\r\n'
        (request,) = parse(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert request.fields == {"prompt": "a fox"}
        assert request.files == {"image[]"}


@pytest.mark.parametrize("client", all_clients(), ids=lambda client: client.name)
def test_the_page_has_each_client_with_what_it_is_held_to(client: Client) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {client.name} | {client.release} |")]
    assert "fails" not in line
