"""The hub is asked with little patience."""

import socket
import time

from utils import hub


def test_whether_the_hub_answers_is_known_within_seconds(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.answers()
    assert not hub.answers()  # nobody listens any more

    def never(*arguments) -> None:
        time.sleep(5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", never)
    started = time.monotonic()
    assert not hub.answers(0.1) and time.monotonic() - started < 4
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    assert hub.answers(0.1)  # only a download could tell


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    for value, asked in (("1", False), ("true", False), ("0", True), ("", True)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert hub.answers() is asked
