"""Step-level continuous batching: one loop owns every active image and takes them all one step further per round.

Images of equal latent size share UNet calls whatever their prompt, seed, step, guidance or scheduler; they join and
leave between rounds. The rounds have a thread of their own, which calls the UNet itself: by way of the event loop,
every step would wait twice more for a thread to wake up. Knows images and a UNet to call; knows nothing of Triton.

Triton's own dynamic batcher cannot do this for a loop that sends its next request only after the last answer: such
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
from hypergen_sampler.sampling import DenoiserInputs, Image

UNet = Callable[[DenoiserInputs], Mapping[str, Array]]

# Batches of one round, which differ in size or model, that are in flight at a time.
CALLS_AT_A_TIME = 8
# Seconds between questions whether the clients are still there, each a round trip to Triton.
ASK_SECONDS = 0.05


class ClientGoneError(Exception):
    """The client that asked for the image has gone."""


@dataclass(frozen=True)
class Sample:
    """Latents [C, h, w] for the decoder: the image's final ones, or those of a preview on the way to them.

    `waited` and `took` are the seconds that the image waited for a place and has been taking steps; `made` is when.
    """

    latents: Array
    step: int
    is_final: bool
    waited: float
    took: float
    made: float


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round did, and what it left: `active` images that take further steps, and those `waiting` to."""

    active: int
    waiting: int
    unet_calls: int
    unet_rows: int
    unet_seconds: float
    steps: int
    """Of all images together."""
    saved_steps: int
    """Those that images had before them whose client has gone."""


@dataclass(frozen=True)
class _Call:
    rows: int
    steps: int
    seconds: float


@dataclass(eq=False)
class _Ticket:
    """An image's place in the loop. Whoever waits for the image reads `outcomes`; the loop never waits for them."""

    image: Image
    cancelled: Callable[[], bool]
    outcomes: asyncio.Queue[Sample | BaseException] = field(default_factory=asyncio.Queue)
    events: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    over: bool = False
    """The last outcome is there: the final latents or an error."""
    end: BaseException | None = None
    """Why the image takes no further step: nobody reads the outcomes any longer, or the client has gone."""
    joined: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0

    def next_inputs(self) -> DenoiserInputs | None:
        """The inputs of the image's next step; None if they cannot be made, which fails this image alone."""
        try:
            return self.image.unet_rows()
        except Exception as error:
            self.fail(error)
            return None

    def advance(self, answer: Mapping[str, Array]) -> None:
        try:
            self.image.advance(answer)
        except Exception as error:
            self.fail(error)
            return
        if self.image.preview is not None:
            self._hand_over(self.image.preview)
        if self.image.finished:
            self._hand_over(self.image.latents)
            self.over = True

    def fail(self, error: BaseException) -> None:
        if not self.over:
            self.over = True
            self._tell(error)

    def _hand_over(self, latents: Array) -> None:
        now = time.perf_counter()
        waited, took = self.admitted - self.joined, now - self.admitted
        self._tell(Sample(latents, self.image.steps_done, self.image.finished, waited, took, now))

    def _tell(self, outcome: Sample | BaseException) -> None:
        self.events.call_soon_threadsafe(self.outcomes.put_nowait, outcome)


class StepLoop:
    """Owns the active images and those that wait for a place among them.

    Args:
        unet: answers one batch of rows with the outputs that they ask for, by name; called from several threads.
        max_rows: rows of one UNet call, at least 2.
        max_active: images that take steps at a time; all share the UNet evenly.
        max_waiting: images that may wait, first come first served.
        report: is told of every round, in the thread of the rounds.
    """

    def __init__(
        self,
        unet: UNet,
        *,
        max_rows: int,
        max_active: int,
        max_waiting: int,
        report: Callable[[Round], None] = lambda _: None,
    ) -> None:
        self._unet = unet
        self._report = report
        self._max_rows = max_rows
        self._max_active = max_active
        self._max_waiting = max_waiting
        self._reserved = 0
        self._tickets: set[_Ticket] = set()
        self._watch: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(1 + CALLS_AT_A_TIME, "steps")
        # Between the event loop and the thread of the rounds: who has come, and whether that thread is there.
        self._lock = threading.Lock()
        self._arrived: list[_Ticket] = []
        self._is_running = False
        # The thread's own.
        self._waiting: deque[_Ticket] = deque()
        self._active: list[_Ticket] = []

    def reserve(self, images: int) -> None:
        """Claim places for images that will be sampled; each must be given back by `release`.

        Raises:
            QueueFullError: active and waiting places are all taken.
        """
        room = self._max_active + self._max_waiting
        if self._reserved + images > room:
            raise QueueFullError(f"queue full: {self._reserved} of {room} places are taken and {images} more asked for")
        self._reserved += images

    def release(self, images: int) -> None:
        """Give places back."""
        self._reserved -= images

    async def sample(self, image: Image, cancelled: Callable[[], bool]) -> AsyncGenerator[Sample, None]:
        """Take the image through all its steps; yields its previews, if it has any, and last its final latents.

        The steps go on whether or not a preview has been fetched. Closing the generator ends the image.
        `cancelled` is asked now and then, and once for all images that share it.

        Raises:
            ClientGoneError: `cancelled` said so.
            Exception: whatever the UNet raised for this image's batch.
        """
        ticket = _Ticket(image, cancelled)
        self._enter(ticket)
        try:
            while True:
                outcome = await ticket.outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
                if outcome.is_final:
                    return
        finally:
            self._tickets.remove(ticket)
            ticket.end = ClientGoneError()

    def _enter(self, ticket: _Ticket) -> None:
        self._tickets.add(ticket)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_clients())
        with self._lock:
            self._arrived.append(ticket)
            starts, self._is_running = not self._is_running, True
        if starts:
            # After this turn of the event loop, in which the other images of the same request come.
            ticket.events.call_soon(self._threads.submit, self._run)

    async def _watch_clients(self) -> None:
        while self._tickets:
            await asyncio.sleep(ASK_SECONDS)
            ends = {cancelled: _end(cancelled) for cancelled in {ticket.cancelled for ticket in self._tickets}}
            for ticket in self._tickets:
                ticket.end = ends[ticket.cancelled] or ticket.end

    def _run(self) -> None:
        try:
            while self._has_work():
                self._round()
        except BaseException as error:
            # Nobody looks at this thread: what ends it must reach those that wait for their images.
            with self._lock:
                _fail([*self._active, *self._waiting, *self._arrived], error)
                self._active.clear()
                self._waiting.clear()
                self._arrived.clear()
                self._is_running = False

    def _has_work(self) -> bool:
        """Take in who has come. Where it is nobody, the thread ends with this, and the next one starts it again."""
        with self._lock:
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            self._is_running = bool(self._waiting or self._active)
            return self._is_running

    def _round(self) -> None:
        self._admit()
        saved_steps = self._drop_those_nobody_waits_for()
        batches = self._batches()
        elsewhere = [self._threads.submit(self._step, batch) for batch in batches[1:]]
        calls = [self._step(batch) for batch in batches[:1]] + [call.result() for call in elsewhere]
        self._active = [ticket for ticket in self._active if not ticket.over]
        self._report(
            Round(
                active=len(self._active),
                waiting=len(self._waiting),
                unet_calls=sum(call.rows > 0 for call in calls),
                unet_rows=sum(call.rows for call in calls),
                unet_seconds=sum(call.seconds for call in calls),
                steps=sum(call.steps for call in calls),
                saved_steps=saved_steps,
            )
        )

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._max_active:
            ticket = self._waiting.popleft()
            ticket.admitted = time.perf_counter()
            self._active.append(ticket)

    def _drop_those_nobody_waits_for(self) -> int:
        """Returns the number of steps that this saves."""
        gone = [(ticket, ticket.end) for ticket in (*self._active, *self._waiting) if ticket.end is not None]
        for ticket, end in gone:
            ticket.fail(end)
        self._active = [ticket for ticket in self._active if not ticket.over]
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.over)
        return sum(ticket.image.steps - ticket.image.steps_done for ticket, _ in gone)

    def _batches(self) -> list[list[_Ticket]]:
        """Split the active images into batches of one model and input shapes, and at most `max_rows` rows."""
        alike: dict[Hashable, list[_Ticket]] = defaultdict(list)
        for ticket in self._active:
            alike[ticket.image.batch_key].append(ticket)
        return [batch for tickets in alike.values() for batch in self._fill(tickets)]

    def _fill(self, tickets: list[_Ticket]) -> Iterable[list[_Ticket]]:
        batch: list[_Ticket] = []
        rows = 0
        for ticket in tickets:
            if rows + ticket.image.rows > self._max_rows:
                yield batch
                batch, rows = [], 0
            batch.append(ticket)
            rows += ticket.image.rows
        yield batch

    def _step(self, batch: list[_Ticket]) -> _Call:
        """One denoiser call and one scheduler step for each image of the batch.

        A failed call fails the images of its batch, a failed scheduler only its own image.
        """
        inputs = {ticket: made for ticket in batch if (made := ticket.next_inputs()) is not None}
        if not inputs:
            return _Call(0, 0, 0.0)
        rows = sum(len(made.sample) for made in inputs.values())
        began = time.perf_counter()
        try:
            answer = self._unet(_stack(list(inputs.values())))
        except Exception as error:
            _fail(inputs, error)
            return _Call(rows, 0, time.perf_counter() - began)
        seconds = time.perf_counter() - began
        first = 0
        for ticket, made in inputs.items():
            following = first + len(made.sample)
            ticket.advance({name: array[first:following] for name, array in answer.items()})
            first = following
        return _Call(rows, len(inputs), seconds)


def _fail(tickets: Iterable[_Ticket], error: BaseException) -> None:
    for ticket in tickets:
        ticket.fail(error)


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
