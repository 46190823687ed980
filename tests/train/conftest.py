"""What tests of commands share."""

import pytest


@pytest.fixture(autouse=True)
def _no_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs end without a report, which takes seconds, but where reports are tested."""
    if request.module.__name__.rpartition(".")[2] != "test_report":
        monkeypatch.setattr("train.loop.report_of", lambda *_: None)
