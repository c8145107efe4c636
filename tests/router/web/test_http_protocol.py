"""What comes before a request is one: sizes, slow senders and odd framing, on raw connections."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from pathlib import Path

import pytest

from tandem.router.app import Router
from tandem.router.web import protocol as http_protocol
from tests.router.conftest import House, until
from tests.router.fake_worker import Script

BODY = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def router(house: House) -> Router:
    return await house.router(await house.decode(script=Script()))


async def exchanged(
    router: Router, *parts: bytes, until: bytes = b"", pause_s: float = 0.01, patience_s: float = 30.0
) -> bytes:
    """What comes back up to `until`, or to the end of the connection, or to a silence of `patience_s`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
    except ConnectionError:
        pass
    answer = b""
    while not until or until not in answer:
        try:
            part = await asyncio.wait_for(reader.read(65536), patience_s)
        except (ConnectionError, TimeoutError):
            break
        if not part:
            break
        answer += part
    writer.close()
    return answer


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 2_000_000,
        b"GET /healthz?" + b"a" * 400_000,
        b"GET /healthz HTTP/1.1\r\n" + b"".join(b"h%d: y\r\n" % index for index in range(50_000)),
    ],
)
async def test_headers_are_bounded(router: Router, head: bytes) -> None:
    answer = await exchanged(router, *(head[start : start + 16384] for start in range(0, len(head), 16384)))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")  # a reset may overtake the answer


async def test_the_refusal_of_large_headers_names_the_bound(router: Router) -> None:
    answer = await exchanged(router, b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 65_536)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].endswith("larger than 65536 bytes")


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_who_is_answered_before_his_body_ends_gets_the_whole_answer(router: Router, version: bytes) -> None:
    """A reset would take it away: urllib and others close after each request, and read only when all is sent."""
    size = 30 << 20
    head = b"POST /v1/completions HTTP/%b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (version, size)
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(head)
        for _ in range(size // 65536):
            writer.write(b"a" * 65536)
            await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 413 "), answer[:200]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].endswith("bytes")


async def test_what_comes_after_an_answer_is_read_slowly(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    received = [0]
    receive = http_protocol.BoundedHttp.data_received

    def counting(connection: http_protocol.BoundedHttp, data: bytes) -> None:
        received[0] += len(data)
        receive(connection, data)

    monkeypatch.setattr(http_protocol.BoundedHttp, "data_received", counting)
    monkeypatch.setattr(http_protocol, "DROPPED_BYTES_PER_S", 1.0)
    monkeypatch.setattr(http_protocol, "_dropped", http_protocol._Dropped())
    size = 64 << 20
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 404 ")
    writer.write(b"a" * size)
    await until(lambda: received[0] > 1000)
    assert (await exchanged(router, HEALTH, until=b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    assert received[0] < 1 << 20, "one piece"
    writer.transport.abort()


async def test_who_waits_for_the_end_after_an_early_answer_is_not_kept(router: Router) -> None:
    head = POST + b"Connection: close\r\nContent-Length: 30000000\r\n\r\na"
    answer = await exchanged(router, head, patience_s=5.0)
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("tail", [b"1;" + b"x" * 1_000_000, b"0\r\n" + b"t: y\r\n" * 200_000])
async def test_extensions_and_trailers_of_chunks_are_bounded(router: Router, tail: bytes) -> None:
    request = POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY) + tail
    answer = await exchanged(router, *(request[start : start + 16384] for start in range(0, len(request), 16384)))
    assert answer.count(b"HTTP/1.1") <= 1


async def test_a_body_in_tiny_chunks_is_taken(router: Router) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 40_000}).encode()
    pieces = chunked(*(body[index : index + 1] for index in range(len(body)))) + b"0\r\n\r\n"
    answer = await exchanged(router, POST + b"Transfer-Encoding: chunked\r\n\r\n" + pieces, until=b"usage")
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_a_large_body_in_one_piece_is_no_header(router: Router) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 300_000}).encode()
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = await exchanged(router, request + request + HEALTH, until=b'"ok"')
    assert answer.count(b"HTTP/1.1 200 ") == 3


async def test_who_never_ends_the_headers_is_cut_off(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "RECEIVE_S", 0.2)
    assert (await exchanged(router, b"")).startswith(b"HTTP/1.1 408 ")
    assert (await exchanged(router, b"GET /healthz HTTP/1.1\r\nA: ")).startswith(b"HTTP/1.1 408 ")
    after_an_answer = await exchanged(router, HEALTH, b"GET /hea")
    assert [after_an_answer.count(b"HTTP/1.1 %d " % status) for status in (200, 408)] == [1, 1]


async def test_who_never_ends_the_body_is_cut_off(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "RECEIVE_S", 0.2)
    assert await exchanged(router, POST + b"Content-Length: 100\r\n\r\n{") == b""
    refused = await exchanged(router, POST + b"Content-Length: 99999999999\r\n\r\n{")
    assert refused.startswith(b"HTTP/1.1 413 ")


async def test_a_slow_answer_is_no_slow_request(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "RECEIVE_S", 0.1)
    router = await house.router(await house.decode(script=Script(delay_s=0.5)))
    answer = await exchanged(router, POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, until=b"usage")
    assert answer.startswith(b"HTTP/1.1 200 ")


OFFERS = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",  # as Java's client
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
    b"Connection: upgrade\r\nUpgrade: rubbish/9\r\n",
    b"Connection: keep-alive,  uPgRaDe\r\nUPGRADE:h2c, websocket\r\n",
    b"Upgrade: h2c\r\nConnection: close\r\nConnection: upgrade\r\n",
    b"Upgrade: a\r\nUpgrade: b\r\nConnection: Upgrade\r\n",
    b"Upgrade:\r\nConnection: Upgrade\r\n",
    b"Upgrade: h2c\r\n",
    b"Connection: Upgrade\r\n",
]
HIDDEN = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


def in_pieces(request: bytes, head: int) -> list[list[bytes]]:
    """As it may arrive: whole, cut where the head ends, in the middle of the offer, in the body, byte by byte."""
    cuts = ([], [head], [head // 2], [head // 2, head], [head + 9], range(1, len(request)))
    return [[request[a:b] for a, b in zip((0, *cut), (*cut, len(request)), strict=True)] for cut in cuts]


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("framing", ["length", "chunks", "expect"])
@pytest.mark.parametrize("offer", OFFERS)
async def test_the_body_of_an_offer_to_upgrade_is_a_body(
    house: House, tmp_path: Path, offer: bytes, framing: str, keyed: bool
) -> None:
    """The parser skips it, and would take it for the next request."""
    (tmp_path / "keys").write_text(f"alice:{hashlib.sha256(b'secret').hexdigest()}\n")
    settings = {"api_keys_file": tmp_path / "keys"} if keyed else {}
    router = await house.router(await house.decode(script=Script()), **settings)
    key = b"Authorization: Bearer secret\r\n" if keyed else b""
    for body, status in ((HIDDEN, b"400"), (BODY, b"200"), (HIDDEN, b"401" if keyed else b"400")):
        head = POST + offer + (b"" if status == b"401" else key)
        if framing == "chunks":
            head, content = head + b"Transfer-Encoding: chunked\r\n\r\n", chunked(body) + b"0\r\n\r\n"
        else:
            expects = b"Expect: 100-continue\r\n" if framing == "expect" else b""
            head, content = head + expects + b"Content-Length: %d\r\n\r\n" % len(body), body
        closes = b"Connection: close" in head
        for pieces in in_pieces(head + content, len(head)):
            after = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            answer = await exchanged(router, *pieces, after, pause_s=0.0)
            answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
            statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
            if closes and not statuses and status == b"401":
                continue  # the rest of the body met a closed connection, whose reset overtook the answer
            assert statuses == ([status] if closes else [status, b"200"]), (pieces, answer)
            assert closes or answer.endswith(b'{"status":"ok"}')


async def test_offers_to_upgrade_in_one_piece_with_other_requests(router: Router) -> None:
    offer = POST + OFFERS[2] + b"Content-Length: %d\r\n\r\n"
    mixed = (HEALTH + offer % len(HIDDEN) + HIDDEN + offer % len(BODY) + BODY) * 3 + HEALTH
    for pieces in ([mixed], [mixed[at : at + 100] for at in range(0, len(mixed), 100)]):
        answer = await exchanged(router, *pieces, pause_s=0.0, until=b"nothing", patience_s=1.0)
        assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400", b"200"] * 3 + [b"200"]


async def test_what_follows_connect_is_not_executed(router: Router) -> None:
    connect = b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN)
    for pieces in ((connect, HIDDEN), (connect + HIDDEN,)):
        answer = await exchanged(router, *pieces)
        assert answer.startswith(b"HTTP/1.1 405 ")
        assert answer.count(b"HTTP/1.1 ") == 1


async def half_closed(router: Router, request: bytes) -> bytes:
    """What a client gets that ends its side once it has asked."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(request)
    writer.write_eof()
    async with asyncio.timeout(30):
        answer = await reader.read()
    writer.close()
    return answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_ends_its_side_gets_its_answer(house: House, version: bytes, stream: bool) -> None:
    router = await house.router(await house.decode(script=Script(delay_s=0.15)))
    body = json.dumps({"prompt": "a", "max_tokens": 3, "stream": stream}).encode()
    head = POST.replace(b"1.1", version) + b"Content-Length: %d\r\n\r\n" % len(body)
    answer = await half_closed(router, head + body)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert (b"[DONE]" if stream else b"usage") in answer
    if version == b"1.1":
        assert (await half_closed(router, (head + body) * 3)).count(b"HTTP/1.1 200 ") == 3
        assert (await half_closed(router, head + body + b"GET /hea")).count(b"HTTP/1.1 200 ") == 1
    assert await half_closed(router, head + body[:-1]) == b"", "half a request is none"


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_a_client_that_is_gone_is_told_from_one_that_ended_its_side(
    house: House, monkeypatch: pytest.MonkeyPatch, version: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "OLD_CLIENT_S", 0.2)
    worker = await house.decode(script=Script(hold_after=1))
    router = await house.router(worker)
    _, writer = await asyncio.open_connection("127.0.0.1", router.port)
    body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
    writer.write(POST.replace(b"1.1", version) + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await until(lambda: bool(worker.submits))
    writer.close()
    await until(lambda: bool(worker.cancels))


async def test_rubbish_leaves_one_line_for_many(
    router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_protocol, "_refusals", http_protocol._Refusals())
    with caplog.at_level(logging.INFO):
        for _ in range(50):
            assert (await exchanged(router, b"\x16\x03\x01\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert len([record for record in caplog.records if record.name != "asyncio"]) == 1


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: +5\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"A: b\r\n c\r\n",
    ],
)
async def test_ambiguous_framing_ends_the_connection(router: Router, headers: bytes) -> None:
    """Else what one server takes for a body another one could take for a request."""
    answer = await exchanged(router, POST + headers + b"\r\n0\r\n\r\n" + HEALTH)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("method", [b"GET /healthz", b"POST /v1/completions"])
async def test_headers_of_exactly_the_bound_are_taken_and_no_byte_more(
    router: Router, method: bytes, pieces: int
) -> None:
    tail = b"" if method.startswith(b"GET") else b"Content-Length: %d\r\n" % len(BODY)
    body = b"" if method.startswith(b"GET") else BODY
    for size, status in ((64 * 1024, 200), (64 * 1024 + 1, 431)):
        frame = method + b" HTTP/1.1\r\nHost: x\r\n" + tail + b"filler: \r\nConnection: close\r\n\r\n"
        head = frame.replace(b"filler: ", b"filler: " + b"a" * (size - len(frame)))
        assert len(head) == size
        request = head + body
        step = -(-len(request) // pieces)
        answer = await exchanged(router, *(request[start : start + step] for start in range(0, len(request), step)))
        assert answer.startswith(b"HTTP/1.1 %d " % status), (size, answer[:200])


async def test_large_headers_behind_another_request_are_refused_as_well(router: Router) -> None:
    answer = await exchanged(router, HEALTH + b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") <= 1


async def test_what_is_not_http_gets_an_error_in_json(router: Router) -> None:
    for rubbish in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"GET /\x01 HTTP/1.1\r\n\r\n"):
        answer = await exchanged(router, rubbish + b"\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("keep_alive", [b"", b"Connection: keep-alive\r\n"])
async def test_a_stream_to_http_1_0_ends_with_the_connection(router: Router, keep_alive: bytes) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 4, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\n" + keep_alive + b"Content-Length: %d\r\n\r\n" % len(body)
    headers, _, events = (await exchanged(router, head + body)).partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in headers.lower()
    assert b"connection: close" in headers.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


async def test_other_answers_to_http_1_0_have_a_length(router: Router) -> None:
    for method, has_body in ((b"GET", True), (b"HEAD", False)):
        headers, _, body = (await exchanged(router, method + b" /healthz HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")
        assert b"content-length: 15" in headers.lower()
        assert (body == b'{"status":"ok"}') == has_body
    answer = await exchanged(router, b"OPTIONS /healthz HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 204 ")
    assert answer.endswith(b"\r\n\r\n")


async def test_what_a_path_takes_is_told_without_a_key(router: Router) -> None:
    for path, allow in ((b"/v1/models", b"GET, HEAD, OPTIONS"), (b"/v1/contexts/a", b"GET, HEAD, DELETE, OPTIONS")):
        answer = await exchanged(router, b"OPTIONS " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"\r\nallow: " + allow + b"\r\n" in answer
    answer = await exchanged(router, b"PUT /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nallow: GET, HEAD, OPTIONS\r\n" in answer
