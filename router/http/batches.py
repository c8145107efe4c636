"""/v1/batches, in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from tandem.common.errors import TandemError
from tandem.router.batch.exchange import BATCH_ENDPOINTS
from tandem.router.batch.records import COMPLETION_WINDOW, BatchRecord, new_id
from tandem.router.fields.sampling import invalid, shown
from tandem.router.fields.strict import Fields
from tandem.router.http.files import kept_for, lane_of
from tandem.router.service import Service
from tandem.router.web.errors import renaming
from tandem.router.web.exchange import Exchange
from tandem.router.web.paging import page, page_size
from tandem.router.web.request_fields import BodyReader

MAX_PAGE = 100
DEFAULT_PAGE = 20
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

_PREFIX = "/v1/batches/"
_CANCEL = "/cancel"


class _ExpiresAfter(Fields):
    anchor: str
    seconds: int


class BatchBody(Fields):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: _ExpiresAfter | None = None


_READER = BodyReader(BatchBody)


def by_id(path: str) -> dict[str, Callable[[Exchange, Service], Awaitable[None]]]:
    """Handlers of everything below /v1/batches/."""
    return {"POST": cancel} if path.endswith(_CANCEL) else {"GET": get}


async def create(exchange: Exchange, service: Service) -> None:
    """POST /v1/batches: a new batch of an uploaded file."""
    lane = lane_of(service)
    body = await exchange.decode(_READER)
    _check(body)
    expiry = body.output_expires_after
    kept_s = kept_for(expiry and expiry.seconds, expiry and expiry.anchor, "output_expires_after")
    now = time.time()
    record = BatchRecord(
        id=new_id("batch"),
        tenant=exchange.caller.tenant,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        created_at=int(now),
        output_name=new_id("file"),
        error_name=new_id("file"),
        output_expires_after_s=kept_s,
        metadata=body.metadata or {},
    )
    with renaming([("file_id", "input_file_id")]):
        await lane.storage.call(lambda index: index.add_batch(record, now))
    lane.wake()
    await exchange.reply_json(record.shape())


async def list_batches(exchange: Exchange, service: Service) -> None:
    """GET /v1/batches: a page of the tenant's batches, the newest first."""
    lane, query = lane_of(service), exchange.query()
    limit = page_size(query, DEFAULT_PAGE, MAX_PAGE)
    after, tenant = query.get("after", ""), exchange.caller.tenant
    records, more = await lane.storage.call(lambda index: index.batches(tenant, after=after, limit=limit))
    await exchange.reply_json(page([record.shape() for record in records], more))


async def get(exchange: Exchange, service: Service) -> None:
    batch_id, tenant = exchange.path.removeprefix(_PREFIX), exchange.caller.tenant
    record = await lane_of(service).storage.call(lambda index: index.batch(tenant, batch_id))
    await exchange.reply_json(record.shape())


async def cancel(exchange: Exchange, service: Service) -> None:
    """POST /v1/batches/{id}/cancel: ends a batch early; what has a result keeps it."""
    lane = lane_of(service)
    batch_id, tenant = exchange.path.removeprefix(_PREFIX).removesuffix(_CANCEL), exchange.caller.tenant
    record = await lane.storage.call(lambda index: index.cancel(tenant, batch_id, time.time()))
    if not record.unfinished:
        raise TandemError("invalid_request", f"The batch has ended: it is {record.status}.", param="batch_id")
    lane.wake()
    await exchange.reply_json(record.shape())


def _check(body: BatchBody) -> None:
    if body.endpoint not in BATCH_ENDPOINTS:
        raise invalid("endpoint", f"must be one of {', '.join(BATCH_ENDPOINTS)}, got {shown(body.endpoint)}")
    if body.completion_window != COMPLETION_WINDOW:
        raise invalid("completion_window", f"must be {COMPLETION_WINDOW}, got {shown(body.completion_window)}")
    metadata = body.metadata or {}
    if len(metadata) > MAX_METADATA:
        raise invalid("metadata", f"may have at most {MAX_METADATA} entries")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise invalid(
                "metadata", f"may have keys of {MAX_METADATA_KEY} and values of {MAX_METADATA_VALUE} characters at most"
            )
