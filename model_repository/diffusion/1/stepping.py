"""Step-level continuous batching: one loop owns every active image and takes them all one step further per round.

Images of equal latent size share UNet calls whatever their prompt, seed, step, guidance or scheduler; they join and
leave between rounds. Knows images and a UNet to call; knows nothing of Triton.

Triton's own dynamic batcher cannot do this for a loop that sends its next request only after the last answer: such
requests split into cohorts that never merge again, and every change of size breaks a batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from conditions import Array
from contract import QueueFullError
from sampling import Image, UNetRows

UNet = Callable[[UNetRows], Awaitable[Mapping[str, Array]]]


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
    over: bool = False
    """The last outcome is there: the final latents or an error."""
    abandoned: bool = False
    """Nobody reads the outcomes any longer, or the client has gone."""
    joined: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0

    def advance(self, answer: Mapping[str, Array]) -> None:
        self.image.advance(answer)
        if self.image.preview is not None:
            self._hand_over(self.image.preview)
        if self.image.finished:
            self._hand_over(self.image.latents)
            self.over = True

    def fail(self, error: BaseException) -> None:
        if not self.over:
            self.over = True
            self.outcomes.put_nowait(error)

    def _hand_over(self, latents: Array) -> None:
        now = time.perf_counter()
        waited, took = self.admitted - self.joined, now - self.admitted
        self.outcomes.put_nowait(Sample(latents, self.image.steps_done, self.image.finished, waited, took, now))


class StepLoop:
    """Owns the active images and those that wait for a place among them.

    Args:
        unet: answers one batch of rows with the outputs that they ask for, by name.
        max_rows: rows of one UNet call, at least 2.
        max_active: images that take steps at a time; all share the UNet evenly.
        max_waiting: images that may wait, first come first served.
        report: is told of every round.
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
        self._waiting: deque[_Ticket] = deque()
        self._active: list[_Ticket] = []
        self._running: asyncio.Task[None] | None = None
        self._untold: Round | None = None

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
        `cancelled` is asked once per round, and once for all images that share it: it is a round trip to Triton.

        Raises:
            ClientGoneError: `cancelled` said so.
            Exception: whatever the UNet raised for this image's batch.
        """
        ticket = _Ticket(image, cancelled)
        self._waiting.append(ticket)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            while True:
                outcome = await ticket.outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
                if outcome.is_final:
                    return
        finally:
            ticket.abandoned = True

    async def _run(self) -> None:
        try:
            while self._waiting or self._active:
                await self._round()
                # Finished images are on their way to the decoder, and new ones may have come: let them go first.
                await asyncio.sleep(0)
        except BaseException as error:
            # Nobody awaits this task: what ends it must reach those that wait for their images.
            _fail([*self._active, *self._waiting], error)
            self._active.clear()
            self._waiting.clear()

    async def _round(self) -> None:
        self._admit()
        saved_steps = self._drop_those_nobody_waits_for()
        steps = asyncio.gather(*(self._step(batch) for batch in self._batches()))
        # Once the calls are on their way: what is a round trip to Triton costs nothing while the UNet works.
        await asyncio.sleep(0)
        self._tell()
        self._ask_whether_clients_have_gone()
        calls = await steps
        self._active = [ticket for ticket in self._active if not ticket.over]
        self._untold = Round(
            active=len(self._active),
            waiting=len(self._waiting),
            unet_calls=len(calls),
            unet_rows=sum(call.rows for call in calls),
            unet_seconds=sum(call.seconds for call in calls),
            steps=sum(call.steps for call in calls),
            saved_steps=saved_steps,
        )
        if not self._active:
            self._tell()

    def _tell(self) -> None:
        done, self._untold = self._untold, None
        if done is not None:
            self._report(done)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._max_active:
            ticket = self._waiting.popleft()
            ticket.admitted = time.perf_counter()
            self._active.append(ticket)

    def _ask_whether_clients_have_gone(self) -> None:
        answers = {cancelled: cancelled() for cancelled in {ticket.cancelled for ticket in self._active}}
        for ticket in (*self._active, *self._waiting):
            ticket.abandoned = ticket.abandoned or answers.get(ticket.cancelled, False)

    def _drop_those_nobody_waits_for(self) -> int:
        """Returns the number of steps that this saves."""
        gone = [ticket for ticket in (*self._active, *self._waiting) if ticket.abandoned]
        _fail(gone, ClientGoneError())
        self._active = [ticket for ticket in self._active if not ticket.over]
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.over)
        return sum(ticket.image.steps - ticket.image.steps_done for ticket in gone)

    def _batches(self) -> Iterable[list[_Ticket]]:
        """Split the active images into batches of one model and size, and at most `max_rows` rows."""
        alike: dict[tuple[str, tuple[int, int]], list[_Ticket]] = defaultdict(list)
        for ticket in self._active:
            alike[ticket.image.model, ticket.image.size].append(ticket)
        for tickets in alike.values():
            yield from self._fill(tickets)

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

    async def _step(self, batch: list[_Ticket]) -> _Call:
        """One UNet call and one scheduler step for each image of the batch; its failure ends these images alone."""
        rows = sum(ticket.image.rows for ticket in batch)
        began = time.perf_counter()
        try:
            answer = await self._unet(_stack([ticket.image.unet_rows() for ticket in batch]))
            seconds = time.perf_counter() - began
            first = 0
            for ticket in batch:
                following = first + ticket.image.rows  # asked before the step: the next may take another number
                ticket.advance({name: array[first:following] for name, array in answer.items()})
                first = following
        except Exception as error:
            _fail(batch, error)
            return _Call(rows, 0, time.perf_counter() - began)
        return _Call(rows, len(batch), seconds)


def _fail(tickets: Iterable[_Ticket], error: BaseException) -> None:
    for ticket in tickets:
        ticket.fail(error)


def _stack(rows: list[UNetRows]) -> UNetRows:
    return UNetRows(
        model=rows[0].model,
        sample=np.concatenate([row.sample for row in rows]),
        timestep=np.concatenate([row.timestep for row in rows]),
        conditions={name: np.concatenate([row.conditions[name] for row in rows]) for name in rows[0].conditions},
        outputs=max((row.outputs for row in rows), key=len),
    )
