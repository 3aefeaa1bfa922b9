"""What the commands do: bring up Triton, put the gateway in front of it or ask it for a picture, and end in order.

Knows asyncio, uvicorn and signals. The options' words are the command line's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from hypergen_gateway.app import create_app
from hypergen_gateway.config import Config
from hypergen_gateway.embedded.errors import EmbeddedError, ModelsNotLoadedError
from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository
from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest, Lora, ModelDescription
from hypergen_gateway.http.addresses import listening, url_of
from hypergen_gateway.http.protocol import AcceptErrors, Listener, allow_open_files, bounded
from hypergen_gateway.observability.logs import console
from hypergen_gateway.triton.client import TritonBackend

if TYPE_CHECKING:
    from hypergen_gateway.embedded.supervisor import EmbeddedTriton
    from hypergen_gateway.observability.tracing import Tracing

logger = logging.getLogger(__name__)
T = TypeVar("T")

SAME_SIGNAL_SECONDS = 1.0
# Pictures in the making when the server is told to stop get this long; then their clients get an error.
DRAIN_SECONDS = 120
# An embedded Triton that died or hung is back by then, with a model of moderate size; who waited for it need not know.
RETURN_SECONDS = 30
# A model that brings no prompts of its own is asked for this.
ANY_PROMPT = "a lighthouse at dusk"
SUGGESTIONS_SHOWN = 5
TRACE_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# One picture of the largest model on the slowest machine.
DRAW_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Which Triton to use: one that runs at `url`, else an embedded one serving `model`, exported if need be."""

    model: str
    url: str | None
    export: ExportOptions | None


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Everything `hypergen serve` was told."""

    host: str
    port: int
    triton: TritonOptions
    gateway: Config


async def serve(options: ServeOptions) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; pictures in the making are finished first, unless another one comes.

    Another's Triton may come later than the gateway; until it does, requests get a 503.

    Raises:
        PortUnavailableError, ExportFailedError, EmbeddedError: before anything is served.
    """
    allow_open_files()
    # Bound before the engines are loaded: a busy port is known at once.
    with listening(options.host, options.port) as listeners:
        async with _connected(options.triton, options.gateway.request_timeout) as backend:
            console.info(await _greeting(options, backend))
            await _serve_http(create_app(options.gateway, backend, _tracing()), listeners, options.gateway.keep_alive)


def _tracing() -> Tracing | None:
    """Traces, where OpenTelemetry's own variables name an endpoint."""
    if not any(os.environ.get(name) for name in TRACE_ENDPOINTS):
        return None
    try:
        from hypergen_gateway.observability.tracing import Tracing
    except ImportError as error:
        logger.warning("There will be no traces without %s: pip install 'hypergen-triton[otel]'", error.name)
        return None
    return Tracing()


async def draw(options: TritonOptions, wanted: dict[str, Any]) -> GeneratedImage:
    """One image, without a gateway. `wanted` holds fields of `GenerationRequest`; the model fills in the rest."""
    async with _connected(options, DRAW_SECONDS) as backend:
        try:
            generation = _complete(
                wanted, await backend.describe(), with_lora=bool(options.export and options.export.loras)
            )
        except UnavailableError as error:
            raise UnavailableError(f"No model answers on {options.url} ({error.detail}).") from error
        console.info(f"Drawing in {generation.num_inference_steps} steps …")
        async with contextlib.aclosing(backend.generate(generation)) as pictures:
            return await anext(pictures)


def run_until_signalled(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; a signal to stop cancels it, so that everything it opened is closed in order."""
    return asyncio.run(_cancelled_by_signals(work))


async def _cancelled_by_signals(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    with _signals_call(task.cancel):
        return await task


@contextlib.contextmanager
def _signals_call(*steps: Callable[[], object]) -> Iterator[None]:
    """While it lasts, each signal to stop calls the next of `steps`; one more ends the process as it is.

    Afterwards the end is under way, and takes its time once. Some programs, such as `timeout`, send a signal twice:
    what comes within `SAME_SIGNAL_SECONDS` of another is the same.
    """
    loop = asyncio.get_running_loop()
    left = list(steps)
    last = -SAME_SIGNAL_SECONDS

    def on_signal(number: signal.Signals) -> None:
        nonlocal last
        if loop.time() - last < SAME_SIGNAL_SECONDS:
            return
        last = loop.time()
        if left:
            left.pop(0)()
        else:
            _end_at_once(number)

    for number in _stopping_signals():
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        left[:] = [lambda: None]


def _stopping_signals() -> list[signal.Signals]:
    """Those that end a server. Not SIGHUP where whoever started it has it ignored, as nohup does."""
    is_detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_detached else [signal.SIGHUP])]


def _end_at_once(number: signal.Signals) -> None:
    """As if nobody had handled the signal. Triton gets a SIGTERM then; the next start removes what is left of it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextlib.asynccontextmanager
async def _connected(options: TritonOptions, request_timeout: float) -> AsyncIterator[TritonBackend]:
    async with contextlib.AsyncExitStack() as stack:
        if options.url is not None:
            backend = TritonBackend(options.url, request_timeout=request_timeout)
        else:
            triton = await stack.enter_async_context(_embedded(options))
            backend = TritonBackend(triton.url, request_timeout=request_timeout, returns_within=RETURN_SECONDS)
            triton.at_work = lambda: backend.at_work
        stack.push_async_callback(backend.close)
        yield backend


@contextlib.asynccontextmanager
async def _embedded(options: TritonOptions) -> AsyncIterator[EmbeddedTriton]:
    # What is missing is known before an export that may take long.
    find_installation()
    # Imported here, because a gateway in front of another Triton is installed without what this needs.
    try:
        from hypergen_gateway.embedded.supervisor import embedded_triton
    except ImportError as error:
        raise EmbeddedError(
            f"An embedded Triton needs {error.name}: pip install 'hypergen-triton[all]', or use --triton-url."
        ) from error

    assert options.export is not None
    repository = await find_repository(options.model, options.export)
    began = time.monotonic()
    console.info("Starting Triton …")
    try:
        async with embedded_triton(repository) as triton:
            seconds = time.monotonic() - began
            console.info(f"Triton is ready after {seconds:.1f} s: gRPC on {triton.url}, {triton.metrics_url}")
            yield triton
    except ModelsNotLoadedError as error:
        if repository.parent != options.export.cache_dir:
            raise
        # Not removed unasked: short memory looks the same, and an export may take an hour.
        advice = f"If the export is damaged, remove {repository} to have it made again."
        raise EmbeddedError(f"{str(error).rstrip('.')}. {advice}") from error


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process before Triton is stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Finish the requests under way, refuse new ones."""
        self.should_exit = True  # first: nobody may be left to read what is said
        console.info("Stopping: pictures under way are finished first")

    def stop_now(self) -> None:
        """Give up the requests under way."""
        self.force_exit = True
        console.info("Stopping now: pictures under way are given up")


async def _serve_http(app: Any, listeners: list[socket.socket], keep_alive: float) -> None:
    server = _Server(bounded(app, keep_alive=keep_alive, timeout_graceful_shutdown=DRAIN_SECONDS))
    asyncio.get_running_loop().set_exception_handler(AcceptErrors())
    with _signals_call(server.stop, server.stop_now):
        await server.serve(sockets=[Listener(fileno=listener.detach()) for listener in listeners])


def _complete(wanted: dict[str, Any], description: ModelDescription, *, with_lora: bool) -> GenerationRequest:
    defaults: dict[str, Any] = {
        "width": description.default_width,
        "height": description.default_height,
        "num_inference_steps": description.default_num_inference_steps,
        "guidance_scale": description.default_guidance_scale,
    }
    if with_lora:
        defaults |= {"lora": description.loras[0].name, "lora_scale": description.loras[0].scale}
    return GenerationRequest(**(defaults | {name: value for name, value in wanted.items() if value is not None}))


async def _greeting(options: ServeOptions, backend: TritonBackend) -> str:
    """Where the server is and what to do next, ready to be copied. Never shows the key."""
    url = url_of(options.host, options.port)
    try:
        description = await backend.describe()
    except UnavailableError as error:
        waiting = f"No model answers on {options.triton.url} yet ({error.detail}): requests get a 503 until one does"
        return f"Serving on {url}/v1, a page to try it on {url}\n{waiting}"
    model = options.gateway.model_id or description.model_id
    curl = _curl_line(url, options.gateway, description.suggestions)
    details = [
        description.device,
        *(["with an API key"] if options.gateway.needs_key else []),
        *_lora_names(description.loras),
    ]
    return (
        f"Serving {model} on {url}/v1 ({', '.join(details)})"
        f"\n\nA page to try it on: {url}"
        f"\n\nA picture:\n{curl}\n{_suggested(description.suggestions)}"
    )


def _lora_names(loras: Sequence[Lora]) -> list[str]:
    return [f"with the LoRA {lora.name} at {lora.scale:g}" for lora in loras]


def _suggested(prompts: Sequence[str]) -> str:
    """A few prompts from all over the list but the first, which is in the curl line; nothing where there are none."""
    step = len(prompts) // (SUGGESTIONS_SHOWN + 1) | 1  # odd, for lists whose colours take turns
    few = prompts[step::step][:SUGGESTIONS_SHOWN]
    return "\nOther prompts:\n" + "".join(f"  {prompt}\n" for prompt in few) if few else ""


def _curl_line(url: str, gateway: Config, prompts: Sequence[str]) -> str:
    """A command that saves an image, or says what went wrong, in any shell."""
    decode = (
        # Without an answer, curl or the shell has said why.
        "import base64, json, sys; answer = json.loads(sys.stdin.read() or sys.exit(1)); "
        'sys.exit(answer["error"]["message"]) if "error" in answer else '
        'sys.stdout.buffer.write(base64.b64decode(answer["data"][0]["b64_json"]))'
    )
    body = shlex.quote(json.dumps({"prompt": prompts[0] if prompts else ANY_PROMPT}, ensure_ascii=False))
    return (
        f"  curl -sS {url}/v1/images/generations -H 'Content-Type: application/json' \\\n"
        f"{_key_line(gateway)}"
        f"    -d {body} \\\n"
        f"    | python3 -c '{decode}' > picture.png"
    )


def _key_line(gateway: Config) -> str:
    """The line of the command that sends a key, from where the server has it; nothing without one."""
    if not gateway.needs_key:
        return ""
    if gateway.api_key_file is None or not gateway.api_key_file.is_file():
        return '    -H "Authorization: Bearer ${HYPERGEN_API_KEY:?first set it to the key}" \\\n'
    # The last word of the first line that holds a key.
    first = f"awk '!/^[[:space:]]*(#|$)/ {{print $NF; exit}}' {shlex.quote(str(gateway.api_key_file.absolute()))}"
    return f'    -H "Authorization: Bearer $({first})" \\\n'
