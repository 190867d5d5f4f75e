"""What the scripts say while they run: one logger, safe on every console code page, and one way to end on a mistake."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from library.errors import NO_ROOM, UnsavedError, UserError

LOGGER = logging.getLogger("library")
CHATTY = "bitsandbytes.backends.cpu.ops"
"""A logger that warns, at an import which many packages make, of a kernel that nothing here uses."""


@dataclass
class ConsoleOptions:
    """Console"""

    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = None
    """Least severe messages that are shown; unset means INFO."""
    console_log_file: str | None = None
    """Write messages to this file instead of the console."""
    console_log_simple: bool = False
    """Plain messages without time and level."""


def say(message: str) -> None:
    """Tell the user something about the run."""
    LOGGER.info(message)


def warn(message: str) -> None:
    """Tell the user about something that is probably not meant."""
    LOGGER.warning(message)


_waiting: list[str] = []


def say_when_set_up(message: str) -> None:
    """As ``say``, for what is known before the options that set up the console are read."""
    _waiting.append(message)


COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys instead of showing them, but line ends and tabs; and those that turn the direction
of the text behind them, so that it reads as something else."""


def printable(text: str) -> str:
    """``text`` for a console or a log: what names, captions and metadata could command is shown as ``\\x1b``."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def show(text: str) -> None:
    """Print what a tool was called for, at once."""
    print(printable(text), flush=True)


class _Formatter(logging.Formatter):
    """Messages without commands for the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Console(logging.StreamHandler):
    """A console that may be closed or full: what cannot be shown is lost, and nothing else happens."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Instead of a traceback."""


class _LogFile(logging.FileHandler):
    """A log file; when it cannot be written any more (a full disk), the messages go to the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say so once, and repeat the message on the console."""
        error = sys.exc_info()[1]
        make_console_safe()
        console = _Console(sys.stderr)
        console.setFormatter(self.formatter)
        LOGGER.handlers[:] = [console if handler is self else handler for handler in LOGGER.handlers]
        reason = getattr(error, "strerror", None) or error
        warn(f"--console_log_file: {self.baseFilename} cannot be written ({reason}); messages go to the console.")
        console.handle(record)


def set_up_console(options: ConsoleOptions, main_process: bool = True) -> None:
    """Send the suite's messages to stderr or to ``--console_log_file``; other processes only report warnings.

    Raises UserError when the log file cannot be written.
    """
    main_process = main_process and os.environ.get("RANK", "0") == "0"  # a launcher's name for it
    if options.console_log_file:
        try:
            if main_process:
                open(options.console_log_file, "w").close()  # others append, so that no process cuts off another
            handler: logging.Handler = _LogFile(
                options.console_log_file, mode="a", encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            raise UserError(
                f"--console_log_file: cannot write {options.console_log_file} ({error.strerror})."
            ) from None
    else:
        make_console_safe()
        handler = _Console(sys.stderr)
    plain = "%(message)s" if options.console_log_simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(_Formatter(plain, datefmt="%H:%M:%S"))
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    logging.getLogger(CHATTY).setLevel(logging.ERROR)
    level = getattr(logging, options.console_log_level or "INFO")
    LOGGER.setLevel(level if main_process else max(level, logging.WARNING))
    while _waiting:
        say(_waiting.pop(0))


def make_console_safe() -> None:
    """Let no character of a path or caption end the run on a console that cannot show it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """While it is active, the suite says nothing but errors."""
    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def messages_above_progress() -> AbstractContextManager[None]:
    """While a progress bar stands on the console, messages go above it; those for a file stay there."""
    if any(isinstance(handler, logging.FileHandler) for handler in LOGGER.handlers):
        return contextlib.nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm(loggers=[LOGGER])


INTERRUPTED = 130
"""Exit code of a script that Ctrl-C has ended, as shells have it."""


class CtrlC:
    """What Ctrl-C does in a script: the first is a KeyboardInterrupt, one more ends the process at once.

    At once means without waiting for threads, for a disk or for what holds up the clearing away after the first one.
    """

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT."""
        if self.pressed:
            with contextlib.suppress(OSError):
                os.write(2, b"\ninterrupted at once\n")  # not through a stream that may be writing at this moment
            os._exit(INTERRUPTED)
        self.pressed = True
        raise KeyboardInterrupt


_ctrl_c = CtrlC()


def forget_interrupt() -> None:
    """A Ctrl-C has been obeyed and the script goes on: the next one is a first one."""
    _ctrl_c.pressed = False


def raise_swallowed_interrupt() -> None:
    """Raise KeyboardInterrupt again where Python could not raise it at the key's press.

    That is so in finalizers and in callbacks of C code: what they raise is printed and forgotten.
    """
    if _ctrl_c.pressed:
        raise KeyboardInterrupt


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a UserError becomes its sentence on stderr and its exit code, most often 2.

    So does a full disk, with the exit code 1; Ctrl-C becomes a word and 130. When what it prints goes to a program that
    has read enough, such as ``head``, it ends without a word.
    """
    make_console_safe()
    forget_interrupt()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background may ignore it
        signal.signal(signal.SIGINT, _ctrl_c)
    # What is imported stays; with Python's default, looking through it again and again is a tenth of a start.
    gc.set_threshold(50_000)
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _print_to_nobody()
        sys.exit(1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(printable(f"error: {error.filename or 'a file'} cannot be written ({error.strerror})."), file=sys.stderr)
        sys.exit(UnsavedError.exit_code)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _print_to_nobody()


def _print_to_nobody() -> None:
    """Let stdout lead nowhere, so that Python does not complain when it writes the rest at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def size_text(count: float) -> str:
    """Bytes in the largest binary unit of which there is one: ``22.2 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
