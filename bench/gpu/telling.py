"""Tells of a test that fails when it fails, and not at the end: a pytest plugin.

A run of tests that is stopped has then said all that it knew.
"""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print why, at once; with several processes this is called in the first of them."""
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", flush=True)
