"""Check that the server of an experiment tracker can be reached.

mlflow tries for minutes before it fails: 3.17 takes four minutes if nothing listens at its address.
A connection that is tried first fails within seconds.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from qlora_cli.errors import UsageError

_SECONDS = 5.0
"""Time in which a server must accept a connection."""
_VARIABLES = {"mlflow": "MLFLOW_TRACKING_URI"}
"""Name of a tracker -> the environment variable with the address of its server.

wandb is not here: its settings files can also choose offline mode, and it fails after 90 seconds.
"""
_PORTS = {"http": 80, "https": 443}


def check_reachable(name: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError if nothing accepts a connection at the server of the tracker `name`.

    environment: variables that hold the server's address. Trackers without a server, addresses of
    other kinds (files, databases) and servers behind a proxy are not checked.
    """
    variable = _VARIABLES.get(name, "")
    address = urlsplit(environment.get(variable, ""))
    if address.scheme not in _PORTS or not address.hostname:
        return
    if address.scheme in getproxies() and not proxy_bypass(address.hostname):
        return
    try:
        port = address.port or _PORTS[address.scheme]
        socket.create_connection((address.hostname, port), timeout=_SECONDS).close()
    except (OSError, ValueError) as error:
        # The rest of the address may hold a password.
        raise UsageError(
            f"{name} cannot start: its server at {address.hostname} is not reachable: {error}",
            where="train.log_to",
            hint=f"start its server, correct {variable}, or remove {name} from train.log_to",
        ) from error
