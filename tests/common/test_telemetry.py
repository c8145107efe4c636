"""Logs keep to one event per line; traces cost nothing and are carried on when nobody collects them."""

from __future__ import annotations

import logging
import sys

import pytest
from opentelemetry import trace

from tandem.common.errors import ConfigError
from tandem.common.telemetry import (
    context_from_traceparent,
    set_up_logging,
    set_up_tracing,
    traceparent_of,
    tracer,
)

HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def _root_logger() -> object:
    """Gives the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("tandem").setLevel(logging.NOTSET)


def test_a_log_line_names_time_level_worker_and_logger(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging("decode-7", "debug")
    logging.getLogger("tandem.test").debug("two\nlines")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("DEBUG decode-7 tandem.test: two")
    assert first[:4].isdigit()
    assert first.split()[0].endswith("Z")
    assert second == "    lines"


def test_an_unknown_level_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--log-level loud"):
        set_up_logging("x", "loud")


def test_without_an_endpoint_the_exporter_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    set_up_tracing("decode", "decode-0")
    assert "opentelemetry.sdk.trace" not in sys.modules
    assert not tracer().start_span("x").is_recording()


def test_a_traceparent_is_passed_through() -> None:
    context = context_from_traceparent(HEADER)
    assert context is not None
    assert traceparent_of(trace.get_current_span(context)) == HEADER
    span = tracer().start_span("child", context=context)
    assert traceparent_of(span).split("-")[1] == HEADER.split("-")[1]


@pytest.mark.parametrize("header", [None, "", "garbage", "00-zz-b7ad6b7169203331-01"])
def test_a_bad_traceparent_is_as_good_as_none(header: str | None) -> None:
    context = context_from_traceparent(header)
    assert context is None or not trace.get_current_span(context).get_span_context().is_valid
