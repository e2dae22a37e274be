"""A small OpenAI-compatible server of a transformers model, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qlora_cli.export.serve.answer_path import Penalty
from qlora_cli.export.serve.local_model import Decoder, LocalModel


@dataclass
class ServedModel:
    """What a server serves.

    template: chat template in place of the model's own. adds_bos: False to omit the BOS token.
    drops_system: omits system messages. texts_as_chats: applies the template to texts, as Ollama
    does. penalty: is applied, whatever the request asks for.
    has_usage, has_logprobs, has_reason: whether these are reported. is_strict: refuses requests
    with fields that OpenAI's servers do not have. requests: the requests that were answered.
    """

    folder: Path
    name: str = "tuned"
    template: str | None = None
    adds_bos: bool = True
    drops_system: bool = False
    texts_as_chats: bool = False
    penalty: Penalty | None = None
    has_usage: bool = True
    has_logprobs: bool = True
    has_reason: bool = True
    is_strict: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)


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
            if served.is_strict and "repeat_penalty" in body:
                return self._send({"error": "repeat_penalty is not a field"}, 400)
            served.requests.append(body)
            is_text = self.path == "/v1/completions"
            if is_text and not served.texts_as_chats:
                ids = model.encode(body["prompt"], special=served.adds_bos)
            else:
                chat = (
                    [{"role": "user", "content": body["prompt"]}] if is_text else body["messages"]
                )
                text = model.tokenizer.apply_chat_template(
                    [
                        message
                        for message in chat
                        if not (served.drops_system and message["role"] == "system")
                    ],
                    tokenize=False,
                    add_generation_prompt=True,
                    chat_template=served.template,
                )
                ids = model.encode(text, special=False)
            return self._answer(ids, body)

        def _answer(self, ids: list[int], body: dict[str, Any]) -> None:
            answer, log_probs, has_ended = _generate(model, ids, body["max_tokens"], served.penalty)
            choice: dict[str, Any] = {}
            if served.has_reason:
                choice["finish_reason"] = "stop" if has_ended else "length"
            texts = model.continuations([answer[:num] for num in range(len(answer) + 1)])
            pieces = [after[len(before) :] for before, after in pairwise(texts)]
            text = texts[-1]
            if self.path.startswith("/v1/chat"):
                choice["message"] = {"role": "assistant", "content": text}
                tokens = zip(pieces, log_probs, strict=True)
                reported: dict[str, Any] = {
                    "content": [{"token": piece, "logprob": value} for piece, value in tokens]
                }
            else:
                choice["text"] = text
                reported = {"tokens": pieces, "token_logprobs": log_probs}
            if "logprobs" in body:
                choice["logprobs"] = reported
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


def _generate(
    model: LocalModel, prompt: list[int], num: int, penalty: Penalty | None
) -> tuple[list[int], list[float], bool]:
    """Return greedy tokens, their log-probabilities, and whether the model ended the text."""
    decoder = Decoder(model, prompt)
    log_probs: list[float] = []
    while len(decoder.ids) < num:
        logits = decoder.logits
        if penalty is not None:
            logits = penalty.apply(logits, [*prompt, *decoder.ids])
        token = int(logits.argmax())
        if token in model.ends:
            return decoder.ids, log_probs, True
        log_probs.append(float(decoder.logits.log_softmax(-1)[token]))
        decoder.append(token)
    return decoder.ids, log_probs, False
