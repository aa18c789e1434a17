"""Errors that the user can act on, and how a command turns them into one sentence."""

from __future__ import annotations

import difflib
import errno
import functools
import sys
from collections.abc import Iterable
from typing import Protocol

# The disk is full, or the place is not the user's to write to.
DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
MAX_SHOWN = 200  # characters of a value in a message


class InputError(ValueError):
    """The user's input is not usable. The message is one sentence: what was expected, what was found, what to do."""

    exit_status = 2


class TrainingError(RuntimeError):
    """Training diverged and stopped; checkpoints are kept. The message says what happened and what to do."""

    exit_status = 1


def shown(value: object) -> str:
    """Write a value for a message, cut at 200 characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests the known word most like a misspelled one, or nothing."""
    similar = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


class Main(Protocol):
    """A command."""

    def __call__(self, argv: list[str] | None = None) -> None:
        """Run the command; ``None`` stands for the arguments of the process."""
        ...


def exits_with_one_sentence(main: Main) -> Main:
    """Wrap a command so that these errors print their sentence on stderr and exit with their status.

    Every other exception passes through with its traceback, because it is a fault of the package.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except KeyboardInterrupt:
            print(
                "interrupted; files already written are kept; a fit with a checkpoint continues with --resume",
                file=sys.stderr,
            )
            raise SystemExit(INTERRUPTED) from None
        except (InputError, TrainingError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_status) from None
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            place = error.filename or "the run's folder"
            print(
                f"error: expected to read and write {place}, found: {error.strerror}; "
                "change its permissions, make room, or name another folder",
                file=sys.stderr,
            )
            raise SystemExit(InputError.exit_status) from None

    return wrapped
