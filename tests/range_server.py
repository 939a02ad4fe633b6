"""A web server of a folder on the loopback address, in a process of its own, that can be killed and can misbehave.

It gives ranges. ``moods.json`` beside the folder's files lists how it misbehaves: {"do": what, "times": how often,
"value": more of it}, the first that has times left. ``log.txt`` has a line for each request.
"""

from __future__ import annotations

import json
import os
import re
import select
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MOODS, LOG = "moods.json", "log.txt"
START_S = 20.0


class RangeServer:
    """Start it, kill it, start it again on the same port.

    Args:
        folder: whose files it gives.
        control: a folder for its moods and its log.
        secrets: files of a certificate for localhost and of its key, for https.
    """

    def __init__(self, folder: Path, control: Path, *secrets: Path) -> None:
        self._folder, self._control, self._secrets, self.port = folder, control, secrets, 0
        self._child: subprocess.Popen[bytes] | None = None
        self.renew()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" if self._secrets else f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-I", __file__, str(self._folder), str(self._control), str(self.port)]
        command += map(str, self._secrets)
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], START_S)
        assert ready, f"the server did not start in {START_S} s"
        self.port = int(self._child.stdout.readline())

    def renew(self) -> None:
        """Begin with a good mood and an empty log."""
        self.be()
        (self._control / LOG).write_text("")
        if self._child is None:
            self.start()

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        if self._child is not None:
            with self._child as child:  # closes its pipes and waits for it
                child.kill()
            self._child = None

    def __enter__(self) -> RangeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def be(self, *moods: dict[str, Any]) -> None:
        _write_moods(self._control, list(moods))

    @property
    def requests(self) -> list[str]:
        return [line.rpartition(" ")[0] for line in (self._control / LOG).read_text().splitlines()]

    @property
    def connections(self) -> list[str]:
        """The connection of each request, by its port at the client."""
        return [line.rpartition(" ")[2] for line in (self._control / LOG).read_text().splitlines()]


def _write_moods(control: Path, moods: list[dict[str, Any]]) -> None:
    aside = control / "moods.aside"  # first, since the server may be killed here too
    aside.write_text(json.dumps(moods))
    os.replace(aside, control / MOODS)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    folder: Path
    control: Path
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def mood(self) -> dict[str, Any]:
        """Note the request, and take the next mood."""
        with self.lock:
            with open(self.control / LOG, "a") as log:
                log.write(f"{self.path} {self.headers.get('Range')} {self.client_address[1]}\n")
            moods = json.loads((self.control / MOODS).read_text())
            for mood in moods:
                if mood.get("times", 1) > 0:
                    mood["times"] = mood.get("times", 1) - 1
                    _write_moods(self.control, moods)
                    return mood
        return {"do": "well"}

    def do_GET(self) -> None:
        mood = self.mood()
        what, value = mood["do"], mood.get("value")
        if what == "wait":
            time.sleep(value)
        if what == "hang up":
            self.close_connection = True
            return
        if what in ("error", "redirect"):
            self.send_response(302 if what == "redirect" else value)
            if what == "redirect":
                self.send_header("Location", value.replace("{path}", self.path))
            if "retry_after" in mood:
                self.send_header("Retry-After", mood["retry_after"])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        self.give(path.read_bytes(), what, value)

    def give(self, data: bytes, what: str, value: Any) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body, total = data, len(data)
        if asked and what != "ignore ranges":
            first, last = int(asked[1]), min(int(asked[2]), total - 1)
            if first >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if what == "another range":
                first, last = first + 1, last + 1
            body = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        if what == "wrong bytes":
            body = bytes(byte ^ 0x55 for byte in body)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if what == "cut":
            body = body[:value]
            self.close_connection = True
        if what == "trickle":
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(value)
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:  # clients that hang up
        pass


def _serve(folder: str, control: str, port: str, *secrets: str) -> None:
    _Handler.folder, _Handler.control = Path(folder), Path(control)
    server = _Server(("127.0.0.1", int(port)), _Handler)
    if secrets:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*secrets)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.buffer.read()  # ends when whoever started it has ended


if __name__ == "__main__":
    _serve(*sys.argv[1:])
