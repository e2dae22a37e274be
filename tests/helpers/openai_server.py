"""A small OpenAI-compatible server of a transformers model, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from qlora_cli.export.serve.local_model import LocalModel


@dataclass
class ServedModel:
    """What a server serves.

    template: chat template in place of the model's own. adds_bos: False to omit the BOS token.
    has_usage, has_logprobs: whether these are reported.
    """

    folder: Path
    name: str = "tuned"
    template: str | None = None
    adds_bos: bool = True
    has_usage: bool = True
    has_logprobs: bool = True


@contextmanager
def serve(served: ServedModel) -> Iterator[str]:
    """Yield the address of a server, which is stopped at the end of the block."""
    model = LocalModel(served.folder, torch.device("cpu"))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send({"data": [{"id": served.name}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "logprobs" in body and not served.has_logprobs:
                return self._send({"error": "logprobs are not supported"}, 400)
            if self.path == "/v1/completions":
                ids = model.encode(body["prompt"], special=served.adds_bos)
            else:
                text = model.tokenizer.apply_chat_template(
                    body["messages"],
                    tokenize=False,
                    add_generation_prompt=True,
                    chat_template=served.template,
                )
                ids = model.encode(text, special=False)
            return self._answer(ids, body)

        def _answer(self, ids: list[int], body: dict[str, Any]) -> None:
            answer = model.greedy(ids, body["max_tokens"])
            choice: dict[str, Any] = {"text": answer.text}
            if self.path.startswith("/v1/chat"):
                choice = {"message": {"role": "assistant", "content": answer.text}}
            elif "logprobs" in body:
                values = [float(vector.max()) for vector in answer.log_probs]
                choice["logprobs"] = {"token_logprobs": values}
            usage = {"usage": {"prompt_tokens": len(ids)}} if served.has_usage else {}
            self._send({"choices": [choice], **usage})

        def _send(self, content: Any, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
