"""A judge of pairs behind a real HTTP server, and reference answers for it."""

import contextlib
import http.server
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safesteer.evaluation.pairwise_judge import PairwiseJudge


class FakeServer(http.server.ThreadingHTTPServer):
    """Speaks OpenAI's protocol; prefers the answer that is longer, or says what it is told to."""

    daemon_threads = True
    requests: list[dict[str, Any]]
    logprobs: bool = True
    says: str | None = None
    refuses: bool = False


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.refuses:
            return self.reply(400, {"error": {"message": "no logprobs here"}})
        text = body["messages"][-1]["content"]
        first, second = text.split("<<<\n")[2].split("\n>>>")[0], text.split("<<<\n")[3].split("\n>>>")[0]
        winner = "m" if len(first) > len(second) else "M"
        says = self.server.says or winner
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": says},
            "finish_reason": "length",
        }
        if self.server.logprobs:
            loser = "M" if winner == "m" else "m"
            top = [{"token": winner, "logprob": math.log(0.6)}, {"token": loser, "logprob": math.log(0.2)}]
            choice["logprobs"] = {
                "content": [{"token": winner, "logprob": math.log(0.6), "top_logprobs": top}]
            }
        self.reply(200, {"choices": [choice]})

    def reply(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served() -> Iterator[FakeServer]:
    """Run the server for the length of a block."""
    made = FakeServer(("127.0.0.1", 0), Handler)
    made.requests = []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def judge_at(server: FakeServer, prompt: str | None = None) -> PairwiseJudge:
    return PairwiseJudge("judge", f"http://127.0.0.1:{server.server_address[1]}/v1", prompt=prompt)


def references(folder: Path, count: int = 5) -> None:
    path = folder / "alpaca_eval" / "gpt4_1106_preview_model_outputs.json"
    path.parent.mkdir(parents=True)
    # Half of the references are empty of words, half longer than anything the testbed says.
    rows = [
        {
            "instruction": f"What is {n + 10} + {n + 10}?",
            "output": "x" if n % 2 else "long " * 200,
            "generator": "g",
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(rows))
