"""A page in your browser for everything that the scripts do: fill in options, look at data, start, watch, stop, resume.

    python tools/studio.py
    python tools/studio.py --port 7860 --root /data/images --root /data/models

It prints an address with a token: open it in a browser on this machine. The page writes files of options and starts the
scripts with them; runs go on when it is closed, and it finds them again. It listens on 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.console import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402

PORT = 7860


def keep(folder: Path) -> int:
    """Stand beside a run until its end."""
    from library.studio.runs import keep

    signal.signal(signal.SIGINT, lambda number, frame: None)  # Ctrl-C is for what it runs
    return keep(folder)


def serve(folder: Path, roots: list[Path], port: int | None, launch_arguments: list[str]) -> None:
    """Serve the page until Ctrl-C. Raises UserError when the port is taken."""
    try:
        from waitress.server import create_server

        from library.studio.access import Access
        from library.studio.app import LARGEST_BODY, create_app
        from library.studio.folders import Roots
        from library.studio.workspace import Workspace
    except ImportError as error:
        raise UserError(f"{error}: install what the studio needs with pip install -r requirements.txt.") from None

    access = Access()
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder, Roots([*(roots or [Path.home()]), Path.cwd(), folder]), launch_arguments)
    app = create_app(workspace, access)
    server = None
    for wanted in [port] if port is not None else [PORT, 0]:
        try:
            server = create_server(
                app, host="127.0.0.1", port=wanted, threads=6, ident=None, max_request_body_size=LARGEST_BODY + 4096
            )
            break
        except OSError as error:
            problem = error.strerror
    if server is None:
        raise UserError(f"--port: {port} cannot be had ({problem}); choose another one, or none.")
    access.port = int(server.effective_port)
    print(
        f"Open this address in a browser on this machine:\n\n    {access.address}\n\nCtrl-C ends the page; runs go on.",
        flush=True,
    )
    server.run()


def main() -> None:
    """Serve the page; with ``--keep``, stand beside one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("studio"), help="folder of jobs and runs (%(default)s)")
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        help="folder below which the page may look for images and models; several may be named (your home folder)",
    )
    parser.add_argument("--port", type=int, help=f"port on 127.0.0.1 ({PORT}, or any free one if that is taken)")
    parser.add_argument("--launch_args", default="", help="options of accelerate launch for trainings, as one text")
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.keep is not None:
        sys.exit(keep(given.keep))
    if os.name != "nt" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # runs must hear it
    serve(given.folder, given.root, given.port, shlex.split(given.launch_args))


if __name__ == "__main__":
    run_script(main)
