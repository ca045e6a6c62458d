"""Micro-batches: one thread computes whatever waits, together, as soon as it is free; there is no timer."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from recsys2stage.serving.problems import Problem

logger = logging.getLogger("recsys2stage.serving")


class Job(NamedTuple):
    """A request that waits to be computed."""

    body: Any
    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop
    since: float  # by the monotonic clock, seconds

    def is_awaited(self) -> bool:
        """Whether anybody still waits for the answer: not after a timeout."""
        return not self.future.done()


class Batcher:
    """Computes requests in one thread, as many together as wait when it gets free.

    Args:
        compute: called with the bodies of a batch and the seconds that each has waited; returns a result or an
            exception for each.
        size: maximum number of requests that are computed together.
        queue: maximum number of requests that wait.
        observe: called with the size of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Any], Sequence[float]], Sequence[Any]],
        size: int,
        queue: int,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.compute, self.size, self.queue, self.observe = compute, size, queue, observe
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._jobs)

    async def submit(self, *bodies: Any) -> list[Any]:
        """Computes requests, all of them or none; returns a result or an exception for each.

        Raises:
            Problem: with status 429 if too many wait, and 503 if the service ends.
        """
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        jobs = [Job(body, loop.create_future(), loop, now) for body in bodies]
        with self._wake:
            if self._closing:
                raise Problem(503, "ending", "the service ends, and takes no more requests; send it to another one")
            if self._jobs and len(self._jobs) + len(jobs) > self.queue:
                raise Problem(
                    429,
                    "busy",
                    f"{len(self._jobs)} requests wait, expected at most {self.queue}; try again in a second",
                    retry_after=1,
                )
            self._jobs.extend(jobs)
            self._wake.notify()
        try:
            return [await job.future for job in jobs]
        finally:
            for job in jobs:
                job.future.cancel()  # of those that are not awaited any more

    def close(self) -> None:
        """Computes what waits, and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._closing:
                    self._wake.wait()
                if not self._jobs:
                    return
                batch = [self._jobs.popleft() for _ in range(min(self.size, len(self._jobs)))]
            batch = [job for job in batch if job.is_awaited()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[Job]) -> None:
        now = time.perf_counter()
        self.observe(len(batch))
        try:
            results = list(self.compute([job.body for job in batch], [now - job.since for job in batch]))
        except Exception as error:  # of one request, or of the computation as a whole: each is tried alone
            if len(batch) > 1:
                for job in batch:
                    self._answer([job])
                return
            logger.exception("a request could not be computed")
            results = [error]
        for loop in {job.loop for job in batch}:
            pairs = [(job, result) for job, result in zip(batch, results, strict=True) if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, pairs)
            except RuntimeError:  # the loop has ended, and nobody waits
                logger.warning("%s answers came after the end of the service", len(pairs))


def _deliver(pairs: list[tuple[Job, Any]]) -> None:
    for job, result in pairs:
        if job.is_awaited():
            job.future.set_result(result)
