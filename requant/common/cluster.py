"""A cluster: the workers of a Dask scheduler, which return results in the order of the items.

Dask repeats the tasks of a worker that died, so a task must be safe to repeat, also at the same time by a worker that
was only thought to be dead: it writes the same bytes to the same place, or nothing. Tasks travel as pickle over TCP (or
TLS, `tls://`, by Dask's own configuration): whoever reaches the scheduler can run anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import pickle
import re
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, TimeoutError
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, TypeVar

from requant.errors import InputOutputError, RequantError, UsageError, printable

Item = TypeVar("Item")
Result = TypeVar("Result")
Fingerprint = Callable[[], tuple[str, str]]

_PER_THREAD = 4  # tasks sent for each thread of a worker: one at work, one at hand, two to come
_ADDRESS = re.compile(r"(?:[a-z]+://)?[^/]+:([0-9]{1,5})/?")
_CONNECT = 5.0  # seconds in which a scheduler must answer
_TICK = 0.1  # seconds between two checks of the main thread for signals and for the scheduler
_FETCH = 5.0  # seconds in which results, which are small, must arrive
_COUNTED = 2.0  # seconds for which a count of workers is valid
_LOST = (OSError, asyncio.TimeoutError, CancelledError)  # errors of a call to a lost scheduler


@dataclass(eq=False, slots=True)
class Step:
    """A call of `work` with `item` on some worker; `name` is for messages.

    after: earlier steps, whose results are further arguments. Everything must pickle, `work` by its name, except
    `about`, which stays with the caller.
    """

    work: Callable[..., Any]
    item: Any
    name: str = "a task"
    after: tuple[Step, ...] = ()
    about: Any = None
    future: Any = None
    result: Any = None
    error: RequantError | None = None
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error of the work, returned as a result: an exception that cannot be pickled would never arrive."""

    error: RequantError | None
    text: str = ""


class Cluster:
    """The workers of the scheduler at `address`. Use as a context manager.

    fingerprint: a module's function that returns the version and the state of the kernels; a worker where it returns
    something else refuses to work. info: takes lines for the user. Dask's own log is silenced.

    Raises UsageError where Dask is not installed or `address` is not valid, InputOutputError where no scheduler
    answers.
    """

    def __init__(self, address: str, fingerprint: Fingerprint, info: Callable[[str], None] = lambda _: None) -> None:
        self.address, self._fingerprint, self._info = address, fingerprint, info
        self._dask = _import_dask()
        self._client = self._connect()
        self._room, self._counted, self._waits = 0, -_COUNTED, False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, which drops our remaining tasks; may be called more than once."""
        with contextlib.suppress(*_LOST):
            self._client.close(timeout=1)

    def in_order(
        self, work: Callable[[Item], Result], items: Iterable[Item], name: Callable[[Item], str] = lambda _: "a task"
    ) -> Generator[Result, None, None]:
        """Yield `work` of every item, in their order, as `threads.in_order` does; `name` is for messages."""
        with contextlib.closing(self.run(Step(work, item, name(item)) for item in items)) as steps:
            for step in steps:
                yield step.result

    def run(self, steps: Iterable[Step]) -> Generator[Step, None, None]:
        """Yield the steps in their order, each with its result; raise the first error of the work in that order.

        Four steps for each thread of a worker are under way at a time. Without workers it waits until some come. Close
        the generator where it may be left early. Raises what the work raises if it is a RequantError; InputOutputError
        for any other exception, for work at which one worker after the other died, and where the scheduler is lost.
        """
        source, under_way = iter(steps), 0
        ahead: deque[Step] = deque()
        done: SimpleQueue[Step] = SimpleQueue()
        try:
            while True:
                for step in self._submit(source, under_way, done):
                    ahead.append(step)
                    under_way += 1
                if not ahead:
                    return
                finished = self._wait_for_steps(done)
                under_way -= len(finished)
                if any(step.error is not None for step in finished):
                    source = iter(())
                while ahead and ahead[0].is_done:
                    step = ahead.popleft()
                    if step.error is not None:
                        raise step.error
                    yield step
        finally:
            self._cancel(ahead)

    def _submit(self, source: Iterator[Step], under_way: int, done: SimpleQueue[Step]) -> Iterator[Step]:
        """Send as many steps from `source` to the scheduler as there is room for; yield each."""
        room = self._count_room()
        while under_way < room and (step := next(source, None)) is not None:
            self._check()
            packed = pickle.dumps((step.work, step.item))
            before = [other.future for other in step.after]
            key = f"{step.work.__name__}-{uuid.uuid4().hex}"
            step.future = self._client.submit(
                _run_task, self._fingerprint, self._fingerprint(), packed, before, key=key, pure=False
            )
            self._watch(step, done)
            under_way += 1
            yield step

    def _watch(self, step: Step, done: SimpleQueue[Step]) -> None:
        step.future.add_done_callback(lambda _: done.put(step))

    def _wait_for_steps(self, done: SimpleQueue[Step]) -> list[Step]:
        """Wait a moment for steps to finish, and return them with their results."""
        steps = []
        with contextlib.suppress(Empty):
            steps.append(done.get(timeout=_TICK))
            while True:
                steps.append(done.get_nowait())
        self._check()
        results = self._fetch({i: step.future for i, step in enumerate(steps) if step.future.status == "finished"})
        for i, step in enumerate(steps):
            self._conclude(step, i in results, results.get(i), done)
        if steps and not any(step.is_done for step in steps):
            sleep(_TICK)  # the results of all were lost with a worker
        return [step for step in steps if step.is_done]

    def _fetch(self, futures: Mapping[int, Any]) -> Mapping[int, Any]:
        """Fetch the results, or none for now: those lost with a worker are computed again, once there is a worker."""

        async def fetch() -> Mapping[int, Any]:
            found: Mapping[int, Any] = await self._client.gather(dict(futures), errors="skip", asynchronous=True)
            return found

        try:
            return self._client.sync(fetch, callback_timeout=_FETCH) if futures else {}
        except asyncio.TimeoutError:
            return {}
        except _LOST as error:
            raise self._lost_error() from error

    def _conclude(self, step: Step, is_fetched: bool, result: Any, done: SimpleQueue[Step]) -> None:
        status = step.future.status
        if status == "finished" and is_fetched:
            step.is_done = True
            if isinstance(result, _Failure):
                step.error = self._step_error(step, result)
            else:
                step.result = result
        elif status == "error":  # out of order: earlier steps may be waiting for a living worker
            raise self._dask_error(step, step.future.exception())
        elif status == "cancelled":
            raise self._lost_error()
        else:  # its result was lost with a worker that died just now, and Dask repeats it
            self._watch(step, done)

    def _step_error(self, step: Step, failure: _Failure) -> RequantError:
        if failure.error is not None:
            return failure.error
        return InputOutputError(self.address, f"{step.name}: a worker failed: {failure.text}")

    def _dask_error(self, step: Step, error: BaseException) -> RequantError:
        """The error for a step that Dask has given up."""
        if isinstance(error, self._dask.KilledWorker):
            hint = "look at their memory and their logs; the same command goes on where this one stopped"
            return InputOutputError(self.address, f"{step.name}: one worker after the other died at it", hint=hint)
        what = f"{step.name}: a worker could not begin: {_describe(error)}"
        return InputOutputError(self.address, what, hint="is the same requant installed on every worker?")

    def _count_room(self) -> int:
        """Count the tasks that may be under way, by the threads of the current workers."""
        if monotonic() - self._counted >= _COUNTED:
            self._check()
            try:
                threads: Mapping[str, int] = self._client.nthreads()
            except _LOST as error:
                raise self._lost_error() from error
            if not threads and not self._waits:
                self._info(f"{self.address} has no workers yet; waiting for some")
            self._waits, self._counted = not threads, monotonic()
            self._room = _PER_THREAD * max(1, sum(threads.values()))
        return self._room

    def _check(self) -> None:
        if self._client.status != "running":
            raise self._lost_error()

    def _lost_error(self) -> InputOutputError:
        hint = "when it is back, run the same command again, which resumes a conversion"
        return InputOutputError(self.address, "the scheduler was lost", hint=hint)

    def _cancel(self, steps: Iterable[Step]) -> None:
        """Cancel the steps that are not done."""
        futures = [step.future for step in steps if not step.is_done]
        if futures and self._client.status == "running":
            with contextlib.suppress(*_LOST):
                self._client.cancel(futures)

    def _connect(self) -> Any:
        found = _ADDRESS.fullmatch(self.address)
        refused = f"--cluster: '{printable(self.address)}' is no address of a scheduler; as in tcp://host:8786"
        if found is None or not 0 < int(found[1]) < 2**16:
            raise UsageError(refused)
        protocol, separator, _ = self.address.partition("://")
        if separator and protocol not in self._dask.comm.registry.backends:
            raise UsageError(refused)
        client: Future[Any] = Future()

        def connect() -> None:
            try:
                client.set_result(_client_class()(self.address, timeout=_CONNECT, set_as_default=False, name="requant"))
            except BaseException as error:  # noqa: BLE001, whatever a peer that is no scheduler leads to
                client.set_exception(error)

        # Dask's own limit does not hold where a peer accepts the connection and says nothing
        threading.Thread(target=connect, daemon=True).start()
        try:
            error = client.exception(_CONNECT)
        except TimeoutError as late:
            error = late
        if error is not None:
            hint = "start one with `dask scheduler`, or correct the address"
            raise InputOutputError(self.address, "no scheduler answers there", hint=hint) from error
        return client.result()


def _run_task(fingerprint: Fingerprint, wanted: tuple[str, str], packed: bytes, before: list[Any]) -> Any:
    """Run a packed task on a worker, if its fingerprint is `wanted`: other versions might not even unpack it."""
    own = fingerprint()
    if own != wanted:
        here, there = (f"{version} with kernels {kernels}" for version, kernels in (wanted, own))
        address = importlib.import_module("distributed").get_worker().address
        what = f"the worker {address} runs requant {there}, not {here}; install the same one everywhere"
        return _Failure(UsageError(what))
    failed = next((found for found in before if isinstance(found, _Failure)), None)
    if failed is not None:
        return failed
    try:
        work, item = pickle.loads(packed)
        return work(item, *before)
    except RequantError as error:
        return _Failure(error)
    except BaseException as error:  # noqa: BLE001, the driver raises it
        return _Failure(None, _describe(error))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))[:500]}".rstrip(": ")


def _client_class() -> Any:
    """Return Dask's class of clients; one that could not connect is dropped at once, without closing it for 10 s."""
    return type("Client", (importlib.import_module("distributed").Client,), {"__del__": lambda _: None})


def _import_dask() -> Any:
    """Import the package `distributed`, and silence its log."""
    try:
        found = importlib.import_module("distributed")
    except ImportError as error:
        raise UsageError("--cluster needs Dask; install it with: pip install 'requant[cluster]'") from error
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return found
