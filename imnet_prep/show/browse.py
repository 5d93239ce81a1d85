"""Serve local pages of a records folder: classes, images, records and their augmented views.

The server answers only GET, changes nothing, and listens on loopback by default. Records are requested by number, so no
path comes from outside. The Host header must name this server: otherwise a page elsewhere could read the images through
a name of its own that points here (DNS rebinding).
"""

import ipaddress
import logging
import math
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from imnet_prep.errors import ImnetError, PipelineError, RecordsError
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.loader.random_numbers import MAX_EPOCH, MAX_SEED
from imnet_prep.show.browse_data import THUMB_SIDE, VIEW_SIDE, Library
from imnet_prep.show.pages import render

try:
    from flask import Flask, Response, abort, request
    from werkzeug.serving import make_server
except ImportError as missing:
    raise RecordsError("browse: Flask is not installed", remedy="pip install 'imnet-prep[browse]'") from missing

Route = Callable[[str], Callable[[Callable[..., Any]], object]]
PAGE_IMAGES = 60
_ASSETS = {
    "style.css": "text/css",
    "browse.css": "text/css",
    "script.js": "text/javascript",
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
_FIELDS = {  # of the form on a record's page: captions and defaults
    "crop": ("smallest crop", 0.08),
    "flip": ("flip", 0.5),
    "jitter": ("colour jitter", 0.0),
    "ops": ("RandAugment operations", 0.0),
    "erase": ("erasing", 0.0),
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
        if "position" in asked and asked["position"] >= len(library.tables.get(asked["split"], ())):
            abort(404)

    def add_headers(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    page = partial(render, name=records.resolve().name, library=library)
    app.before_request(check_request)
    app.after_request(add_headers)
    app.register_error_handler(ImnetError, lambda error: (page("browse_error.html", error=error), 422))
    _add_pages(app.get, library, page)
    _add_images(app.get, library)
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


def _add_pages(get: Route, library: Library, page: Callable[..., str]) -> None:
    @get("/")
    def index() -> str:
        search = request.args.get("q", "")[:200]
        return page("browse_classes.html", search=search, labels=library.find_classes(search))

    @get("/class/<int(signed=True):label>")
    def class_page(label: int) -> str:
        there = (name for name in library.tables if len(library.of_class(name, label)))
        split = request.args.get("split") or next(there, next(iter(library.tables), ""))
        number = _number("page", 1 << 31)
        if not -1 <= label < len(library.manifest.classes) or split not in library.tables:
            abort(404)
        positions = library.of_class(split, label)
        pages = max(1, -(-len(positions) // PAGE_IMAGES))
        if number >= pages:
            abort(404)
        shown = positions[number * PAGE_IMAGES : (number + 1) * PAGE_IMAGES].tolist()
        images = [(position, library.row(split, position).name) for position in shown]
        return page(
            "browse_class.html",
            label=label,
            split=split,
            page=number,
            pages=pages,
            images=images,
            side=THUMB_SIDE,
        )

    @get("/record/<split>/<int:position>")
    def record_page(split: str, position: int) -> str:
        table = library.tables[split]
        label, values = int(table.label[position]), _train_values()
        _train_options(values)
        siblings = library.of_class(split, label)
        return page(
            "browse_record.html",
            split=split,
            position=position,
            record=library.row(split, position),
            record_id=int(table.ids[position]),
            label=label,
            siblings=siblings,
            here=int(siblings.searchsorted(position)),
            line=library.line(split, position),
            fields=library.fields(split, position),
            form=_FIELDS,
            values=values,
            seed=_number("seed", MAX_SEED),
            side=VIEW_SIDE,
        )

    @get("/<name>")
    def asset(name: str) -> Response:
        if name not in _ASSETS:
            abort(404)
        return _file(render(name).encode(), _ASSETS[name])


def _add_images(get: Route, library: Library) -> None:
    @get("/image/<split>/<int:position>")
    def image(split: str, position: int) -> Response:
        return _file(*library.image(split, position))

    @get("/thumb/<split>/<int:position>")
    def thumb(split: str, position: int) -> Response:
        return _file(library.thumb(split, position), "image/jpeg")

    @get("/view/<split>/<int:position>")
    def view(split: str, position: int) -> Response:
        evaluation = EvalOptions(batch_size=1, image_size=VIEW_SIDE)
        options = evaluation if request.args.get("eval") else _train_options(_train_values())
        seed, epoch = _number("seed", MAX_SEED), _number("epoch", MAX_EPOCH)
        return _file(library.view(split, position, options, seed, epoch), "image/png")


def _file(data: bytes, kind: str) -> Response:
    return Response(data, mimetype=kind, headers={"Cache-Control": "private, max-age=300"})


def _number(name: str, high: int) -> int:
    """Return a number of the query, 0 by default."""
    text = request.args.get(name) or "0"
    if not text.isascii() or not text.isdecimal() or int(text[:24]) > high:
        raise PipelineError(f"{name} is out of range", expected=f"0 to {high}", got=repr(text[:40]))
    return int(text[:24])


def _train_values() -> dict[str, float]:
    """Return the augmentation that the query asks for."""
    values: dict[str, float] = {}
    for name, (caption, default) in _FIELDS.items():
        given = request.args.get(name) or default
        try:
            values[name] = float(given)
            if not math.isfinite(values[name]):
                raise ValueError(given)
        except ValueError as error:
            raise PipelineError(f"{caption} is not a number", got=repr(given)[:40]) from error
    return values


def _train_options(values: dict[str, float]) -> TrainOptions:
    """Turn the values of the form into the loader's options.

    Raises:
        PipelineError: One is out of range.
    """
    jitter = values["jitter"]
    return TrainOptions(
        batch_size=1,
        image_size=VIEW_SIDE,
        scale=(values["crop"], 1.0),
        flip_prob=values["flip"],
        color_jitter=(jitter, jitter, jitter, 0.0),
        randaugment_ops=int(values["ops"]),
        erasing_prob=values["erase"],
    )


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
