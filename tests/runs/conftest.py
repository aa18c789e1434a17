"""What the tests of runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ppl_vaebm.reports import report
from tests.tiny import write_empty_report


@pytest.fixture(scope="module")
def quick_reports() -> Iterator[None]:
    """Write empty reports: rendering takes most of a tiny run's time, and tests/reports tests it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", write_empty_report)
        yield
