"""JSON requests to one server: many in flight, retried, and answered in order.

Imports httpx and tenacity: import it late.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity

from nest.errors import EngineError, InputError
from nest.generation.workers import fail, next_result

K = TypeVar("K")
R = TypeVar("R")

BACKOFF_SECONDS, MOST_BACKOFF_SECONDS = 0.5, 30.0
"""Wait before the first retry, doubled for each further one; up to as much again is added by chance."""

MOST_RETRY_AFTER_SECONDS = 60.0
"""A server that asks for a longer pause is asked again after this one."""

DEADLINE_TIMEOUTS = 4
"""A request with all of its retries may take so many times as long as one attempt."""

CHECK_SECONDS = 30.0
"""Longest wait for the answer to a question that takes a server no work."""

AHEAD = 4
"""Answers kept behind a slower one before them, in multiples of the requests in flight."""

MOST_BYTES = 64 * 2**20
"""Largest reply."""

RETRIED = frozenset({408, 409, 425, 429})
"""Refusals that pass by themselves, besides all from 500 on."""

_LOOPBACK = re.compile(r"^(localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0|::1)$")


class _PassingError(Exception):
    """What may be otherwise at the next attempt.

    Args:
        said: What the server did, to go on from `the server at ...`.
        retry_after: Seconds that it asks for.
    """

    def __init__(self, said: str, retry_after: float | None = None) -> None:
        super().__init__(said)
        self.retry_after = retry_after


class Transport:
    """Asks one server.

    Requests run in an event loop in one thread of its own, which ends with the iterator that they are read
    from: an interruption ends them at once. No redirect is followed, so that the key goes nowhere else, and
    no message holds it. A server on this machine is not asked through a proxy.

    Args:
        url: Address that paths are added to, such as `http://localhost:8000/v1`.
        api_key: Sent as a bearer token.
        in_flight: Most requests at once.
        timeout_seconds: For one attempt, from the connection to the last byte; a request may take
            `DEADLINE_TIMEOUTS` of them.
        retries: Attempts after the first.

    Attributes:
        url: The address.

    Raises:
        InputError: an address, a key or a number that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        in_flight: int,
        timeout_seconds: float,
        retries: int,
    ) -> None:
        self.url = _checked_url(url)
        self._key = _checked_key(api_key)
        if in_flight < 1 or retries < 0 or not 0 < timeout_seconds < float("inf"):
            raise InputError(
                f"in_flight is {in_flight}, timeout_seconds {timeout_seconds} and retries {retries}; "
                "expected at least 1, more than 0 and at least 0"
            )
        self._in_flight, self._timeout, self._retries = in_flight, timeout_seconds, retries
        self._jitter = random.Random()  # not Python's global one, which is the caller's

    def post_each(
        self,
        path: str,
        bodies: Iterable[tuple[K, Mapping[str, Any]]],
        read: Callable[[K, Any], R],
    ) -> Iterator[tuple[K, R]]:
        """What is read from the reply to each body, in the bodies' order.

        Args:
            path: Added to the address.
            bodies: Each with what it is for; taken as they are needed.
            read: Makes of what a body is for, and the reply's JSON, what is wanted.

        Raises:
            InputError: the server refuses a body (400, 413, 422).
            EngineError: the server cannot be asked, or what `read` raises.
        """
        failed: Future[None] = Future()
        waiting: deque[tuple[K, Future[R]]] = deque()
        coming = iter(bodies)
        with _Loop(self._settings()) as loop:
            slots = asyncio.Semaphore(self._in_flight)

            async def ask(key: K, body: Mapping[str, Any]) -> R:
                async with slots:
                    if failed.done():  # nothing more is asked after an error
                        raise asyncio.CancelledError
                    try:
                        return read(key, await self._posted(loop.client, path, body))
                    except Exception as fault:
                        fail(failed, fault)
                        raise

            def send() -> None:
                for key, body in islice(coming, AHEAD * self._in_flight - len(waiting)):
                    waiting.append((key, loop.submit(ask(key, body))))

            send()
            while waiting:
                result = next_result(waiting[0][1], failed)
                key, _ = waiting.popleft()
                send()
                yield key, result

    def get(self, path: str) -> tuple[int, Any]:
        """(status, JSON) of one attempt; None in place of what is no JSON.

        Raises:
            EngineError: nothing listens, or what does gives no answer.
        """
        seconds = min(CHECK_SECONDS, self._timeout)
        with _Loop(self._settings()) as loop:

            async def ask() -> tuple[int, bytes, Mapping[str, str]]:
                return await self._exchange(loop.client, "GET", path, None, seconds)

            try:
                status, content, _ = loop.submit(ask()).result()
            except _PassingError as fault:
                raise EngineError(
                    f"the server at {self.url} {fault}; check that it runs and that this is its address"
                ) from None
        return status, _json(content)

    def shown(self, text: str, most: int = 200) -> str:
        """A text for a message: on one line, not too long, without the key."""
        line = " ".join(re.sub(r"<[^>]*>", " ", text).split())
        if self._key:
            line = line.replace(self._key, "***")
        return line if len(line) <= most else f"{line[:most]}..."

    def _settings(self) -> dict[str, Any]:
        host = urlsplit(self.url).hostname or ""
        return {
            "headers": {"Authorization": f"Bearer {self._key}"} if self._key else {},
            "limits": httpx.Limits(
                max_connections=self._in_flight, max_keepalive_connections=self._in_flight
            ),
            "timeout": None,  # each attempt has one of its own, over all of it
            "follow_redirects": False,
            "trust_env": _LOOPBACK.match(host) is None,
        }

    async def _posted(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of a reply, after as many attempts as it takes.

        Raises:
            InputError, EngineError: as `post_each`.
        """
        last = "gives no answer"

        async def attempt() -> Any:
            nonlocal last
            try:
                return await self._attempt(client, path, body)
            except _PassingError as fault:
                last = str(fault)
                raise

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=tenacity.stop_after_attempt(self._retries + 1),
            wait=self._pause,
            sleep=asyncio.sleep,
            reraise=True,
        )
        started = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE_TIMEOUTS * self._timeout):
                return await retrying(attempt)
        except (_PassingError, TimeoutError):
            n_attempts = retrying.statistics["attempt_number"]
            seconds = time.monotonic() - started
            raise EngineError(
                f"the server at {self.url} {last} ({n_attempts} attempts in {seconds:.0f} s); check that "
                "it still runs and how it is loaded, or allow more time or fewer requests in flight"
            ) from None

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt."""
        fault = state.outcome.exception() if state.outcome is not None else None
        backoff = min(BACKOFF_SECONDS * 2.0 ** (state.attempt_number - 1), MOST_BACKOFF_SECONDS)
        jitter = backoff * self._jitter.random()
        if isinstance(fault, _PassingError) and fault.retry_after is not None:
            return min(fault.retry_after, MOST_RETRY_AFTER_SECONDS) + jitter
        return backoff + jitter

    async def _attempt(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
        status, content, headers = await self._exchange(client, "POST", path, body, self._timeout)
        if 200 <= status < 300:
            reply = _json(content)
            if reply is None:
                raise EngineError(
                    f"{self.url}{path} answers something that is no JSON "
                    f"({self.shown(content.decode(errors='replace'), 80)!r}); check the address, which "
                    "mostly ends in /v1"
                )
            return reply
        said = self.shown(_message_in(content))
        if status in RETRIED or status >= 500:
            raise _PassingError(f"answers {status} ({said})", _retry_after(headers))
        if status in (400, 413, 422):
            raise InputError(f"the server at {self.url} refuses a request ({status}): {said}")
        if status in (401, 403):
            raise EngineError(
                f"the server at {self.url} refuses the key ({status}: {said}); give the right one as "
                "api_key, or in the environment as OPENAI_API_KEY"
            )
        if 300 <= status < 400:
            target = self.shown(headers.get("location", "nowhere"))
            raise EngineError(
                f"{self.url}{path} redirects to {target} ({status}), which is not followed; if that is "
                "the server, give its address"
            )
        raise EngineError(
            f"{self.url}{path} answers {status} ({said}); check the address, which mostly ends in /v1, "
            "and the model's name"
        )

    async def _exchange(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        seconds: float,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Status, content and headers of a reply.

        Raises:
            _PassingError: no whole reply.
            EngineError: no reply that could be had by another attempt.
        """
        content = bytearray()
        try:
            async with (
                asyncio.timeout(seconds),
                client.stream(method, f"{self.url}{path}", json=body) as response,
            ):
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > MOST_BYTES:
                        raise EngineError(
                            f"{self.url}{path} answers more than {MOST_BYTES // 2**20} MiB, which is no "
                            "answer; check the address"
                        )
                return response.status_code, bytes(content), response.headers
        except TimeoutError:
            had = "no answer" if not content else "no whole answer"
            raise _PassingError(f"gives {had} within {seconds:g} s") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as fault:
            raise _PassingError(f"cannot be reached ({self.shown(str(fault))})") from None
        except (httpx.NetworkError, httpx.RemoteProtocolError) as fault:
            said = self.shown(str(fault) or type(fault).__name__)
            raise _PassingError(f"drops the connection ({said})") from None
        except (httpx.RequestError, httpx.InvalidURL) as fault:
            said = self.shown(str(fault) or type(fault).__name__)
            raise EngineError(
                f"{self.url}{path} cannot be asked ({said}); check the address"
            ) from None


class _Loop:
    """An event loop in a thread of its own, with a client; all that runs in it ends with the block."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="nest-requests", daemon=True
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self.client: httpx.AsyncClient

    def __enter__(self) -> _Loop:
        self._thread.start()
        self._ready.result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(timeout=10)  # longer only in a look-up of names that hangs

    def submit(self, job: Coroutine[Any, Any, R]) -> Future[R]:
        """Begin a job."""
        return asyncio.run_coroutine_threadsafe(self._kept(job), self._loop)

    async def _kept(self, job: Coroutine[Any, Any, R]) -> R:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await job

    async def _run(self) -> None:
        try:
            self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
            async with httpx.AsyncClient(**self._settings) as self.client:
                self._ready.set_result(None)
                await self._over.wait()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        except BaseException as fault:  # is raised where the loop was asked for
            if self._ready.done():
                raise
            self._ready.set_exception(fault)


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(
            f"the server's address is {url[:80]!r}; expected one such as http://localhost:8000/v1"
        )
    if parts.username is not None or parts.password is not None:
        raise InputError(
            "the server's address holds a name or a password; leave them out, and give a key as api_key or "
            "in the environment as OPENAI_API_KEY"
        )
    if parts.query or parts.fragment:
        raise InputError(
            f"the server's address {url[:80]!r} holds a ? or a #; expected it up to the path, such as "
            "http://localhost:8000/v1"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _checked_key(key: str | None) -> str | None:
    """None for an empty one. The message does not show it, nor would that of the library that sends it."""
    key = (key or "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise InputError(
            "the API key holds a blank or a letter that no key has; set OPENAI_API_KEY, or api_key, anew"
        )
    return key or None


def _json(content: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _message_in(content: bytes) -> str:
    """What a server says of an error, in any of the forms that are about."""
    reply = _json(content)
    for key in ("error", "message", "detail", "msg"):
        if isinstance(reply, list) and reply:
            reply = reply[0]
        if isinstance(reply, Mapping) and reply.get(key):
            reply = reply[key]
    if isinstance(reply, str):
        return reply
    text = content.decode(errors="replace") if reply is None else json.dumps(reply)
    return text.strip() or "no reason given"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks for, given as such or as a date."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
