"""A folder over HTTP/1.1 on a free loopback port: ``python -m benchmarks.static_server DIR PORTFILE``."""

from __future__ import annotations

import functools
import os
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Quiet(SimpleHTTPRequestHandler):
    """Keeps connections open, and says nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Leave out the access log."""


class Server(ThreadingHTTPServer):
    """Many connections at once."""

    request_queue_size = 512
    daemon_threads = True


def main() -> None:
    """Serve until killed."""
    folder, port_file = sys.argv[1:]
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    fresh = Path(port_file + ".new")
    fresh.write_text(str(server.server_port), encoding="utf-8")
    os.replace(fresh, port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
