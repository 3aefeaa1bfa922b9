"""Rules about event streams, including faults that make OpenAI's Python client fail."""

from __future__ import annotations

from collections.abc import Sequence

from hypergen_gateway.conformance.rules import Area, need
from hypergen_gateway.conformance.server import Server
from hypergen_gateway.conformance.shapes import Event, describe_images, events_of, expect_error, image_in, offered

AREA = Area("streams")
PARTIAL = "image_generation.partial_image"
COMPLETED = "image_generation.completed"
_COMMON = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}


@AREA.rule("`stream: true` returns server-sent events")
def _(server: Server) -> str:
    events = _events(server)
    return f"{len(events)} events"


@AREA.rule("every event has its type both in `event:` and in its data")
def _(server: Server) -> str:
    for event in _events(server):
        need(f"event: {event.type}" in event.lines, " ".join(event.lines)[:80])
    return ", ".join(sorted({event.type for event in _events(server)}))


@AREA.rule("no `id:`, no `retry:`, no `[DONE]`, no event without data: they break or mislead clients")
def _(server: Server) -> str:
    lines = [line for event in _events(server) for line in event.lines]
    wrong = [line for line in lines if line.startswith(("id:", "retry:")) or "[DONE]" in line]
    need(not wrong, ", ".join(wrong))
    need(all(event.data for event in _events(server)), "an event without data")
    return "none"


@AREA.rule("no event types that OpenAI does not have: clients treat them as images")
def _(server: Server) -> str:
    unknown = {event.type for event in _events(server)} - {PARTIAL, COMPLETED}
    need(not unknown, ", ".join(sorted(unknown)))
    return "none"


@AREA.rule("the stream ends with the complete image and its usage")
def _(server: Server) -> str:
    last = _events(server)[-1]
    need(last.type == COMPLETED, f"the last event is {last.type}")
    missing = (_COMMON | {"usage"}) - last.data.keys()
    need(not missing, f"without {', '.join(sorted(missing))}")
    return describe_images([image_in(last.data["b64_json"])])


@AREA.rule("`partial_images: 2` sends one or two previews first, numbered from 0")
def _(server: Server) -> str:
    previews = _previews(_events(server))
    indices = [event.data.get("partial_image_index") for event in previews]
    need(indices in ([0], [0, 1]), f"previews {indices}")
    return f"previews {indices}"


@AREA.rule("a preview is an image of the same size, with the same fields")
def _(server: Server) -> str:
    events = _events(server)
    final = image_in(events[-1].data["b64_json"])
    previews = _previews(events)
    need(previews, "no previews")
    for event in previews:
        missing = _COMMON - event.data.keys()
        need(not missing, f"without {', '.join(sorted(missing))}")
        need(image_in(event.data["b64_json"]).size == final.size, "another size")
    return describe_images([image_in(event.data["b64_json"]) for event in previews])


@AREA.rule("without `partial_images` there are no previews")
def _(server: Server) -> str:
    types = [event.type for event in events_of(offered(server.generate(stream=True), "stream"))]
    need(types == [COMPLETED], ", ".join(types))
    return COMPLETED


@AREA.rule("`n: 2` in a stream sends two complete images")
def _(server: Server) -> str:
    events = events_of(offered(server.generate(stream=True, n=2), "stream"))
    finished = [event for event in events if event.type == COMPLETED]
    need(len(finished) == 2, f"{len(finished)} finished")
    return describe_images([image_in(event.data["b64_json"]) for event in finished])


@AREA.rule("an invalid request is rejected before the stream starts")
def _(server: Server) -> str:
    return expect_error(server.generate(stream=True, size="nonsense"), 400, param="size")


def _events(server: Server) -> list[Event]:
    events = events_of(offered(server.stream, "stream"))
    need(events, "no events")
    return events


def _previews(events: Sequence[Event]) -> list[Event]:
    return [event for event in events[:-1] if event.type == PARTIAL]
