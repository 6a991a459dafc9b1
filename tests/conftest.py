"""Makes tests/ importable, whichever test is collected first; and counts the skipped tests.

One that is skipped without being in expected_skips.txt makes the run fail, so that none is lost unnoticed.
"""

import signal
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# scripts/ci/mutation.py: a few examples, always the same
settings.register_profile("mutation", max_examples=20, deadline=None, derandomize=True, database=None)

EXPECTED = Path(__file__).with_name("expected_skips.txt")


class Skips:
    """What a run skips: node id -> reason. Deselected tests, and those expected to fail, are not skipped."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.found[report.nodeid] = str(report.longrepr[2])

    pytest_collectreport = pytest_runtest_logreport

    def unexpected(self):
        """Those that are not on the list, or not for the reason given there."""
        lines = (line.strip() for line in EXPECTED.read_text(encoding="utf-8").splitlines())
        known = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]

        def is_known(name, why):
            return any(
                reason in why and (name == n or (n.endswith("::*") and name.startswith(n[:-1]))) for n, reason in known
            )

        return {name: why for name, why in self.found.items() if not is_known(name, why)}

    def pytest_sessionfinish(self, session):
        if self.unexpected() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        strange = self.unexpected()
        n = len(self.found)
        terminalreporter.write_line(f"skipped: {n}, of these expected: {n - len(strange)}")
        expected = Counter((name.split("::")[0], why) for name, why in self.found.items() if name not in strange)
        for (path, why), count in expected.items():
            terminalreporter.write_line(f"    {count} of {path}: {why}")
        for name, why in strange.items():
            terminalreporter.write_line(f"UNEXPECTED SKIP of {name}: {why}", red=True)


def pytest_configure(config):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a run in the background may be told to ignore them
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    config.pluginmanager.register(Skips())
