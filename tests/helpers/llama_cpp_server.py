"""llama-cpp-python's server on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

_TRIES = 600
_SECONDS = 0.2


@contextmanager
def serve_file(file: Path, *words: str) -> Iterator[str]:
    """Yield the address of a server of a GGUF file, which is stopped at the end of the block.

    words: further options of the server. Raises RuntimeError if the server does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port), "--model", str(file)]
    sizes = ["--n_ctx", "512", "--n_threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_cpp.server", *where, *sizes, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(_TRIES):
            try:
                urlopen(f"{address}/models").close()
                break
            except URLError:
                if process.poll() is not None:
                    raise RuntimeError(f"the server of {file} ended") from None
                time.sleep(_SECONDS)
        yield address
    finally:
        process.terminate()
        process.wait()
