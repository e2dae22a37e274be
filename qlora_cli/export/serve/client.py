"""A client of an OpenAI-compatible server: models, completions and chat completions.

Only the standard library is used. All requests ask for greedy decoding without any penalty. Some
servers apply a penalty to repeated tokens by default, also at temperature 0: llama-cpp-python's
server divides their logits by 1.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.files.atomic import PARSE_ERRORS

_TIMEOUT_SECONDS = 300
_MAX_MESSAGE = 200
"""Characters of a server's error message that are shown."""
_GREEDY = {"temperature": 0, "seed": 0}
_NO_PENALTIES = {
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repeat_penalty": 1,  # llama.cpp
    "repetition_penalty": 1,  # vLLM, which reads generation_config.json for its default
}
_LOGPROBS = {
    "completions": {"logprobs": 1},
    "chat/completions": {"logprobs": True, "top_logprobs": 1},
}


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    text: the generated text. prompt_tokens: number of tokens of the prompt as the server counts
    them; None if it does not report them. logprobs, pieces: log-probability and text of each
    generated token; empty if the server does not report them. ended: whether the model ended the
    text, and not the limit of tokens; None if the server does not report it. tokens: number of
    generated tokens; None if the server does not report it.
    """

    text: str
    prompt_tokens: int | None
    logprobs: tuple[float, ...] = ()
    pieces: tuple[str, ...] = ()
    ended: bool | None = None
    tokens: int | None = None


class _Refused(QloraError):
    """The server answered with an error status."""


class ServerClient:
    """Sends requests to one model of a server.

    accepts_penalties: whether the server accepted requests that switch penalties off.

    The constructor asks for the list of models and raises UsageError if `name` is not among them,
    QloraError if the server cannot be reached.
    """

    def __init__(self, url: str, name: str | None) -> None:
        """url: address, with or without `/v1`. name: name of the model; None for the only one."""
        if urlsplit(url).scheme not in ("http", "https"):
            raise UsageError(
                f"{url!r} is not an address",
                where="--server",
                hint="write it as http://localhost:8000",
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.name = self._model(name)
        self.accepts_penalties = True
        self._without_logprobs: set[str] = set()

    def complete(self, prompt: str, num: int) -> Answer:
        """Return the continuation of a text. num: largest number of generated tokens."""
        return self._answer("completions", {"prompt": prompt, "max_tokens": num})

    def chat(self, messages: Sequence[Mapping[str, str]], num: int) -> Answer:
        """Return the reply to a chat. num: largest number of generated tokens."""
        return self._answer("chat/completions", {"messages": list(messages), "max_tokens": num})

    def _answer(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Send a request, without the fields that this server refuses."""
        while True:
            optional = _NO_PENALTIES if self.accepts_penalties else {}
            if path not in self._without_logprobs:
                optional = {**optional, **_LOGPROBS[path]}
            common = {"model": self.name, **_GREEDY}
            try:
                content = self._request(path, {**common, **optional, **body})
            except _Refused:
                if path not in self._without_logprobs:
                    self._without_logprobs.add(path)
                elif self.accepts_penalties:
                    self.accepts_penalties = False
                else:
                    raise
                continue
            answer: Answer = self._parsed(content, _parse_answer)
            return answer

    def _model(self, name: str | None) -> str:
        names = self._parsed(
            self._request("models", None), lambda c: [str(m["id"]) for m in c["data"]]
        )
        if name is None and len(names) == 1:
            return str(names[0])
        if name is None or name not in names:
            wanted = "serves several models" if name is None else f"has no model {name!r}"
            raise UsageError(
                f"{self.url} {wanted}; it has {', '.join(names) or 'none'}",
                where="--name",
                hint="name one of these with --name",
            )
        return name

    def _request(self, path: str, body: Mapping[str, Any] | None) -> Any:
        address = f"{self.url}/v1/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(address, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                return json.loads(response.read())
        except HTTPError as fault:
            with fault:
                message = fault.read().decode(errors="replace")[:_MAX_MESSAGE]
            raise _Refused(
                f"the server refused the request with status {fault.code}: {message}", where=address
            ) from fault
        except (URLError, OSError) as fault:
            raise QloraError(
                f"the server cannot be reached: {getattr(fault, 'reason', fault)}",
                where=address,
                hint="start the server, or correct the address of --server",
            ) from fault
        except ValueError as fault:
            raise QloraError(
                f"the server's answer is not JSON: {fault}",
                where=address,
                hint="--server needs an OpenAI-compatible server",
            ) from fault

    def _parsed(self, content: Any, parse: Any) -> Any:
        try:
            return parse(content)
        except PARSE_ERRORS as fault:
            raise QloraError(
                f"the server's answer has an unknown form: {fault!r}",
                where=self.url,
                hint="--server needs an OpenAI-compatible server",
            ) from fault


def _parse_answer(content: Mapping[str, Any]) -> Answer:
    choice = content["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    reason = choice.get("finish_reason")
    reported = choice.get("logprobs") or {}
    if "content" in reported:
        tokens = reported["content"] or []
        values, pieces = ([item[key] for item in tokens] for key in ("logprob", "token"))
    else:
        values, pieces = (reported.get(key) or [] for key in ("token_logprobs", "tokens"))
    return Answer(
        str(text or ""),
        _count(content, "prompt_tokens"),
        tuple(math.nan if value is None else float(value) for value in values),
        tuple(map(str, pieces)),
        None if reason is None else reason == "stop",
        _count(content, "completion_tokens"),
    )


def _count(content: Mapping[str, Any], key: str) -> int | None:
    number = (content.get("usage") or {}).get(key)
    return None if number is None else int(number)
