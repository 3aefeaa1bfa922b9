"""A minimal OTLP collector over HTTP that receives spans, parsed with OpenTelemetry's protobuf messages.

Python's SDK sends protobuf; Triton sends JSON, in which ids are in hexadecimal rather than in protobuf's base64.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class SpanReceiver(ThreadingHTTPServer):
    """Its `spans` are those of each service that has sent some."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: dict[str, list[Span]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource_spans in request.resource_spans:
            attributes = {each.key: each.value.string_value for each in resource_spans.resource.attributes}
            known = self.spans.setdefault(attributes.get("service.name", ""), [])
            known += [span for scope_spans in resource_spans.scope_spans for span in scope_spans.spans]


class _Handler(BaseHTTPRequestHandler):
    server: SpanReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        is_json = self.headers["Content-Type"].startswith("application/json")
        self.server.take(_read_json(body) if is_json else ExportTraceServiceRequest.FromString(body))
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def _read_json(body: bytes) -> ExportTraceServiceRequest:
    ids = re.compile(rb'("(?:traceId|spanId|parentSpanId)"\s*:\s*")([0-9a-fA-F]+)')
    encoded = ids.sub(lambda match: match[1] + base64.b64encode(bytes.fromhex(match[2].decode())), body)
    request = ExportTraceServiceRequest()
    ParseDict(json.loads(encoded), request, ignore_unknown_fields=True)
    return request


@contextmanager
def span_receiver() -> Iterator[SpanReceiver]:
    with SpanReceiver() as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield receiver
        receiver.shutdown()
