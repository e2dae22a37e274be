"""A client of an OpenAI-compatible server: models, completions and chat completions.

Only the standard library is used. All requests are greedy (temperature 0).
"""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    text: the generated text. prompt_tokens: number of tokens of the prompt as the server counts
    them; None if it does not report them. logprobs: log-probability of each generated token; empty
    if the server does not report them.
    """

    text: str
    prompt_tokens: int | None
    logprobs: tuple[float, ...] = ()


class ServerClient:
    """Sends requests to one model of a server.

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

    def complete(self, prompt: str, num: int) -> Answer:
        """Return the continuation of a text. num: largest number of generated tokens."""
        body = {"prompt": prompt, "max_tokens": num}
        try:
            content = self._post("completions", {**body, "logprobs": 1})
        except QloraError:  # Some servers have no log-probabilities and refuse the request.
            content = self._post("completions", body)
        answer: Answer = self._parsed(content, _completion)
        return answer

    def chat(self, messages: Sequence[Mapping[str, str]], num: int) -> Answer:
        """Return the reply to a chat. num: largest number of generated tokens."""
        body = {"messages": list(messages), "max_tokens": num}
        answer: Answer = self._parsed(self._post("chat/completions", body), _chat_completion)
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

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        common = {"model": self.name, "temperature": 0, "seed": 0}
        return self._request(path, {**common, **body})

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
            raise QloraError(
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
        except (*PARSE_ERRORS, IndexError) as fault:
            raise QloraError(
                f"the server's answer has an unknown form: {fault!r}",
                where=self.url,
                hint="--server needs an OpenAI-compatible server",
            ) from fault


def _completion(content: Mapping[str, Any]) -> Answer:
    choice = content["choices"][0]
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    known = tuple(float(value) for value in logprobs if value is not None)
    return Answer(str(choice["text"]), _prompt_tokens(content), known)


def _chat_completion(content: Mapping[str, Any]) -> Answer:
    text = content["choices"][0]["message"]["content"]
    return Answer(text or "", _prompt_tokens(content))


def _prompt_tokens(content: Mapping[str, Any]) -> int | None:
    number = (content.get("usage") or {}).get("prompt_tokens")
    return None if number is None else int(number)
