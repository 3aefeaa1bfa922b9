"""Drawing that outlives the connection that asked for it.

A job draws once, for any number of listeners, each of which hears everything from the beginning. So a client whose
connection broke joins its own work again rather than have it done twice: by an idempotency key, or because OpenAI's
clients say when they ask again. Who asks for the first time without a key never joins anybody: the same request twice
means two different pictures. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from hypergen_gateway.errors import IdempotencyKeyReusedError, UnavailableError
from hypergen_gateway.generation.service import EncodedImage, GenerationTask
from hypergen_gateway.http.disconnect import cancel


@dataclass(frozen=True, kw_only=True)
class RequestIdentity:
    """Who asks for what: enough to tell whether it is asked again.

    `owner` stands for the credentials and `fingerprint` for the route and everything the request says, pictures
    included.
    """

    owner: str
    fingerprint: str
    idempotency_key: str | None = None
    is_retry: bool = False
    may_return: bool = False  # a client that neither has a key nor counts its retries cannot

    @property
    def identity(self) -> tuple[str, str]:
        """What a client's repeated requests share."""
        return self.owner, self.fingerprint


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """How long work is kept for a client that may come back for it.

    `grace` is how many seconds it goes on without a listener; what is finished stays for `seconds`, as long as all of
    it takes no more than `nbytes`. What was delivered longer than `lost_answer` seconds ago has arrived, as OpenAI's
    clients back off for half a second and then for one: a retry without a key is another request's, then.
    """

    grace: float
    seconds: float
    nbytes: int
    lost_answer: float = 3.0


class Job:
    """One drawing and its listeners; made by `Jobs`."""

    def __init__(self, drawing: GenerationTask, asked: RequestIdentity, unattended: Callable[[Job], None]) -> None:
        self.drawing = drawing
        self.asked = asked
        self.may_return = asked.may_return
        self.listeners = 0
        self.end: asyncio.TimerHandle | None = None  # set while nobody listens
        self.delivered_at: float | None = None  # of the loop's clock
        self._unattended = unattended
        self._pictures: list[EncodedImage] = []
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._draw())
        self.task.add_done_callback(lambda _: self._tell())

    @property
    def has_failed(self) -> bool:
        """Whether its listeners were told an error."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is not None

    @property
    def is_abandoned(self) -> bool:
        """Whether its client left without its pictures."""
        return not self.listeners and self.delivered_at is None and not self.has_failed

    @property
    def nbytes(self) -> int:
        """The memory that its pictures take, and the images that they started from."""
        return self.drawing.order.nbytes + sum(finished.nbytes for finished in self._pictures)

    @contextmanager
    def subscribe(self) -> Iterator[None]:
        """Somebody is there for the job, and need not listen yet."""
        self.listeners += 1
        if self.end is not None:
            self.end.cancel()
        try:
            yield
        finally:
            self.listeners -= 1
            if not self.listeners:
                self._unattended(self)

    async def listen(self) -> AsyncGenerator[EncodedImage, None]:
        """Previews and pictures from the first one on, as they come; raises what the drawing does."""
        heard = 0
        with self.subscribe():
            while heard < len(self._pictures) or not self.task.done():
                if heard == len(self._pictures):
                    await self._news.wait()
                    continue
                yield self._pictures[heard]
                heard += 1
            if self.task.cancelled():  # by nobody who listens: the server ends, or gRPC's channel is closed
                raise UnavailableError("The server is shutting down.")
            self.task.result()
            self.delivered_at = asyncio.get_running_loop().time()

    async def finals(self) -> list[EncodedImage]:
        """The finished pictures in the order of their indices, when all are there."""
        async with aclosing(self.listen()) as pictures:
            finals = [finished async for finished in pictures if finished.picture.is_final]
        return sorted(finals, key=lambda finished: finished.picture.index)

    async def _draw(self) -> None:
        async with aclosing(self.drawing.pictures()) as pictures:
            async for finished in pictures:
                self._pictures.append(finished)
                self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Jobs:
    """The jobs of one gateway. Belongs to one event loop; `joined` is told why somebody joined a job."""

    def __init__(self, keeping: RetentionPolicy, joined: Callable[[str], object]) -> None:
        self._keeping = keeping
        self._joined = joined
        self._by_key: dict[tuple[str, str], Job] = {}
        self._by_identity: defaultdict[tuple[str, str], list[Job]] = defaultdict(list)
        self._kept: OrderedDict[Job, int] = OrderedDict()
        self._running: set[Job] = set()

    def join(self, asked: RequestIdentity, start: Callable[[], GenerationTask]) -> Job:
        """The job that already does what is asked, if this is asked again; else a new one.

        Raises:
            IdempotencyKeyReusedError: the key belongs to another request.
        """
        job = self._find(asked)
        if job is None:
            return self._begin(asked, start())
        job.may_return = job.may_return or asked.may_return
        return job

    async def close(self) -> None:
        """Ends all work."""
        await cancel(*(job.task for job in self._running))

    def _find(self, asked: RequestIdentity) -> Job | None:
        if asked.idempotency_key is not None:
            job, reason = self._by_key.get((asked.owner, asked.idempotency_key)), "idempotency_key"
            if job is not None and job.asked.fingerprint != asked.fingerprint:
                raise IdempotencyKeyReusedError
        else:
            job, reason = self._find_interrupted(asked) if asked.is_retry else None, "retry"
        if job is not None:
            self._joined(reason)
        return job

    def _find_interrupted(self, asked: RequestIdentity) -> Job | None:
        family = self._by_identity.get(asked.identity, [])
        for job in reversed(family):
            if job.is_abandoned:
                return job
        for job in family:
            if job.has_failed:  # it is this failure that is tried again
                self._forget(job)
                return None
        now = asyncio.get_running_loop().time()
        for job in reversed(family):
            # Nobody has noticed yet that its client is gone, or its answer was lost on the way.
            if job.delivered_at is None or now - job.delivered_at < self._keeping.lost_answer:
                return job
        return None

    def _begin(self, asked: RequestIdentity, drawing: GenerationTask) -> Job:
        job = Job(drawing, asked, self._left)
        self._running.add(job)
        job.task.add_done_callback(lambda _: self._ended(job))
        if asked.may_return:
            self._by_identity[asked.identity].append(job)
        if asked.idempotency_key is not None:
            self._by_key[asked.owner, asked.idempotency_key] = job
        return job

    def _left(self, job: Job) -> None:
        """The last listener of a job has left it."""
        if not job.task.done():
            grace = self._keeping.grace if job.may_return else 0.0
            job.end = asyncio.get_running_loop().call_later(grace, self._give_up, job)

    def _give_up(self, job: Job) -> None:
        self._forget(job)
        job.task.cancel()

    def _ended(self, job: Job) -> None:
        self._running.discard(job)
        if job.task.cancelled() or not job.may_return:
            self._forget(job)
            return
        if job.has_failed:  # only so that its retry is not taken for that of another job
            self._forget_key(job)
        self._kept[job] = job.nbytes
        asyncio.get_running_loop().call_later(self._keeping.seconds, self._forget, job)
        while sum(self._kept.values()) > self._keeping.nbytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, job: Job) -> None:
        self._forget_key(job)
        self._kept.pop(job, None)
        family = self._by_identity.get(job.asked.identity, [])
        if job in family:
            family.remove(job)
        if not family:
            self._by_identity.pop(job.asked.identity, None)

    def _forget_key(self, job: Job) -> None:
        key = (job.asked.owner, job.asked.idempotency_key or "")
        if self._by_key.get(key) is job:
            del self._by_key[key]
