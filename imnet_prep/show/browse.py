"""A local page over a records folder: classes, images, records and their augmented views.

It answers GET alone, changes nothing, and listens on loopback unless told otherwise. Records are asked for by numbers,
so no path comes from outside; the Host header must be one that this server has, or a page elsewhere could reach it by a
name of its own that points here (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from imnet_prep.errors import ImnetError, PipelineError, RecordsError
from imnet_prep.loader.random_numbers import MAX_EPOCH, MAX_SEED
from imnet_prep.show import browse_pages as pages
from imnet_prep.show.browse_data import Library
from imnet_prep.show.html import tag

try:
    from flask import Flask, Response, abort, request
    from werkzeug.serving import make_server
except ImportError as missing:
    raise RecordsError("browse: Flask is not installed", remedy="pip install 'imnet-prep[browse]'") from missing

Route = Callable[[str], Callable[[Callable[..., Any]], object]]
_ASSETS = {
    "style.css": "text/css",
    "browse.css": "text/css",
    "script.js": "text/javascript",
    "browse.js": "text/javascript",
}
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><path fill="#2f74b5" d="M0 0h1v1H0zM1 1h1v1H1z"/></svg>'
)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def create_app(records: Path, host: str = "127.0.0.1") -> Flask:
    """Make the application.

    Args:
        records: The records folder.
        host: The address that it will listen on; it decides which Host headers are answered.

    Raises:
        RecordsError: The folder cannot be read.
        IntegrityError: The manifest is damaged.
    """
    library = Library(records)
    app = Flask("imnet_prep.show.browse", static_folder=None)

    def check_request() -> None:
        if request.method not in ("GET", "HEAD"):
            abort(405)
        if not host_is_ours(request.host, host):
            abort(403, "This name is not one of this server's.")
        asked = request.view_args or {}
        if "position" in asked and asked["position"] >= len(library.tables.get(asked["split"], ())):
            abort(404)

    def add_headers(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    def show_error(error: ImnetError) -> tuple[str, int]:
        return pages.shell("This cannot be shown", records, tag("p", str(error), class_="warn")), 422

    app.before_request(check_request)
    app.after_request(add_headers)
    app.register_error_handler(ImnetError, show_error)
    get = partial(app.get, provide_automatic_options=False)
    _add_pages(get, library)
    _add_images(get, library)
    return app


def host_is_ours(header: str, host: str) -> bool:
    """Check that a Host header names this server: loopback, its own address, or any address where it is on all."""
    name = header.rpartition(":")[0] if not header.endswith("]") and ":" in header else header
    name = name.strip("[]").lower()
    if name in {"localhost", host.strip("[]").lower()}:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return not _is_loopback(host) and name in {socket.gethostname().lower(), socket.getfqdn().lower()}
    return address.is_loopback if _is_loopback(host) else True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _add_pages(get: Route, library: Library) -> None:
    @get("/")
    def index() -> str:
        return pages.index(library, request.args.get("q", "")[:200])

    @get("/class/<int(signed=True):label>")
    def class_page(label: int) -> str:
        split = request.args.get("split") or next(
            (name for name in library.tables if len(library.of_class(name, label))), next(iter(library.tables), "")
        )
        number = _number("page", 1 << 31)
        known = -1 <= label < len(library.manifest.classes) and split in library.tables
        if not known or (number and number * pages.PAGE_IMAGES >= len(library.of_class(split, label))):
            abort(404)
        return pages.class_page(library, label, split, number)

    @get("/record/<split>/<int:position>")
    def record_page(split: str, position: int) -> str:
        values = _train_values()
        pages.train_options(values)
        return pages.record_page(library, split, position, values, _number("seed", MAX_SEED))

    @get("/<name>")
    def asset(name: str) -> Response:
        if name == "icon.svg":
            return _file(_ICON.encode(), "image/svg+xml")
        if name not in _ASSETS:
            abort(404)
        return _file((Path(__file__).with_name(name)).read_bytes(), _ASSETS[name])


def _add_images(get: Route, library: Library) -> None:
    @get("/image/<split>/<int:position>")
    def image(split: str, position: int) -> Response:
        return _file(*library.image(split, position))

    @get("/thumb/<split>/<int:position>")
    def thumb(split: str, position: int) -> Response:
        return _file(library.thumb(split, position), "image/jpeg")

    @get("/view/<split>/<int:position>")
    def view(split: str, position: int) -> Response:
        options = pages.eval_options() if request.args.get("eval") else pages.train_options(_train_values())
        seed, epoch = _number("seed", MAX_SEED), _number("epoch", MAX_EPOCH)
        return _file(library.view(split, position, options, seed, epoch), "image/png")


def _file(data: bytes, kind: str) -> Response:
    return Response(data, mimetype=kind, headers={"Cache-Control": "private, max-age=300"})


def _number(name: str, high: int) -> int:
    text = request.args.get(name) or "0"
    if not text.isascii() or not text.isdecimal() or int(text[:24]) > high:
        raise PipelineError(f"{name} is out of range", expected=f"0 to {high}", got=repr(text[:40]))
    return int(text[:24])


def _train_values() -> dict[str, float]:
    values: dict[str, float] = {}
    for name, text, default in pages.TRAIN_FIELDS:
        given = request.args.get(name) or default
        try:
            values[name] = float(given)
            if not math.isfinite(values[name]):
                raise ValueError(given)
        except ValueError as error:
            raise PipelineError(f"{text} is not a number", got=repr(given)[:40]) from error
    return values


def serve(records: Path, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve a records folder until it is interrupted.

    Args:
        records: The folder.
        host: Where to listen; anything but loopback shows the images to others.
        port: Where to listen; 0 takes any free one.
        announce: Told the address once it answers.

    Raises:
        RecordsError: The folder cannot be read, or the address cannot be taken.
        IntegrityError: The manifest is damaged.
    """
    app = create_app(records, host)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line a picture
    if not 0 <= port < 1 << 16:
        raise RecordsError("--port is out of range", expected="0 to 65535", got=str(port))
    address = host.strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))  # make_server would print and exit
        server = make_server(address, port, app, threaded=True)
    except OSError as error:
        raise RecordsError(
            f"cannot listen on {host} port {port}", got=error.strerror or str(error), remedy="choose another --port"
        ) from error
    with server:
        announce(f"http://{f'[{address}]' if ':' in host else host}:{server.server_port}/")
        server.serve_forever()
