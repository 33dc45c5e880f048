"""A local server that speaks the OpenAI chat protocol, and misbehaves when it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], Any]
"""Makes of a request's body the text, the message or the whole reply."""

DROP, STALL, TRICKLE, CUT = "drop", "stall", "trickle", "cut"
"""Close the connection; never answer; answer for ever, byte by byte; close it amid the reply."""


def echo(body: dict[str, Any]) -> str:
    """The last words of the user, the last prefix of an answer, and the seed."""
    users = [turn["content"] for turn in body["messages"] if turn["role"] == "user"]
    return f" says: {users[-1]} seed {body.get('seed')} end of it"


def reply_of(
    message: dict[str, Any], finish: str | None = "stop", n_tokens: int = 7
) -> dict[str, Any]:
    """A whole reply."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "1", "choices": [choice], "usage": {"completion_tokens": n_tokens}}


class StandIn:
    """Listens on a free port until the block ends.

        with StandIn(faults=[500, DROP]) as server:
            ServerEngine(server.url, "tiny")

    Args:
        answer: What it says.
        models: Names that it serves; None for a server without that list.
        faults: What the first requests get instead of answers: a status, (status, body, headers), or one of
            DROP, STALL, TRICKLE, CUT.
        gate: Waited for before each answer, so that a test can look at what is in flight.
        honours_stop: Whether it knows stop texts.

    Attributes:
        url: Its address.
        bodies: Of all requests, as they came.
        headers: Likewise.
        most_in_flight: Requests that it held at once.
        released: Ends what stalls.
    """

    def __init__(
        self,
        answer: Answer = echo,
        *,
        models: Sequence[str] | None = ("tiny",),
        faults: Sequence[Any] = (),
        gate: Callable[[dict[str, Any]], object] | None = None,
        honours_stop: bool = True,
    ) -> None:
        self.answer, self.models, self.gate = answer, models, gate
        self.honours_stop = honours_stop
        self.faults = list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_in_flight = self.in_flight = 0
        self.released = threading.Event()
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stand_in = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reply(self, body: dict[str, Any]) -> Any:
        said = self.answer(body)
        if not isinstance(said, str):
            return said if "choices" in said else reply_of(said)
        words, finish = said.split(), "stop"
        if len(words) > body["max_tokens"]:
            said, finish = " ".join(words[: body["max_tokens"]]), "length"
        places = [said.find(text) for text in body.get("stop", []) if text in said]
        if places and self.honours_stop:
            said, finish = said[: min(places)], "stop"
        return reply_of({"content": said}, finish, len(said.split()))


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64
    stand_in: StandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 10  # of a connection that is kept open and not used

    def do_GET(self) -> None:
        own = self.server.stand_in
        if own.models is None or not self.path.endswith("/models"):
            self._send(404, {"error": {"message": "no such page"}})
        else:
            self._send(200, {"object": "list", "data": [{"id": name} for name in own.models]})

    def do_POST(self) -> None:
        own = self.server.stand_in
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with own.lock:
            own.bodies.append(body)
            own.headers.append(dict(self.headers))
            own.in_flight += 1
            own.most_in_flight = max(own.most_in_flight, own.in_flight)
            fault = own.faults.pop(0) if own.faults else None
        try:
            if own.gate is not None:
                own.gate(body)
            if fault is None:
                self._send(200, own.reply(body))
            else:
                self._misbehave(fault)
        finally:
            with own.lock:
                own.in_flight -= 1

    def _misbehave(self, fault: Any) -> None:
        own = self.server.stand_in
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": f"fault {fault}"}})
        elif isinstance(fault, tuple):
            self._send(*fault)
        elif fault == STALL:
            own.released.wait()
            self.close_connection = True
        elif fault == TRICKLE:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while not own.released.wait(0.02):
                self.wfile.write(b" ")
            self.close_connection = True
        elif fault == CUT:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        else:
            assert fault == DROP
            self.close_connection = True

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
