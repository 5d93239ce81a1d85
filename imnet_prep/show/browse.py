"""Serve local pages of a records folder: classes, images, records and their augmented views.

The server answers only GET, changes nothing, and listens on loopback by default. Records are requested by number, so no
path comes from outside. The Host header must name this server: otherwise a page elsewhere could read the images through
a name of its own that points here (DNS rebinding).
"""

import ipaddress
import logging
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from imnet_prep.errors import ImnetError, RecordsError
from imnet_prep.loader.options import EvalOptions
from imnet_prep.loader.random_numbers import MAX_EPOCH, MAX_SEED
from imnet_prep.show.browse_data import VIEW_SIDE, Library, kept_picture
from imnet_prep.show.browse_lists import number_of
from imnet_prep.show.pages import render

try:
    from flask import Flask, Response, abort, request
    from werkzeug.exceptions import NotFound
    from werkzeug.serving import make_server

    from imnet_prep.show.browse_pages import Route, add_lists, add_record, add_reviews, train_options, train_values
except ImportError as missing:
    raise RecordsError("browse: Flask is not installed", remedy="pip install 'imnet-prep[browse]'") from missing

_ASSETS = {
    "style.css": "text/css",
    "browse.css": "text/css",
    "browse.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
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
        host: The address to listen on. Requests with the Host header of another server are refused.

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
        if "number" in asked:
            records_there = library.splits.get(asked["split"], slice(0, 0))
            if asked["number"] >= records_there.stop - records_there.start:
                abort(404)

    def add_headers(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    def unusable(error: ImnetError) -> tuple[str, int]:
        return page("browse_error.html", error=error), 422

    def missing(_: NotFound) -> tuple[str, int]:
        return page("browse_error.html", error="There is no such page or record."), 404

    page = partial(render, name=records.resolve().name, library=library)
    app.before_request(check_request)
    app.after_request(add_headers)
    app.register_error_handler(ImnetError, unusable)
    app.register_error_handler(NotFound, missing)
    add_lists(app.get, library, page)
    add_reviews(app.get, library, page)
    add_record(app.get, library, page)
    _add_files(app.get, library)
    return app


def host_is_ours(header: str, host: str) -> bool:
    """Return whether a Host header names this server: by loopback or its address, or by any if it listens on all."""
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


def _add_files(get: Route, library: Library) -> None:
    def start(split: str) -> int:
        return int(library.splits[split].start)

    @get("/image/<split>/<int:number>")
    def image(split: str, number: int) -> Response:
        return _file(*library.image(start(split) + number))

    @get("/thumb/<split>/<int:number>")
    def thumb(split: str, number: int) -> Response:
        return _file(library.thumb(start(split) + number), "image/jpeg")

    @get("/view/<split>/<int:number>")
    def view(split: str, number: int) -> Response:
        evaluation = EvalOptions(batch_size=1, image_size=VIEW_SIDE)
        options = evaluation if request.args.get("eval") else train_options(train_values(request.args))
        seed, epoch = (
            number_of(request.args, name, 0, high, 0) for name, high in (("seed", MAX_SEED), ("epoch", MAX_EPOCH))
        )
        return _file(library.view(start(split) + number, options, seed, epoch), "image/png")

    @get("/kept/<int:rejection>")
    def kept(rejection: int) -> Response:
        index = library.rejected()
        picture = kept_picture(next(index.read([rejection]))) if rejection < len(index.reasons) else b""
        return _file(picture, "image/jpeg") if picture else abort(404)

    @get("/<name>")
    def asset(name: str) -> Response:
        if name not in _ASSETS:
            abort(404)
        return _file(render(name).encode(), _ASSETS[name])


def _file(data: bytes, kind: str) -> Response:
    return Response(data, mimetype=kind, headers={"Cache-Control": "private, max-age=300"})


def serve(records: Path, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve a records folder until it is interrupted.

    Args:
        records: The folder.
        host: The address to listen on; any but loopback shows the images to others.
        port: The port to listen on; 0 takes any free one.
        announce: Called with the URL once the server answers.

    Raises:
        RecordsError: The folder cannot be read, or the address cannot be taken.
        IntegrityError: The manifest is damaged.
    """
    app = create_app(records, host)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each picture
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
