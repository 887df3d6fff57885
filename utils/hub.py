"""Whether the hub of models and data can be reached: its own clients try for most of a minute before they say no."""

import contextlib
import os
import socket
import threading
import urllib.request
from urllib.parse import urlsplit

PATIENCE = 4.0  # seconds until a hub that does not answer is taken to be out of reach


def answers(seconds: float = PATIENCE) -> bool:
    """Whether the hub can be reached; where a proxy stands between, only a download can tell, and it counts as reachable."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if urllib.request.getproxies():
        return True
    found, address = [], urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")

    def connect() -> None:
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((address.hostname or "", address.port or 443), seconds).close()
            found.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # a name that nobody resolves keeps it longer than any time limit
    thread.start()
    thread.join(seconds)
    return bool(found)
