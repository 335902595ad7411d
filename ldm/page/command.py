"""`scripts/page.py`. Flags and paths are checked before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.flags import add_flag, log_to_terminal, path, positive, script_parser
from ldm.cli.sample import add_model_flags, model_setup
from ldm.files.writing import check_writable

PORT = 8080


def run(docstring: str | None, argv: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C; ends with exit code 2 and one sentence where that cannot be.

    Args:
        docstring: the script's; its first line, then examples.
        argv: the flags, by default the program's own.
    """
    parser = script_parser(docstring)
    add_model_flags(parser.add_argument_group("model"))
    place = parser.add_argument_group("page and files")
    add_flag(place, "--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    add_flag(place, "--port", type=positive, default=PORT, metavar="N", help=f"({PORT}, or the next that is free)")
    add_flag(place, "--no_browser", action="store_true", help="do not open a browser")
    options = parser.parse_strictly(argv)
    log_to_terminal()
    with parser.sentences():
        if importlib.util.find_spec("nicegui") is None:
            raise ValueError("The page needs NiceGUI: pip install 'nicegui>=3.10,<4'.")
        setup = model_setup(options, {})
        if not Path(setup["ckpt"]).exists():
            raise ValueError(f"There is no file '{setup['ckpt']}'; check the path given with --ckpt.")
        check_writable(options.outdir, "--outdir")
        from ldm.config import allow_targets, load_config
        from ldm.generate import load_model_from_config
        from ldm.page.app import serve
        from ldm.page.engine import Engine

        allow_targets(*options.allow_targets)
        config = load_config(setup["config"], flag="--config", resolvers=options.allow_resolvers)
        model = load_model_from_config(config, setup["ckpt"], device=options.device, dtype=setup["dtype"])
        serve(Engine(model, setup, options.outdir), free_port(options.port), not options.no_browser)


def free_port(first: int) -> int:
    """Return the first port from `first` on that nothing listens on."""
    import socket

    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ValueError(f"Ports {first} to {first + 99} are all in use; choose another with --port.")
