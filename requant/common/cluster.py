"""A cluster: work done by the workers of a Dask scheduler, with the results in the order of the items.

Dask carries out again what a worker took with it when it died, so work must be safe to repeat, or to be done twice at
once by a worker that was only thought to be dead: it writes the same bytes to the same place, or nothing. What is sent
is pickle over TCP (or TLS, `tls://`, by Dask's own configuration): whoever reaches the scheduler can run anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import pickle
import re
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, TypeVar

from requant.errors import InputOutputError, RequantError, UsageError, printable

Item = TypeVar("Item")
Result = TypeVar("Result")
Fingerprint = Callable[[], tuple[str, str]]

_PER_THREAD = 4  # tasks of a worker's thread that the scheduler knows of: one at work, one at hand, two to come
_ADDRESS = re.compile(r"(?:[a-z]+://)?[^/]+:([0-9]{1,5})/?")
_CONNECT = 5.0  # seconds in which a scheduler must answer
_TICK = 0.1  # seconds after which the main thread looks for signals and for the scheduler again
_FETCH = 5.0  # seconds for results, which are small
_COUNTED = 2.0  # seconds for which a number of workers is believed
_LOST = (OSError, asyncio.TimeoutError, CancelledError)  # what a call to a scheduler that has gone raises


@dataclass(eq=False, slots=True)
class Step:
    """`work` of `item` on some worker; `name` is what it does, for messages.

    after: steps begun before, whose results are further arguments. Everything must pickle, `work` by its name, but for
    `about`, which is for the caller.
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
    """What work raised, as a result: what cannot be pickled would never arrive, and be waited for for ever."""

    error: RequantError | None
    said: str = ""


class Cluster:
    """The workers of the scheduler at `address`. Use as a context manager; `tell` takes lines for the user.

    `fingerprint`: a function of a module that gives the version and the state of the kernels; a worker whose own
    result is another refuses to work.

    Raises UsageError where Dask is not installed or the address is none, InputOutputError where no scheduler answers.
    Dask's own log is silenced: what matters in it is raised.
    """

    def __init__(self, address: str, fingerprint: Fingerprint, tell: Callable[[str], None] = lambda _: None) -> None:
        self.address, self._fingerprint, self._tell = address, fingerprint, tell
        self._dask = _dask()
        self._client = self._connected()
        self._room, self._counted, self._waits = 0, -_COUNTED, False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, which drops what it was still to do for us; more than once does no harm."""
        with contextlib.suppress(*_LOST):
            self._client.close(timeout=1)

    def in_order(
        self, work: Callable[[Item], Result], items: Iterable[Item], name: Callable[[Item], str] = lambda _: "a task"
    ) -> Generator[Result, None, None]:
        """`work` of every item, in their order, as `pool.in_order`; `name` says what an item is, for messages."""
        with contextlib.closing(self.run(Step(work, item, name(item)) for item in items)) as steps:
            for step in steps:
                yield step.result

    def run(self, steps: Iterable[Step]) -> Generator[Step, None, None]:
        """The steps in their order, each with its result; the first error of the work in that order is raised.

        Four steps for each thread of a worker are taken and under way at a time. Without workers it waits until some
        come. Close the generator where it may be left early. Raises what the work raises if it is a RequantError;
        InputOutputError for everything else, for work that one worker after the other died at, and where the
        scheduler is lost.
        """
        source, under_way = iter(steps), 0
        ahead: deque[Step] = deque()
        done: SimpleQueue[Step] = SimpleQueue()
        try:
            while True:
                for step in self._begun(source, under_way, done):
                    ahead.append(step)
                    under_way += 1
                if not ahead:
                    return
                finished = self._finished(done)
                under_way -= len(finished)
                if any(step.error is not None for step in finished):
                    source = iter(())
                while ahead and ahead[0].is_done:
                    step = ahead.popleft()
                    if step.error is not None:
                        raise step.error
                    yield step
        finally:
            self._drop(ahead)

    def _begun(self, source: Iterator[Step], under_way: int, done: SimpleQueue[Step]) -> Iterator[Step]:
        """Steps from `source`, as many as there is room for, sent to the scheduler."""
        room = self._has_room()
        while under_way < room and (step := next(source, None)) is not None:
            self._check()
            packed = pickle.dumps((step.work, step.item))
            before = [other.future for other in step.after]
            key = f"{step.work.__name__}-{uuid.uuid4().hex}"
            step.future = self._client.submit(
                _carry_out, self._fingerprint, self._fingerprint(), packed, before, key=key, pure=False
            )
            self._watch(step, done)
            under_way += 1
            yield step

    def _watch(self, step: Step, done: SimpleQueue[Step]) -> None:
        step.future.add_done_callback(lambda _: done.put(step))

    def _finished(self, done: SimpleQueue[Step]) -> list[Step]:
        """Steps that have come to an end, with their results, waited for for a moment."""
        steps = []
        with contextlib.suppress(Empty):
            steps.append(done.get(timeout=_TICK))
            while True:
                steps.append(done.get_nowait())
        self._check()
        results = self._fetched({i: step.future for i, step in enumerate(steps) if step.future.status == "finished"})
        for i, step in enumerate(steps):
            self._conclude(step, i in results, results.get(i), done)
        if steps and not any(step.is_done for step in steps):
            sleep(_TICK)  # all of them went with a worker
        return [step for step in steps if step.is_done]

    def _fetched(self, futures: Mapping[int, Any]) -> Mapping[int, Any]:
        """The results, or none for now: what went with a worker is made again, which may take until one comes."""

        async def fetch() -> Mapping[int, Any]:
            found: Mapping[int, Any] = await self._client.gather(dict(futures), errors="skip", asynchronous=True)
            return found

        try:
            return self._client.sync(fetch, callback_timeout=_FETCH) if futures else {}
        except asyncio.TimeoutError:
            return {}
        except _LOST as error:
            raise self._lost() from error

    def _conclude(self, step: Step, is_fetched: bool, result: Any, done: SimpleQueue[Step]) -> None:
        status = step.future.status
        if status == "finished" and is_fetched:
            step.is_done = True
            if isinstance(result, _Failure):
                step.error = self._failed(step, result)
            else:
                step.result = result
        elif status == "error":  # not in its turn: what comes before may be waiting for a worker that lives
            raise self._given_up(step, step.future.exception())
        elif status == "cancelled":
            raise self._lost()
        else:  # its result went with a worker that died just now, and it is carried out again
            self._watch(step, done)

    def _failed(self, step: Step, failure: _Failure) -> RequantError:
        if failure.error is not None:
            return failure.error
        return InputOutputError(self.address, f"{step.name}: a worker failed: {failure.said}")

    def _given_up(self, step: Step, error: BaseException) -> RequantError:
        """The error for a step that Dask itself has given up."""
        if isinstance(error, self._dask.KilledWorker):
            hint = "look at their memory and their logs; the same command goes on where this one stopped"
            return InputOutputError(self.address, f"{step.name}: one worker after the other died at it", hint=hint)
        what = f"{step.name}: a worker could not begin: {_said(error)}"
        return InputOutputError(self.address, what, hint="is the same requant installed on every worker?")

    def _has_room(self) -> int:
        """How many tasks may be under way, by the threads of the workers that there are now."""
        if monotonic() - self._counted >= _COUNTED:
            self._check()
            try:
                threads: Mapping[str, int] = self._client.nthreads()
            except _LOST as error:
                raise self._lost() from error
            if not threads and not self._waits:
                self._tell(f"{self.address} has no workers yet; waiting for some")
            self._waits, self._counted = not threads, monotonic()
            self._room = _PER_THREAD * max(1, sum(threads.values()))
        return self._room

    def _check(self) -> None:
        if self._client.status != "running":
            raise self._lost()

    def _lost(self) -> InputOutputError:
        hint = "when it is back, run the same command again, which resumes a conversion"
        return InputOutputError(self.address, "the scheduler was lost", hint=hint)

    def _drop(self, steps: Iterable[Step]) -> None:
        """Tell the scheduler that nobody waits for the steps any more."""
        futures = [step.future for step in steps if not step.is_done]
        if futures and self._client.status == "running":
            with contextlib.suppress(*_LOST):
                self._client.cancel(futures)

    def _connected(self) -> Any:
        found = _ADDRESS.fullmatch(self.address)
        refused = f"--cluster: '{printable(self.address)}' is no address of a scheduler; as in tcp://host:8786"
        if found is None or not 0 < int(found[1]) < 2**16:
            raise UsageError(refused)
        try:
            return self._dask.Client(self.address, timeout=_CONNECT, set_as_default=False, name="requant")
        except ValueError as error:  # a way to connect that Dask does not know
            raise UsageError(refused) from error
        except _LOST as error:
            hint = "start one with `dask scheduler`, or correct the address"
            raise InputOutputError(self.address, "no scheduler answers there", hint=hint) from error


def _carry_out(fingerprint: Fingerprint, wanted: tuple[str, str], packed: bytes, before: list[Any]) -> Any:
    """On a worker: the work packed up with its item, which other versions might not even unpack."""
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
    except BaseException as error:  # noqa: BLE001, it is raised where the result goes
        return _Failure(None, _said(error))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))[:500]}".rstrip(": ")


def _dask() -> Any:
    """The package `distributed`, its log silenced."""
    try:
        found = importlib.import_module("distributed")
    except ImportError as error:
        raise UsageError("--cluster needs Dask; install it with: pip install 'requant[cluster]'") from error
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return found
