"""What every test may use, and the rule that CI tests with the real files where it has them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

# A slow machine is no failure, and a failure can be had again from what it prints.
hypothesis.settings.register_profile("suite", deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")

_skipped: list[str] = []


@pytest.fixture
def shared() -> Path:
    """The folder of real files beside the repository; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} does not exist")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the fixture ``shared`` with its name."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember the tests of real files that were skipped, unless they need the torch that isn't there."""
    if not report.skipped or hasattr(report, "wasxfail") or "shared" not in report.keywords:
        return
    without_torch = importlib.util.find_spec("torch") is None and "'torch'" in str(report.longrepr)
    if not without_torch:
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI, a skipped test of real files is a failure where the files exist."""
    if _must_not_skip() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests made the run fail by being skipped."""
    if _must_not_skip():
        terminalreporter.section("tests of real files were skipped", red=True)
        terminalreporter.line(f"FAILED: {SHARED} exists, CI is set, and these tests did not read it:")
        for name in _skipped:
            terminalreporter.line(f"  {name}")


def _must_not_skip() -> bool:
    return bool(_skipped) and SHARED.is_dir() and os.environ.get("CI") == "true"
