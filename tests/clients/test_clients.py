"""Client libraries that people use, against a plain `tandem serve` of the bundled model. Those that are not installed
here are run by hand (`run.py`); `docs/clients.md` has the table."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tandem.runtime.settings import BUNDLED_MODEL
from tests.clients.run import HERE, MODULES, can_import, rows_of
from tests.e2e.serving import Serve

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with Serve(BUNDLED_MODEL) as serve:
        yield serve


@pytest.mark.parametrize("script", MODULES)
def test_every_feature_of_the_client_works(serve: Serve, script: str) -> None:
    if not can_import(sys.executable, MODULES[script]):
        pytest.skip("the client is not installed")
    rows = rows_of([sys.executable, str(HERE / script), "--url", f"{serve.url}/v1", "--model", serve.model])
    assert {row["feature"]: row["result"] for row in rows if row["result"] != "ok"} == {}
