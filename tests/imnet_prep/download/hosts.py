"""Many hosts in one process: ``python -m tests.imnet_prep.download.hosts ADDRESS...``, a server on each address.

It prints the port of each address as a JSON object, and after each line of standard input what every server has seen.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack

from tests.imnet_prep.download.servers import Exchange, Server, images

_ANSWER_AFTER_S = 0.03  # so that connections overlap


def _route(exchange: Exchange) -> None:
    time.sleep(_ANSWER_AFTER_S)
    if "gone" in exchange.path:
        exchange.answer(404)
    else:
        images(exchange)


def main() -> None:
    """Serve until standard input ends."""
    with ExitStack() as stack:
        servers = {address: stack.enter_context(Server(_route, address=address)) for address in sys.argv[1:]}
        print(json.dumps({address: server.port for address, server in servers.items()}), flush=True)
        for _ in sys.stdin:
            seen = {
                address: {"open_most": one.open_most, "peers": one.peers, "hits": one.hits}
                for address, one in servers.items()
            }
            print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
