"""Many requests in flight to a server against one at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from experiments.benchmarks.protocol import interleaved
from nest.conversations.conversation import Conversation
from nest.generation.sampling import GREEDY
from nest.generation.server import ServerEngine

N_REQUESTS, IN_FLIGHT, SERVICE_SECONDS, REPEATS, WARM_UP = 64, 16, 0.1, 5, 1


def serving_times() -> tuple[dict[str, list[float]], bool]:
    """Seconds of each for the same conversations, and whether every answer is the right one, in order."""
    asked = [Conversation.of(f"question {number}") for number in range(N_REQUESTS)]
    with stand_in() as url:
        engines = {
            "many": ServerEngine(url, "stand-in", api_key="", in_flight=IN_FLIGHT),
            "one": ServerEngine(url, "stand-in", api_key="", in_flight=1),
        }
        gate = all(
            [one.text for one in engine.generate(asked, GREEDY)] == [c.asked for c in asked]
            for engine in engines.values()
        )
        arms = {
            name: lambda engine=engine: list(engine.generate(asked, GREEDY))  # type: ignore[misc]
            for name, engine in engines.items()
        }
        seconds = interleaved(arms, torch.device("cpu"), repeats=REPEATS, warm_up=WARM_UP)
    return seconds, gate


@contextmanager
def stand_in() -> Iterator[str]:
    """The address of a server that takes its time, and says what it is asked."""
    server = _Server(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 4 * IN_FLIGHT  # of five, further connections wait for a second


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: the second would wait for word of the first

    def do_GET(self) -> None:
        self._send({"data": [{"id": "stand-in"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(SERVICE_SECONDS)
        message = {"role": "assistant", "content": body["messages"][-1]["content"]}
        self._send({"choices": [{"message": message, "finish_reason": "stop"}]})

    def _send(self, content: object) -> None:
        sent = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
