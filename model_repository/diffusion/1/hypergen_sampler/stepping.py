"""Step-level continuous batching: one loop advances all active images by one step per iteration.

Images with equal input shapes share denoiser calls whatever their prompt, seed, step, guidance or scheduler; they join
and leave between iterations. The loop runs in its own thread and calls the denoiser from there: through the event loop,
every step would wait for two more thread wake-ups. Does not depend on Triton.

Triton's dynamic batcher cannot do this for a loop that sends its next request only after the last response: such
requests split into cohorts that never merge again, and every change of size breaks a batch.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from hypergen_sampler.conditioning import Array
from hypergen_sampler.request import QueueFullError
from hypergen_sampler.sampling import DenoiserInputs, Trajectory

Denoiser = Callable[[DenoiserInputs], Mapping[str, Array]]

# Concurrent denoiser calls in one iteration, for batches that differ in input shapes or model.
MAX_CONCURRENT_CALLS = 8
# Seconds between checks for cancelled requests; each takes a round trip to Triton.
POLL_SECONDS = 0.05


class ClientGoneError(Exception):
    """The client has disconnected."""


@dataclass(frozen=True)
class LatentsOutput:
    """Latents [C, h, w] to decode: an image's final latents or a preview of them.

    `waited` and `took` are the seconds that the image spent in the queue and in its steps so far; `made` is the time.
    """

    latents: Array
    step: int
    is_final: bool
    waited: float
    took: float
    made: float


@dataclass(frozen=True, kw_only=True)
class IterationStats:
    """The work of one iteration, and the images that remain: `active` ones and those `waiting` in the queue."""

    active: int
    waiting: int
    denoiser_calls: int
    denoiser_rows: int
    denoiser_seconds: float
    steps: int
    """Steps of all images."""
    saved_steps: int
    """Remaining steps of cancelled images."""


@dataclass(frozen=True)
class _BatchStats:
    rows: int
    steps: int
    seconds: float


@dataclass(eq=False)
class _QueueEntry:
    """An image in the loop. `sample` reads its `outcomes`; the loop never blocks on them."""

    trajectory: Trajectory
    cancelled: Callable[[], bool]
    outcomes: asyncio.Queue[LatentsOutput | BaseException] = field(default_factory=asyncio.Queue)
    events: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    over: bool = False
    """Whether the last outcome has been put: the final latents or an error."""
    end: BaseException | None = None
    """Why the image takes no further step: `sample` was closed, or the client has disconnected."""
    joined: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0

    def next_inputs(self) -> DenoiserInputs | None:
        """The inputs of the image's next step; None if they cannot be made, which fails this image alone."""
        try:
            return self.trajectory.denoiser_inputs()
        except Exception as error:
            self.fail(error)
            return None

    def advance(self, outputs: Mapping[str, Array]) -> None:
        try:
            self.trajectory.advance(outputs)
        except Exception as error:
            self.fail(error)
            return
        if self.trajectory.preview is not None:
            self._put_latents(self.trajectory.preview)
        if self.trajectory.finished:
            self._put_latents(self.trajectory.latents)
            self.over = True

    def fail(self, error: BaseException) -> None:
        if not self.over:
            self.over = True
            self._put(error)

    def _put_latents(self, latents: Array) -> None:
        now = time.perf_counter()
        waited, took = self.admitted - self.joined, now - self.admitted
        self._put(LatentsOutput(latents, self.trajectory.steps_done, self.trajectory.finished, waited, took, now))

    def _put(self, outcome: LatentsOutput | BaseException) -> None:
        self.events.call_soon_threadsafe(self.outcomes.put_nowait, outcome)


class StepLoop:
    """The active images and a FIFO queue of waiting ones.

    Args:
        denoiser: maps one batch of rows to the outputs that they request, by name; called from several threads.
        max_rows: rows of one denoiser call, at least 2.
        max_active: images that take steps at a time; all share the denoiser evenly.
        max_waiting: capacity of the queue.
        report: called after every iteration, in the loop's thread.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        max_rows: int,
        max_active: int,
        max_waiting: int,
        report: Callable[[IterationStats], None] = lambda _: None,
    ) -> None:
        self._denoiser = denoiser
        self._report = report
        self._max_rows = max_rows
        self._max_active = max_active
        self._max_waiting = max_waiting
        self._reserved = 0
        self._entries: set[_QueueEntry] = set()
        self._polling: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(1 + MAX_CONCURRENT_CALLS, "steps")
        # Shared by the event loop and the loop's thread: new images, and whether the thread is running.
        self._lock = threading.Lock()
        self._arrived: list[_QueueEntry] = []
        self._is_running = False
        # Used by the loop's thread alone.
        self._waiting: deque[_QueueEntry] = deque()
        self._active: list[_QueueEntry] = []

    def reserve(self, images: int) -> None:
        """Reserve slots for images that will be sampled; each must be freed by `release`.

        Raises:
            QueueFullError: all active and waiting slots are taken.
        """
        room = self._max_active + self._max_waiting
        if self._reserved + images > room:
            raise QueueFullError(f"queue full: {self._reserved} of {room} places are taken and {images} more asked for")
        self._reserved += images

    def release(self, images: int) -> None:
        """Free slots."""
        self._reserved -= images

    async def sample(
        self, trajectory: Trajectory, cancelled: Callable[[], bool]
    ) -> AsyncGenerator[LatentsOutput, None]:
        """Run all steps of an image; yields its previews, if any, and last its final latents.

        Steps continue whether or not a preview has been consumed. Closing the generator cancels the image.
        `cancelled` is polled, once for all images that share it.

        Raises:
            ClientGoneError: `cancelled` returned True.
            Exception: whatever the denoiser raised for this image's batch, or the scheduler for this image.
        """
        entry = _QueueEntry(trajectory, cancelled)
        self._enqueue(entry)
        try:
            while True:
                outcome = await entry.outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
                if outcome.is_final:
                    return
        finally:
            self._entries.remove(entry)
            entry.end = ClientGoneError()

    def _enqueue(self, entry: _QueueEntry) -> None:
        self._entries.add(entry)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll_cancellation())
        with self._lock:
            self._arrived.append(entry)
            starts, self._is_running = not self._is_running, True
        if starts:
            # Delayed to the next iteration of the event loop, as the request's other images arrive in this one.
            entry.events.call_soon(self._threads.submit, self._run)

    async def _poll_cancellation(self) -> None:
        while self._entries:
            await asyncio.sleep(POLL_SECONDS)
            ends = {cancelled: _end(cancelled) for cancelled in {entry.cancelled for entry in self._entries}}
            for entry in self._entries:
                entry.end = ends[entry.cancelled] or entry.end

    def _run(self) -> None:
        try:
            while self._has_work():
                self._iterate()
        except BaseException as error:
            # Nothing awaits this thread, so its error must be passed to every pending `sample`.
            with self._lock:
                _fail([*self._active, *self._waiting, *self._arrived], error)
                self._active.clear()
                self._waiting.clear()
                self._arrived.clear()
                self._is_running = False

    def _has_work(self) -> bool:
        """Move new images to the queue. Without any work the thread ends, and the next image starts it again."""
        with self._lock:
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            self._is_running = bool(self._waiting or self._active)
            return self._is_running

    def _iterate(self) -> None:
        self._admit()
        saved_steps = self._drop_cancelled()
        batches = self._batches()
        elsewhere = [self._threads.submit(self._step, batch) for batch in batches[1:]]
        calls = [self._step(batch) for batch in batches[:1]] + [call.result() for call in elsewhere]
        self._active = [entry for entry in self._active if not entry.over]
        self._report(
            IterationStats(
                active=len(self._active),
                waiting=len(self._waiting),
                denoiser_calls=sum(call.rows > 0 for call in calls),
                denoiser_rows=sum(call.rows for call in calls),
                denoiser_seconds=sum(call.seconds for call in calls),
                steps=sum(call.steps for call in calls),
                saved_steps=saved_steps,
            )
        )

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._max_active:
            entry = self._waiting.popleft()
            entry.admitted = time.perf_counter()
            self._active.append(entry)

    def _drop_cancelled(self) -> int:
        """Remove cancelled images; returns the number of their remaining steps."""
        gone = [(entry, entry.end) for entry in (*self._active, *self._waiting) if entry.end is not None]
        for entry, end in gone:
            entry.fail(end)
        self._active = [entry for entry in self._active if not entry.over]
        self._waiting = deque(entry for entry in self._waiting if not entry.over)
        return sum(entry.trajectory.steps - entry.trajectory.steps_done for entry, _ in gone)

    def _batches(self) -> list[list[_QueueEntry]]:
        """Split the active images into batches of one model and equal input shapes, of the rows a call may have."""
        alike: dict[Hashable, list[_QueueEntry]] = defaultdict(list)
        for entry in self._active:
            alike[entry.trajectory.batch_key].append(entry)
        return [batch for entries in alike.values() for batch in self._fill(entries)]

    def _fill(self, entries: list[_QueueEntry]) -> Iterable[list[_QueueEntry]]:
        batch: list[_QueueEntry] = []
        rows = 0
        # Equal for all, as their inputs have equal shapes.
        most = min(self._max_rows, entries[0].trajectory.max_rows or self._max_rows)
        for entry in entries:
            if rows + entry.trajectory.rows > most:
                yield batch
                batch, rows = [], 0
            batch.append(entry)
            rows += entry.trajectory.rows
        yield batch

    def _step(self, batch: list[_QueueEntry]) -> _BatchStats:
        """One denoiser call and one scheduler step for each image of the batch.

        A failed call fails the images of its batch, a failed scheduler only its own image.
        """
        inputs = {entry: made for entry in batch if (made := entry.next_inputs()) is not None}
        if not inputs:
            return _BatchStats(0, 0, 0.0)
        rows = sum(len(made.sample) for made in inputs.values())
        began = time.perf_counter()
        try:
            outputs = self._denoiser(_stack(list(inputs.values())))
        except Exception as error:
            _fail(inputs, error)
            return _BatchStats(rows, 0, time.perf_counter() - began)
        seconds = time.perf_counter() - began
        first = 0
        for entry, made in inputs.items():
            following = first + len(made.sample)
            entry.advance({name: array[first:following] for name, array in outputs.items()})
            first = following
        return _BatchStats(rows, len(inputs), seconds)


def _fail(entries: Iterable[_QueueEntry], error: BaseException) -> None:
    for entry in entries:
        entry.fail(error)


def _end(cancelled: Callable[[], bool]) -> BaseException | None:
    try:
        return ClientGoneError() if cancelled() else None
    except Exception as error:
        return error


def _stack(rows: list[DenoiserInputs]) -> DenoiserInputs:
    if len(rows) == 1:
        return rows[0]
    return DenoiserInputs(
        model=rows[0].model,
        sample=np.concatenate([row.sample for row in rows]),
        timestep=np.concatenate([row.timestep for row in rows]),
        conditions={name: np.concatenate([row.conditions[name] for row in rows]) for name in rows[0].conditions},
        outputs=max((row.outputs for row in rows), key=len),
    )
