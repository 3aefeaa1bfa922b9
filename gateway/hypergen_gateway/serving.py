"""Implementation of the commands: start Triton, run the gateway or generate one image, and shut down in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
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
from hypergen_gateway.concurrency import cancel
from hypergen_gateway.config import Config
from hypergen_gateway.embedded.errors import EmbeddedError, ModelsNotLoadedError
from hypergen_gateway.embedded.export_cache import ExportOptions, find_repository
from hypergen_gateway.embedded.installation import find_installation
from hypergen_gateway.embedded.lora_folder import LoraFolder, served_copy
from hypergen_gateway.errors import UnavailableError
from hypergen_gateway.generation.backend import GeneratedImage, GenerationRequest, ModelDescription
from hypergen_gateway.generation.starting_backend import StartingBackend
from hypergen_gateway.http.addresses import listening, url_of
from hypergen_gateway.http.protocol import AcceptErrors, Listener, make_uvicorn_config, raise_file_limit
from hypergen_gateway.observability.logs import console
from hypergen_gateway.storage.lora_files import LoraFiles
from hypergen_gateway.triton.client import TritonBackend

if TYPE_CHECKING:
    from hypergen_gateway.embedded.supervisor import EmbeddedTriton
    from hypergen_gateway.observability.tracing import Tracing

logger = logging.getLogger(__name__)
T = TypeVar("T")

SAME_SIGNAL_SECONDS = 1.0
# Images being generated when the server is told to stop get this long; then their clients get an error.
DRAIN_SECONDS = 120
# An embedded Triton restarts within this time, with a model of moderate size; requests wait for it meanwhile.
RESTART_SECONDS = 30
# The example prompt for models that suggest none.
DEFAULT_PROMPT = "a lighthouse at dusk"
EDIT_PROMPT = "make it snow"
SUGGESTIONS_SHOWN = 5
TRACE_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# Enough for one image of the largest model on the slowest machine.
GENERATE_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Which Triton to use: the one at `url`, or an embedded one that serves `model`, exported if necessary."""

    model: str
    url: str | None
    export: ExportOptions | None


class ClipSkipError(Exception):
    """The default of `clip_skip` does not fit the model; `str()` is the message for the user."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """All settings of `hypergen serve`."""

    host: str
    port: int
    triton: TritonOptions
    gateway: Config


async def serve(options: ServeOptions) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Requests in progress are finished first, unless a second signal arrives.

    Until the embedded Triton has loaded the model, requests get a 503. So they do until an external one can be
    reached, which may start later than the gateway.

    Raises:
        PortUnavailableError, ExportFailedError, EmbeddedError, ClipSkipError: before an image could be generated.
    """
    raise_file_limit()
    # Before the engines are exported and loaded, so that a busy port is reported at once.
    with listening(options.host, options.port) as listeners:
        backend = StartingBackend()
        app = create_app(options.gateway, backend, _tracing())
        async with (
            _http_server(app, listeners, options.gateway.keep_alive) as server,
            connected(options.triton, options.gateway.request_timeout) as started,
        ):
            greeting = await _greeting(options, started)
            backend.hand_over_to(started)
            console.info(greeting)
            with _on_stop_signals(server.stop, server.stop_now):
                # If this is cancelled, the server is still told to stop, below.
                await asyncio.shield(server.ended)


def _tracing() -> Tracing | None:
    """Tracing, if OpenTelemetry's variables name an endpoint."""
    if not any(os.environ.get(name) for name in TRACE_ENDPOINTS):
        return None
    try:
        from hypergen_gateway.observability.tracing import Tracing
    except ImportError as error:
        logger.warning("Tracing is off because %s is not installed: pip install 'hypergen-triton[otel]'", error.name)
        return None
    return Tracing()


async def generate_image(options: TritonOptions, fields: dict[str, Any]) -> GeneratedImage:
    """One image, without a gateway. `fields` holds fields of `GenerationRequest`; the model fills in the rest."""
    async with connected(options, GENERATE_SECONDS) as backend:
        try:
            generation = complete(
                fields, await backend.describe(), with_lora=bool(options.export and options.export.loras)
            )
        except UnavailableError as error:
            raise UnavailableError(f"No model is available at {options.url} ({error.detail}).") from error
        console.info(f"Generating in {generation.num_inference_steps} steps …")
        async with contextlib.aclosing(backend.generate(generation)) as images:
            return await anext(images)


def run_until_signalled(work: Coroutine[Any, Any, T], clock: Callable[[], float] = time.monotonic) -> T:
    """The result of `work`. A stop signal cancels it, so that everything it opened is closed in order."""
    return asyncio.run(_cancelled_by_signals(work, clock))


async def _cancelled_by_signals(work: Coroutine[Any, Any, T], clock: Callable[[], float]) -> T:
    task = asyncio.ensure_future(work)
    with _on_stop_signals(task.cancel, clock=clock):
        return await task


@contextlib.contextmanager
def _on_stop_signals(*steps: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Call the next of `steps` on each stop signal within the context; one more signal ends the process at once.

    After the context one signal is ignored, as the shutdown has begun. Some programs, such as `timeout`, send a signal
    twice, so signals within `SAME_SIGNAL_SECONDS` of each other count as one.
    """
    loop = asyncio.get_running_loop()
    left = list(steps)
    last = -math.inf

    def on_signal(number: signal.Signals) -> None:
        nonlocal last
        now = clock()
        if now - last < SAME_SIGNAL_SECONDS:
            return
        last = now
        if left:
            left.pop(0)()
        else:
            _end_at_once(number)

    for number in _stop_signals():
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        left[:] = [lambda: None]


def _stop_signals() -> list[signal.Signals]:
    """The signals that end a server, without SIGHUP if it is ignored, as under nohup."""
    is_detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_detached else [signal.SIGHUP])]


def _end_at_once(number: signal.Signals) -> None:
    """End as if the signal were not handled. Triton gets a SIGTERM; the next start removes its leftovers."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextlib.asynccontextmanager
async def connected(options: TritonOptions, request_timeout: float) -> AsyncIterator[TritonBackend]:
    async with contextlib.AsyncExitStack() as stack:
        if options.url is not None:
            backend = TritonBackend(options.url, request_timeout=request_timeout)
        else:
            triton = await stack.enter_async_context(_embedded(options))
            backend = TritonBackend(triton.url, request_timeout=request_timeout, retry_seconds=RESTART_SECONDS)
            triton.at_work = lambda: backend.at_work
        stack.push_async_callback(backend.close)
        if options.export is not None and options.export.lora_dir is not None:
            LoraFiles(options.export.lora_dir).remove_abandoned()
            loras = LoraFolder(options.export.lora_dir, triton.repository, backend)
            stack.push_async_callback(cancel, asyncio.create_task(loras.follow()))
        yield backend


@contextlib.asynccontextmanager
async def _embedded(options: TritonOptions) -> AsyncIterator[EmbeddedTriton]:
    find_installation()
    # Imported here, as a gateway in front of an external Triton is installed without these dependencies.
    try:
        from hypergen_gateway.embedded.supervisor import embedded_triton, prepare_machine
    except ImportError as error:
        raise EmbeddedError(
            f"The embedded Triton needs {error.name}: pip install 'hypergen-triton[all]', or use --triton-url."
        ) from error

    assert options.export is not None
    # Report what Triton lacks before an export that may take long.
    prepare_machine()
    repository = await find_repository(options.model, options.export)
    began = time.monotonic()
    console.info("Starting Triton …")
    # LoRAs of a folder are written into the served repository, which another server may share.
    served = contextlib.nullcontext(repository) if options.export.lora_dir is None else served_copy(repository)
    try:
        with served as folder:
            async with embedded_triton(folder) as triton:
                seconds = time.monotonic() - began
                console.info(f"Triton is ready after {seconds:.1f} s: gRPC on {triton.url}, {triton.metrics_url}")
                yield triton
    except ModelsNotLoadedError as error:
        if repository.parent != options.export.cache_dir:
            raise
        # Not removed automatically: running out of memory looks the same, and an export may take an hour.
        advice = f"If the export is damaged, remove {repository} to export again."
        raise EmbeddedError(f"{str(error).rstrip('.')}. {advice}") from error


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before Triton is stopped."""

    ended: asyncio.Task[None]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Finish the requests in progress and accept no new ones."""
        self.should_exit = True  # first, as the terminal may be gone and logging fail
        console.info("Stopping: finishing requests in progress")

    def stop_now(self) -> None:
        """Cancel the requests in progress."""
        self.force_exit = True
        console.info("Stopping now: cancelling requests in progress")


@contextlib.asynccontextmanager
async def _http_server(app: Any, listeners: list[socket.socket], keep_alive: float) -> AsyncIterator[_Server]:
    """Serves the application until the end of the context, or until it is told to stop."""
    server = _Server(make_uvicorn_config(app, keep_alive=keep_alive, timeout_graceful_shutdown=DRAIN_SECONDS))
    asyncio.get_running_loop().set_exception_handler(AcceptErrors())
    sockets: list[socket.socket] = [Listener(fileno=listener.detach()) for listener in listeners]
    server.ended = asyncio.create_task(server.serve(sockets=sockets))
    try:
        yield server
    finally:
        server.should_exit = True
        await server.ended


def complete(fields: dict[str, Any], description: ModelDescription, *, with_lora: bool) -> GenerationRequest:
    defaults: dict[str, Any] = {
        "width": description.default_width,
        "height": description.default_height,
        "num_inference_steps": description.default_num_inference_steps,
        "guidance_scale": description.default_guidance_scale,
    }
    if with_lora:
        defaults |= {"lora": (description.loras[0].name,), "lora_scale": (description.loras[0].scale,)}
    return GenerationRequest(**(defaults | {name: value for name, value in fields.items() if value is not None}))


async def _greeting(options: ServeOptions, backend: TritonBackend) -> str:
    """The address of the server and a command to try, ready to be copied. Never contains the key."""
    url = url_of(options.host, options.port)
    try:
        description = await backend.describe()
    except UnavailableError as error:
        waiting = f"No model is available at {options.triton.url} yet ({error.detail}): until then requests get a 503"
        return f"Serving on {url}/v1, playground on {url}\n{waiting}"
    _check_clip_skip(options.gateway, description)
    model = options.gateway.model_id or description.model_id
    curl = _curl_line(url, options.gateway, description)
    details = [
        description.device,
        *(["with an API key"] if options.gateway.needs_key else []),
        *(f"with the LoRA {lora.name} at {lora.scale:g}" for lora in description.loras),
    ]
    made_from = f"\n{_describe(description)}" if description.base_model else ""
    return (
        f"Serving {model} on {url}/v1 ({', '.join(details)})"
        f"{made_from}"
        f"\n\nPlayground: {url}"
        f"\n\n{'Edit' if description.edits_by_instruction else 'Generate'} an image:\n{curl}\n"
        f"{_format_suggestions(description.suggestions)}"
    )


def _check_clip_skip(gateway: Config, model: ModelDescription) -> None:
    """Raise ClipSkipError for a default that the model has too few layers for; one without such layers has none."""
    most = model.max_clip_skip
    if gateway.clip_skip is not None and 0 < most < gateway.clip_skip:
        raise ClipSkipError(f"--clip-skip: must be from 0 to {most} for this model, not {gateway.clip_skip}")


def _describe(model: ModelDescription) -> str:
    """What a single file is made from, and what it can do."""
    can = ["text to image", *(["image to image and inpainting"] if "vae_encoder" in model.components else [])]
    if model.edits_by_instruction:
        can = ["edits by instruction"]
    return f"{model.base_model}: {', '.join(can)}; {model.default_width}x{model.default_height} by default"


def _format_suggestions(prompts: Sequence[str]) -> str:
    """A few prompts spread over the list, without the first, which the curl command uses; empty if there are none."""
    step = len(prompts) // (SUGGESTIONS_SHOWN + 1) | 1  # odd, as colours alternate in some lists
    few = prompts[step::step][:SUGGESTIONS_SHOWN]
    return "\nOther prompts:\n" + "".join(f"  {prompt}\n" for prompt in few) if few else ""


def _curl_line(url: str, gateway: Config, model: ModelDescription) -> str:
    """A command that saves an image or prints the error, in any shell."""
    prompts = model.suggestions
    decode = (
        # Without a response, curl or the shell has printed the reason.
        "import base64, json, sys; answer = json.loads(sys.stdin.read() or sys.exit(1)); "
        'sys.exit(answer["error"]["message"]) if "error" in answer else '
        'sys.stdout.buffer.write(base64.b64decode(answer["data"][0]["b64_json"]))'
    )
    if model.edits_by_instruction:
        prompt = shlex.quote(f"prompt={prompts[0] if prompts else EDIT_PROMPT}")
        route, content = "edits", f"-F image=@input.png --form-string {prompt}"
    else:
        body = json.dumps({"prompt": prompts[0] if prompts else DEFAULT_PROMPT}, ensure_ascii=False)
        route, content = "generations -H 'Content-Type: application/json'", f"-d {shlex.quote(body)}"
    return (
        f"  curl -sS {url}/v1/images/{route} \\\n"
        f"{_key_line(gateway)}"
        f"    {content} \\\n"
        f"    | python3 -c '{decode}' > image.png"
    )


def _key_line(gateway: Config) -> str:
    """The line of the command that sends the API key, read from the server's own source; empty without one."""
    if not gateway.needs_key:
        return ""
    if gateway.api_key_file is None or not gateway.api_key_file.is_file():
        return '    -H "Authorization: Bearer ${HYPERGEN_API_KEY:?set it to the API key}" \\\n'
    # The last word of the first line with a key.
    first = f"awk '!/^[[:space:]]*(#|$)/ {{print $NF; exit}}' {shlex.quote(str(gateway.api_key_file.absolute()))}"
    return f'    -H "Authorization: Bearer $({first})" \\\n'
