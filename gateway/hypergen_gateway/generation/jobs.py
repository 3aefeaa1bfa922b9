"""Jobs: work that outlives the connection that asked for it.

A job generates once for any number of subscribers, each of which receives everything from the beginning. A client whose
connection broke thus rejoins its own job rather than starting it again: by an idempotency key, or by the retry counter
that OpenAI's clients send. A first request without a key never joins a job: the same request twice means two different
images. Does not depend on HTTP.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from hypergen_gateway.concurrency import cancel
from hypergen_gateway.errors import IdempotencyKeyReusedError, UnavailableError
from hypergen_gateway.generation.admission import Slot
from hypergen_gateway.generation.request import ClientRequest
from hypergen_gateway.generation.service import EncodedImage, GenerationTask, ImageService
from hypergen_gateway.http.exceptions import forget_tracebacks


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """How long a job is kept for a client that may return.

    A job without subscribers runs for another `grace` seconds; its result is kept for `seconds`, as long as all results
    together take at most `nbytes`. A result delivered more than `lost_response` seconds ago has arrived: OpenAI's
    clients back off for half a second, then one, so a later retry without a key belongs to another request.
    """

    grace: float
    seconds: float
    nbytes: int
    lost_response: float = 3.0


class Job:
    """One generation task and its subscribers; created by `Jobs`."""

    def __init__(self, generation: GenerationTask, on_unsubscribed: Callable[[Job], None]) -> None:
        self.request = generation.request
        self.may_return = generation.request.client.may_return
        self.subscribers = 0
        self.expiry: asyncio.TimerHandle | None = None  # set while it runs without subscribers
        self.delivered_at: float | None = None  # on the loop's clock
        self._generation = generation
        self._on_unsubscribed = on_unsubscribed
        self._images: list[EncodedImage] = []
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(lambda _: self._notify())

    @property
    def slot(self) -> Slot | None:
        """Its slot, once admission has given one."""
        return self._generation.slot

    @property
    def has_failed(self) -> bool:
        """Whether its subscribers received an error."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is not None

    @property
    def is_abandoned(self) -> bool:
        """Whether its client disconnected before receiving the images."""
        return not self.subscribers and self.delivered_at is None and not self.has_failed

    @property
    def nbytes(self) -> int:
        """The memory taken by its images and init images."""
        return self.request.nbytes + sum(encoded.nbytes for encoded in self._images)

    @contextmanager
    def subscribe(self) -> Iterator[None]:
        """Keeps the job running, whether or not anything reads its images yet."""
        self.subscribers += 1
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        try:
            yield
        finally:
            self.subscribers -= 1
            if not self.subscribers:
                self._on_unsubscribed(self)

    async def images(self) -> AsyncGenerator[EncodedImage, None]:
        """Previews and images from the first one on, as they are ready; raises what the generation raises."""
        received = 0
        with self.subscribe():
            while received < len(self._images) or not self.task.done():
                if received == len(self._images):
                    await self._changed.wait()
                    continue
                yield self._images[received]
                received += 1
            if self.task.cancelled():  # not by a subscriber: the server is stopping, or gRPC's channel is closed
                raise UnavailableError("The server is shutting down.")
            self.task.result()
            self.delivered_at = asyncio.get_running_loop().time()

    async def final_images(self) -> list[EncodedImage]:
        """All finished images, ordered by index."""
        async with aclosing(self.images()) as images:
            finals = [encoded async for encoded in images if encoded.image.is_final]
        return sorted(finals, key=lambda encoded: encoded.image.index)

    async def _run(self) -> None:
        async with aclosing(self._generation.images()) as images:
            async for encoded in images:
                self._images.append(encoded)
                self._notify()

    def forget_traceback(self) -> None:
        """Drops the traceback that ended the task. It leads back to the task, a cycle that would keep the images."""
        try:
            self.task.result()
        except BaseException as error:
            forget_tracebacks(error)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@dataclass(frozen=True)
class _Kept:
    """The memory of a job that is kept after its end, and the timer that forgets it."""

    nbytes: int
    expiry: asyncio.TimerHandle


class Jobs:
    """The jobs of one gateway. Belongs to one event loop; `on_joined` is called with the reason for joining a job."""

    def __init__(self, service: ImageService, retention: RetentionPolicy, on_joined: Callable[[str], object]) -> None:
        self._service = service
        self._retention = retention
        self._on_joined = on_joined
        self._by_key: dict[tuple[str, str], Job] = {}
        self._by_fingerprint: defaultdict[tuple[str, str], list[Job]] = defaultdict(list)
        self._kept: OrderedDict[Job, _Kept] = OrderedDict()
        self._running: set[Job] = set()

    def join(self, request: ClientRequest) -> Job:
        """The job that already serves this request, if the request is a retry; else a new one.

        Raises:
            IdempotencyKeyReusedError: the key belongs to another request.
        """
        job = self._find(request)
        if job is None:
            return self._start(request)
        job.may_return = job.may_return or request.client.may_return
        return job

    async def close(self) -> None:
        """Cancels all jobs."""
        await cancel(*(job.task for job in self._running))

    def _find(self, request: ClientRequest) -> Job | None:
        client = request.client
        if client.idempotency_key is not None:
            job, reason = self._by_key.get((client.owner, client.idempotency_key)), "idempotency_key"
            if job is not None and job.request.fingerprint != request.fingerprint:
                raise IdempotencyKeyReusedError
        else:
            job, reason = self._find_interrupted(request) if client.is_retry else None, "retry"
        if job is not None:
            self._on_joined(reason)
        return job

    def _find_interrupted(self, request: ClientRequest) -> Job | None:
        candidates = self._by_fingerprint.get(_owned_fingerprint(request), [])
        for job in reversed(candidates):
            if job.is_abandoned:
                return job
        for job in candidates:
            if job.has_failed:  # the request is the retry of this failure
                self._forget(job)
                return None
        now = asyncio.get_running_loop().time()
        for job in reversed(candidates):
            # Its client's disconnect has not been noticed yet, or the response was lost on the way.
            if job.delivered_at is None or now - job.delivered_at < self._retention.lost_response:
                return job
        return None

    def _start(self, request: ClientRequest) -> Job:
        job = Job(GenerationTask(self._service, request), self._unsubscribed)
        self._running.add(job)
        job.task.add_done_callback(lambda _: self._ended(job))
        if request.client.may_return:
            self._by_fingerprint[_owned_fingerprint(request)].append(job)
        if request.client.idempotency_key is not None:
            self._by_key[request.client.owner, request.client.idempotency_key] = job
        return job

    def _unsubscribed(self, job: Job) -> None:
        """The last subscriber has left."""
        if not job.task.done():
            grace = self._retention.grace if job.may_return else 0.0
            job.expiry = asyncio.get_running_loop().call_later(grace, self._give_up, job)

    def _give_up(self, job: Job) -> None:
        job.expiry = None  # a timer that has run still refers to the job
        self._forget(job)
        job.task.cancel()

    def _ended(self, job: Job) -> None:
        self._running.discard(job)
        if job.expiry is not None:
            job.expiry.cancel()
            job.expiry = None
        if not job.subscribers:
            job.forget_traceback()
        if job.task.cancelled() or not job.may_return:
            self._forget(job)
            return
        if job.has_failed:  # kept only so that its retry is not mistaken for that of another job
            self._forget_key(job)
        expiry = asyncio.get_running_loop().call_later(self._retention.seconds, self._forget, job)
        self._kept[job] = _Kept(job.nbytes, expiry)
        while sum(kept.nbytes for kept in self._kept.values()) > self._retention.nbytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, job: Job) -> None:
        self._forget_key(job)
        kept = self._kept.pop(job, None)
        if kept is not None:
            kept.expiry.cancel()
        candidates = self._by_fingerprint.get(_owned_fingerprint(job.request), [])
        if job in candidates:
            candidates.remove(job)
        if not candidates:
            self._by_fingerprint.pop(_owned_fingerprint(job.request), None)

    def _forget_key(self, job: Job) -> None:
        key = (job.request.client.owner, job.request.client.idempotency_key or "")
        if self._by_key.get(key) is job:
            del self._by_key[key]


def _owned_fingerprint(request: ClientRequest) -> tuple[str, str]:
    """What a client's repeated requests share."""
    return request.client.owner, request.fingerprint
