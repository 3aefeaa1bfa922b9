"""A trace from the client through the gateway into the embedded Triton, as a collector gets it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from support.running_server import KEY, start_server, stop_server
from support.span_receiver import span_receiver

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_gateway_and_triton_tell_of_one_request_in_one_trace(
    checkpoint: Path, exported: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exported.parent == cache_dir
    with span_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        server = start_server("--dtype", "float32", "--cache-dir", str(cache_dir), model=str(checkpoint))
        headers = {"Authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        body = {"prompt": "cat", "num_inference_steps": 2}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200
        assert stop_server(server) == 0
    gateway, triton = receiver.spans["hypergen-gateway"], receiver.spans["hypergen-triton"]
    assert {span.trace_id.hex() for span in [*gateway, *triton]} == {TRACE}
    (request,) = [span for span in gateway if span.parent_span_id.hex() == PARENT]
    (inference,) = [span for span in triton if span.name == "InferRequest"]
    assert inference.parent_span_id == request.span_id
    assert "diffusion" in {span.name for span in triton}
    phases = {span.name for span in gateway} - {request.name, "image"}
    assert phases == {"queue", "text encoder", "denoising", "decoder", "file"}
