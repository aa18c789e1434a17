"""Errors that are the user's to know end in one sentence and a status; others pass through."""

from __future__ import annotations

import errno

import pytest

from ppl_vaebm.errors import InputError, TrainingError, exits_with_one_sentence


def command(error: Exception) -> int:
    """Run an entry point that fails with an error, and return its exit status."""

    @exits_with_one_sentence
    def main(argv: list[str] | None = None) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        main([])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("give another"), 2, "error: give another\n"),
        (TrainingError("it diverged"), 1, "error: it diverged\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/a"),
            2,
            "error: expected to read and write runs/a, found: Permission denied; "
            "change its permissions, make room, or name another folder\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: expected to read and write the run's folder, found: No space left on device; "
            "change its permissions, make room, or name another folder\n",
        ),
    ],
)
def test_an_error_of_the_users_is_one_sentence(
    error: Exception, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(error) == status
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize("error", [ValueError("ours"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_an_error_of_ours_passes_through(error: Exception) -> None:
    with pytest.raises(type(error)):
        command(error)


def test_an_interrupt_ends_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    @exits_with_one_sentence
    def main(argv: list[str] | None = None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1
