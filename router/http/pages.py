"""Pages for people, `/` and `/docs`, and the document that `/docs` shows. Open to all: they hold no secret.

A page may run its own script and style only (their digests are in its policy) and talk to this server only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import shlex
from functools import cache, lru_cache
from importlib import resources
from string import Template

import msgspec

import tandem
from tandem.router.http import openapi
from tandem.router.service import Service
from tandem.router.web.exchange import Exchange, Headers

_HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9.\-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?")
_QUESTION = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 60}
_BEGINNING = {"prompt": "The river", "max_tokens": 60}


async def home(exchange: Exchange, service: Service) -> None:
    """What this is, and a command line that works with it."""
    base = _base(exchange, service)
    values = {
        "model": service.model.name,
        "version": tandem.__version__,
        "base": base,
        "curl": curl(base, service),
        "key_hint": "Put your API key into TANDEM_API_KEY." if service.needs_key else "No API key is needed.",
    }
    page = Template(_page("home.html")).substitute({name: html.escape(value) for name, value in values.items()})
    await exchange.reply(page.encode(), content_type=_HTML, headers=_protected(_page("home.html"), vary=True))


async def docs(exchange: Exchange, service: Service) -> None:
    page = _page("docs.html")
    await exchange.reply(page.encode(), content_type=_HTML, headers=_protected(page))


async def openapi_json(exchange: Exchange, service: Service) -> None:
    await exchange.reply(_document(service.needs_key), headers=[(b"x-content-type-options", b"nosniff")])


def curl(base: str, service: Service) -> str:
    """A request to the model, for a shell."""
    path, body = ("chat/completions", _QUESTION) if service.model.template is not None else ("completions", _BEGINNING)
    data = msgspec.json.encode({"model": service.model.name, **body}).decode()
    key = ' \\\n  -H "Authorization: Bearer $TANDEM_API_KEY"' if service.needs_key else ""
    return f"curl {base}/v1/{path} -H 'Content-Type: application/json'{key} \\\n  -d {shlex.quote(data)}"


_HTML = b"text/html; charset=utf-8"


def _base(exchange: Exchange, service: Service) -> str:
    """Where the client found this server. What it says of itself is shown only where it can be nothing else."""
    host = exchange.header(b"host")
    if not _HOST.fullmatch(host):
        configured = service.config.host
        host = f"{f'[{configured}]' if ':' in configured else configured}:{service.config.port}"
    scheme = "https" if exchange.header(b"x-forwarded-proto") == "https" else "http"
    return f"{scheme}://{host}"


def _protected(page: str, *, vary: bool = False) -> Headers:
    headers = [
        (b"content-security-policy", _policy(page)),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]
    return [*headers, (b"vary", b"Host, X-Forwarded-Proto")] if vary else headers


@lru_cache(maxsize=8)
def _policy(page: str) -> bytes:
    allowed = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    allowed.append("frame-ancestors 'none'")
    for tag in ("script", "style"):
        digests = [
            hashlib.sha256(inside.encode()).digest() for inside in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        ]
        sources = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
        allowed.append(f"{tag}-src {sources}")
    return "; ".join(allowed).encode()


@cache
def _page(name: str) -> str:
    return resources.files("tandem.router.http").joinpath("html", name).read_text(encoding="utf-8")


@cache
def _document(needs_key: bool) -> bytes:
    return msgspec.json.encode(openapi.document(needs_key=needs_key))
