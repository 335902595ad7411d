"""Open the page in a browser: generate, learn, compare, edit and export. It answers to this machine alone.

python scripts/page.py
python scripts/page.py --config sd --ckpt models/sd/sd-v1-4.ckpt
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.flags import log_to_terminal, path, positive, say, script_parser
from ldm.cli.models import add_model_flags, load_model, read_setup
from ldm.files.writing import check_writable

HOST, PORT = "127.0.0.1", 8080
MOST_PORTS = 100  # that are tried


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Serve the page until Ctrl-C; ends with exit code 2 and one sentence where that cannot be."""
    parser = script_parser(__doc__, prog)
    add_model_flags(parser.add_argument_group("model"))
    place = parser.add_argument_group("page and files")
    place.add_argument("--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    place.add_argument("--port", type=positive, default=PORT, metavar="N", help=f"({PORT}, or the next that is free)")
    place.add_argument("--no_browser", action="store_true", help="do not open a browser")
    options = parser.parse_strictly(argv)
    log_to_terminal()
    with parser.sentences():
        if importlib.util.find_spec("nicegui") is None:
            raise ValueError('The page needs NiceGUI: pip install "nicegui>=3.10,<4".')
        setup, config = read_setup(options)
        check_writable(options.outdir, "--outdir")
        port = free_port(options.port)
        from ldm.page.app import serve
        from ldm.page.engine import Engine

        if options.device:
            os.environ["PROSPECT_DEVICE"] = options.device  # for learning, which is a process of its own
        model = load_model(options, setup, config)
        say(f"The page is at http://{HOST}:{port}; Ctrl-C ends it.")
        trust = ["--allow_targets", *options.allow_targets] if options.allow_targets else []
        trust += ["--allow_resolvers"] if options.allow_resolvers else []
        serve(Engine(model, setup, options.outdir, trust), port, not options.no_browser)


def free_port(first: int) -> int:
    """Return the first port from `first` on that nothing listens on.

    Raises:
        ValueError: none of a hundred is free, or there is no such port.
    """
    for port in range(first, min(first + MOST_PORTS, 1 << 16)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ValueError(f"No port from {first} on is free; choose another with --port.")
