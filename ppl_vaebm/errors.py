"""The errors that are the user's to know about, and how an entry point turns them into a sentence."""

from __future__ import annotations

import errno
import functools
import sys
from typing import Protocol

# What a disk says when it is not ours to write to, or full.
DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class InputError(ValueError):
    """Something the user gave is not usable.

    The message is one sentence: what was expected, what was found, what to do.
    """

    exit_status = 2


class TrainingError(RuntimeError):
    """Training stopped because its numbers went bad; what was saved before is kept.

    The message says what happened, what is kept and what to do.
    """

    exit_status = 1


class Main(Protocol):
    """An entry point."""

    def __call__(self, argv: list[str] | None = None) -> None:
        """Run the command on its arguments; ``None`` takes those of the process."""
        ...


def exits_with_one_sentence(main: Main) -> Main:
    """Wrap an entry point: these errors end in their sentence on stderr and their exit status.

    Args:
        main: function of the argument list (``None`` for ``sys.argv[1:]``).

    Returns:
        The same function; every other exception passes through, for that one is our fault.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except KeyboardInterrupt:
            print(
                "interrupted; what was written is kept, and an interrupted fit goes on with --resume", file=sys.stderr
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
