"""Who may come in: keys, tokens, the tenants' file and its errors, and reading it again."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from tandem.common.errors import ConfigError, TandemError
from tandem.router.settings import RouterConfig
from tandem.router.tenants import tenants as module
from tandem.router.tenants.caller import ANYBODY, Caller, Rates
from tandem.router.tenants.tenant_file import read_tenants
from tandem.router.tenants.tenants import Tenants
from tests.router.conftest import until

SECRET = "s" * 64


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write(folder: Path, text: str, name: str = "tenants.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def opened(path: Path, registry: CollectorRegistry | None = None) -> Tenants:
    tenants = Tenants.open(path, None, registry)
    assert tenants is not None
    return tenants


def refused(tenants: Tenants, authorization: str) -> str:
    with pytest.raises(TandemError) as caught:
        tenants.authenticate(authorization)
    return caught.value.code


FULL = f"""
issuers:
  - issuer: https://login.example
    audience: tandem
    algorithm: HS256
    secret_file: secret
    tenant_claim: org
tenants:
  - name: acme
    keys: [{digest("sk-acme")}, "sha256:{digest("sk-acme-2").upper()}"]
    claims: [acme-prod, acme-test]
    weight: 2.5
    priority_min: -5
    priority_max: 10
    requests_per_minute: 600
    tokens_per_minute: 1_000_000
    max_concurrent: 20
    models: [tiny, other]
    sharing_group: partners
    admin: true
  - name: light
    keys:
      - {digest("sk-light")}
"""


HOUR_S = 3600
FAR_FUTURE = 4_102_444_800
"""The year 2100, in seconds."""


@pytest.fixture
def full(tmp_path: Path) -> Path:
    write(tmp_path, SECRET, "secret")
    return write(tmp_path, FULL)


def token(key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **claims: Any) -> str:
    payload = {
        "iss": "https://login.example",
        "aud": "tandem",
        "exp": time.time() + HOUR_S,
        "org": "acme-prod",
        **claims,
    }
    payload = {name: value for name, value in payload.items() if value is not None}
    return "Bearer " + jwt.encode(payload, key, algorithm, headers)


def test_a_tenant_with_everything(full: Path) -> None:
    tenants = opened(full)
    acme = Caller(
        "acme",
        sharing_group="partners",
        weight=2.5,
        priority_min=-5,
        priority_max=10,
        rates=Rates(600, 1_000_000, 20),
        models=frozenset({"tiny", "other"}),
        admin=True,
    )
    assert tenants.authenticate("Bearer sk-acme") == acme
    assert tenants.authenticate("bearer  sk-acme-2 ") == acme
    light = tenants.authenticate("Bearer sk-light")
    assert (light.weight, light.priority_min, light.admin, light.rates.unlimited) == (1.0, 0, False, True)
    assert tenants.sees_all(acme)
    assert not tenants.sees_all(light)
    assert tenants.find("acme") == acme
    assert tenants.find("nobody") is None
    assert len(tenants.roster.callers) == 2


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer sk-acm", "Basic sk-acme", "sk-acme", "Bearer é"])
def test_wrong_keys(full: Path, given: str) -> None:
    assert refused(opened(full), given) == "invalid_api_key"


def test_right_and_wrong_keys_are_compared_alike(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    tenants = opened(full)
    monkeypatch.setattr(module.hmac, "compare_digest", spy)
    tenants.authenticate("Bearer sk-acme")
    refused(tenants, "Bearer nonsense")
    assert compared == [(32, 32)] * 2


def test_a_digest_is_no_key(full: Path) -> None:
    """Whoever has read the file cannot come in with what it says."""
    tenants = opened(full)
    assert refused(tenants, f"Bearer {digest('sk-acme')}") == "invalid_api_key"


def test_priorities_of_a_tenant() -> None:
    caller = Caller("ann", priority_min=2, priority_max=9)
    assert [caller.priority(asked) for asked in (None, 0, 2, 9)] == [2, 2, 2, 9]
    assert Caller("bob", priority_max=-1).priority(None) == -1
    assert ANYBODY.priority(-3) == -3
    for asked in (1, 10, -1):
        with pytest.raises(TandemError, match="between 2 and 9") as caught:
            caller.priority(asked)
        assert (caught.value.code, caught.value.param) == ("permission_denied", "priority")


def test_models_of_a_tenant() -> None:
    Caller("ann").check_model("anything")
    caller = Caller("ann", models=frozenset({"tiny"}))
    caller.check_model("tiny")
    with pytest.raises(TandemError) as caught:
        caller.check_model("big")
    assert (caught.value.code, caught.value.param) == ("permission_denied", "model")


def test_tokens_of_an_issuer(full: Path) -> None:
    tenants = opened(full)
    assert tenants.authenticate(token()).tenant == "acme"
    assert tenants.authenticate(token(org="acme-test", aud=["other", "tandem"])).tenant == "acme"
    assert refused(tenants, token(org="acme")) == "permission_denied"  # a genuine token of nobody here


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "t" * 40},
        {"algorithm": "HS512"},
        {"exp": 1000},
        {"exp": None},
        {"aud": "other"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"org": None},
        {"org": ["acme-prod"]},
        {"nbf": FAR_FUTURE},
    ],
)
def test_tokens_that_are_not_accepted(full: Path, changed: dict[str, Any]) -> None:
    assert refused(opened(full), token(**changed)) == "invalid_api_key"


@pytest.mark.parametrize(
    "expiry", [math.inf, -math.inf, 10**400, "9" * 5000, [], True], ids=["inf", "-inf", "huge", "text", "list", "true"]
)
def test_odd_times_are_no_times(full: Path, expiry: Any) -> None:
    """An issuer may sign anything."""
    assert refused(opened(full), token(exp=expiry)) == "invalid_api_key"


def test_tokens_of_any_depth_get_an_answer(full: Path) -> None:
    tenants = opened(full)
    header, _, signature = token().removeprefix("Bearer ").split(".")
    for depth in range(800, 1000):
        deep = f'{{"iss": "https://login.example", "deep": {"[" * depth}{"]" * depth}}}'
        payload = base64.urlsafe_b64encode(deep.encode()).decode().rstrip("=")
        assert refused(tenants, f"Bearer {header}.{payload}.{signature}") == "invalid_api_key"


def test_good_tokens_are_remembered_until_they_end(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 3)
    tenants = opened(full)
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now)
    good = [token(jti=str(i)) for i in range(10)]
    for each in good:
        assert tenants.authenticate(each).tenant == "acme"
    assert len(tenants._book._tokens) == 3
    verified: list[str] = []
    monkeypatch.setattr(module, "issuer_of", lambda credential: verified.append(credential))
    assert tenants.authenticate(good[-1]).tenant == "acme"
    assert refused(tenants, good[0]) == "invalid_api_key"  # was forgotten, and nobody verifies it now
    now += HOUR_S + 1
    assert refused(tenants, good[-1]) == "invalid_api_key"
    assert len(verified) == 2


def test_tokens_without_a_signature(full: Path) -> None:
    claims = {"iss": "https://login.example", "aud": "tandem", "exp": time.time() + HOUR_S, "org": "acme-prod"}
    assert refused(opened(full), "Bearer " + jwt.encode(claims, None, "none")) == "invalid_api_key"
    header, payload, _ = token().split(".")
    assert refused(opened(full), f"{header}.{payload}.") == "invalid_api_key"


@given(st.text(alphabet="abc.=_-{}é\0 ", max_size=60))
def test_no_credential_breaks_it(text: str) -> None:
    tenants = Tenants(lambda _: _ROSTER)
    assert refused(tenants, f"Bearer {text}") == "invalid_api_key"


def _pem(key: Any, *, private: bool = False) -> str:
    if private:
        raw = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    else:
        raw = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return str(raw.decode())


EC_KEYS = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
RSA_KEY = rsa.generate_private_key(65537, 2048)

ASYMMETRIC = """
issuers:
  - {{issuer: https://login.example, audience: tandem, algorithm: {algorithm}, {kind}: keys}}
tenants:
  - {{name: acme, claims: [acme-prod]}}
"""


@pytest.mark.parametrize(("algorithm", "key"), [("ES256", EC_KEYS[0]), ("RS256", RSA_KEY)])
def test_public_keys(tmp_path: Path, algorithm: str, key: Any) -> None:
    write(tmp_path, _pem(key), "keys")
    tenants = opened(write(tmp_path, ASYMMETRIC.format(algorithm=algorithm, kind="public_key_file")))
    assert tenants.authenticate(token(key, algorithm, sub="acme-prod")).tenant == "acme"
    assert refused(tenants, token(EC_KEYS[1], "ES256", sub="acme-prod")) == "invalid_api_key"
    # the public key is public: it must not do as the secret of a symmetric signature
    forged = _hs256_by_hand(_pem(key).encode())
    assert refused(tenants, forged) == "invalid_api_key"


def _hs256_by_hand(secret: bytes) -> str:
    claims = {"iss": "https://login.example", "aud": "tandem", "exp": time.time() + HOUR_S, "sub": "acme-prod"}
    parts = [jwt.utils.base64url_encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signed = b".".join(parts)
    signature = jwt.utils.base64url_encode(hmac.digest(secret, signed, "sha256"))
    return "Bearer " + (signed + b"." + signature).decode()


def _jwks(**keys: Any) -> str:
    entries = []
    for kid, key in keys.items():
        algorithm = jwt.get_algorithm_by_name("ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256")
        entries.append({**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid})
    return json.dumps({"keys": [*entries, {"kty": "unknown", "kid": "x"}]})


def test_key_sets_and_their_rotation(tmp_path: Path) -> None:
    write(tmp_path, _jwks(old=EC_KEYS[0], rsa=RSA_KEY), "keys")
    tenants = opened(write(tmp_path, ASYMMETRIC.format(algorithm="ES256", kind="jwks_file")))

    def sent(key: Any, kid: str) -> str:
        return token(key, "ES256", {"kid": kid}, sub="acme-prod")

    assert tenants.authenticate(sent(EC_KEYS[0], "old")).tenant == "acme"
    assert refused(tenants, sent(EC_KEYS[1], "old")) == "invalid_api_key"
    assert refused(tenants, sent(EC_KEYS[1], "new")) == "invalid_api_key"
    write(tmp_path, _jwks(new=EC_KEYS[1]), "keys")
    assert tenants.reload()
    assert tenants.authenticate(sent(EC_KEYS[1], "new")).tenant == "acme"
    assert refused(tenants, sent(EC_KEYS[0], "old")) == "invalid_api_key"


def test_private_keys_are_refused(tmp_path: Path) -> None:
    write(tmp_path, _pem(EC_KEYS[0], private=True), "keys")
    path = write(tmp_path, ASYMMETRIC.format(algorithm="ES256", kind="public_key_file"))
    with pytest.raises(ConfigError, match="private key"):
        read_tenants(path, {})


KEY = "0" * 64
ANN = "tenants: [{name: ann, keys: []}]"
BOMB = "\n".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 30))
"""Each line stands for nine times as much as the one before."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("tenants: []", "line 1: tenants must be a list of length >= 1"),
        ("tenants: [}", "line 1: is not valid YAML"),
        ("- a", "line 1: must be a mapping"),
        (f"a0: &a0 x\n{BOMB}\ntenants: *a29", "line 1: a0 is not a field|tenants.* must be a mapping"),
        ("tenants: &a [*a]", r"tenants\[0\] must be a mapping"),
        ("a: &a {name: ann}\ntenants: [{<<: *a, keys: []}]", r"line 2: tenants\[0\] must have plain names as keys"),
        ("tenant:\n - name: a", "line 2: tenant is not a field; did you mean tenants?"),
        ("tenants:\n - a", r"line 2: tenants\[0\] must be a mapping"),
        ("tenants:\n - keys: []", r"line 2: tenants\[0\].name is required"),
        ("tenants:\n - name: a b", r"line 2: tenants\[0\].name must be text matching"),
        ("tenants:\n - name: a", r"tenants\[0\].keys or claims are required"),
        ("tenants:\n - name: a\n   keys: [sk-secret]", r"line 3: tenants\[0\].keys\[0\] must be the SHA-256"),
        (f"tenants:\n - name: a\n   keys: '{KEY}'", r"line 3: tenants\[0\].keys must be a list, got text"),
        (
            f"tenants:\n - {{name: a, keys: ['{KEY}']}}\n - {{name: b, keys: ['{KEY}']}}",
            r"line 3: .* belongs to tenant a",
        ),
        (f"tenants:\n - {{name: a, keys: ['{KEY}']}}\n - {{name: a, keys: []}}", r"line 3: .*name a is there twice"),
        ("tenants:\n - name: a\n   claims: [x]", r"claims need an entry in `issuers`"),
        (
            "tenants:\n - name: 7\n   keys: []",
            r"line 2: tenants\[0\].name must be text, got a whole number; put it in quotes",
        ),
        ("tenants:\n - name: a\n   name: b", r"line 3: tenants\[0\].name is there twice"),
        (
            f"tenants:\n - name: a\n   keys: ['{KEY}']\n   wieght: 2",
            "line 4: .*wieght is not a field; did you mean weight",
        ),
        (f"tenants:\n - name: a\n   keys: ['{KEY}']\n   weight: 0", "line 4: .*weight must be a number >= 0.001"),
        (f"tenants:\n - name: a\n   keys: ['{KEY}']\n   weight: .nan", "line 4: .*weight must be a number"),
        (f"tenants:\n - name: a\n   keys: ['{KEY}']\n   weight: heavy", "line 4: .*weight must be a number"),
        (
            f"tenants:\n - name: a\n   keys: ['{KEY}']\n   requests_per_minute: 0",
            "line 4: .*must be a whole number >= 1",
        ),
        (
            f"tenants:\n - name: a\n   keys: ['{KEY}']\n   max_concurrent: 1.5",
            "line 4: .*max_concurrent must be a whole number, got a number",
        ),
        (
            f"tenants:\n - name: a\n   keys: ['{KEY}']\n   priority_min: 5\n   priority_max: 1",
            "line 5: .*at least prio",
        ),
        (f"tenants:\n - name: a\n   keys: ['{KEY}']\n   models: []", "line 4: .*models must be a list of length >= 1"),
        (f"tenants:\n - name: a\n   keys: ['{KEY}']\n   admin: maybe", "line 4: .*admin must be true or false"),
        (f"tenants:\n - name: a\n   keys: ['{KEY}']\n   kv_quota: 1.5", "line 4: .*kv_quota"),
        ("issuers:\n - issuer: x\ntenants: []", r"line 2: issuers\[0\].audience is required"),
        ("issuers:\n - {issuer: x, audience: y, algorithm: none}\n" + ANN, "algorithm must be one of"),
        ("issuers:\n - {issuer: x, audience: y, algorithm: HS256}\n" + ANN, "HS256 needs secret_file"),
        ("issuers:\n - {issuer: x, audience: y, algorithm: HS256, jwks_file: z}\n" + ANN, "HS256 needs secret_file"),
        (
            "issuers:\n - {issuer: x, audience: y, algorithm: RS256, secret_file: z}\n" + ANN,
            "RS256 needs public_key_file or jw",
        ),
        (
            "issuers:\n - {issuer: x, audience: y, algorithm: HS256, secret_file: gone}\n" + ANN,
            "secret_file .*cannot be used",
        ),
        (
            "issuers:\n - {issuer: x, audience: y, algorithm: HS256, secret_file: short}\n" + ANN,
            "HS256 needs at least 32",
        ),
        (
            "issuers:\n - {issuer: x, audience: y, algorithm: ES256, jwks_file: short}\n" + ANN,
            "jwks_file .*cannot be used",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "{}", "short")
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_tenants(path, {})
    assert str(path) in str(caught.value)
    assert "sk-secret" not in str(caught.value)


@given(st.text(alphabet="tenants:[]{}-&*! \n\t'\"#0aA|>%@`,?", max_size=80))
def test_no_file_breaks_it(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ConfigError):
        read_tenants(write(Path(folder), text), {})


def test_plain_keys_are_one_tenant_that_sees_nobody_else() -> None:
    assert Tenants.open(None, None) is None
    tenants = Tenants.open(None, None, CollectorRegistry(), api_keys=["sk-1", "sk-2"])
    assert tenants is not None
    first, second = (tenants.authenticate(f"Bearer {key}") for key in ("sk-1", "sk-2"))
    assert first == second
    assert not first.admin
    with pytest.raises(TandemError, match="Incorrect API key"):
        tenants.authenticate("Bearer sk-3")


def test_who_may_come_in_is_said_in_one_place(tmp_path: Path) -> None:
    for both in ({"tenants_file": tmp_path, "api_keys_file": tmp_path}, {"tenants_file": tmp_path, "api_key": ["k"]}):
        with pytest.raises(ConfigError, match="give one of them"):
            RouterConfig(model="m", **both)  # type: ignore[arg-type]


def one(name: str, key: str) -> str:
    return f"tenants:\n - name: {name}\n   keys: [{digest(key)}]\n"


def test_a_change_is_read_and_a_bad_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    path = write(tmp_path, one("ann", "sk-ann"))
    tenants = opened(path, registry)

    def metric(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"tandem_router_tenant_file_{name}", labels)

    assert not tenants.reload()
    assert tenants.authenticate("Bearer sk-ann").tenant == "ann"
    write(tmp_path, one("bob", "sk-bob"))
    assert tenants.reload()
    assert tenants.authenticate("Bearer sk-bob").tenant == "bob"
    assert refused(tenants, "Bearer sk-ann") == "invalid_api_key"
    write(tmp_path, "tenants: nonsense")
    for _ in range(3):  # read, and said, once
        assert not tenants.reload()
    assert tenants.authenticate("Bearer sk-bob").tenant == "bob"
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        f"the tenants stay as they were: --tenants-file {path}, line 1: tenants must be a list, got text"
    ]
    assert (metric("reloads_total", result="failed"), metric("stale")) == (1, 1)
    path.unlink()
    assert not tenants.reload()
    assert tenants.authenticate("Bearer sk-bob").tenant == "bob"
    write(tmp_path, one("cy", "sk-cy"), "new")
    (tmp_path / "new").rename(path)  # another file takes its place, as a mounted configuration does
    assert tenants.reload()
    assert tenants.authenticate("Bearer sk-cy").tenant == "cy"
    assert (metric("reloads_total", result="ok"), metric("stale")) == (2, 0)


def test_what_a_bad_file_was_missing_is_enough(full: Path) -> None:
    """The key file of a new issuer may come after the tenants' file that names it."""
    tenants = opened(full)
    write(full.parent, FULL.replace("secret_file: secret", "secret_file: later"))
    assert not tenants.reload()
    write(full.parent, "u" * 40, "later")
    assert tenants.reload()
    assert tenants.authenticate(token(key="u" * 40)).tenant == "acme"


async def test_the_watch_finds_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    tenants = opened(write(tmp_path, one("ann", "sk-ann")))
    watch = asyncio.create_task(tenants.watch())
    write(tmp_path, one("bob", "sk-bob"))
    await until(lambda: tenants.roster.callers[0].tenant == "bob")
    watch.cancel()


async def test_a_file_is_read_when_it_has_stopped_changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a file may be a good one."""
    monkeypatch.setattr(module, "POLL_S", 0.001)
    tenants = opened(write(tmp_path, one("ann", "sk-ann") + one("bob", "sk-bob").partition("\n")[2]))
    assert len(tenants.roster.callers) == 2
    stamps = itertools.count()
    true_stamp = module.stamp
    monkeypatch.setattr(module, "stamp", lambda path: (next(stamps), 0, 0))
    watch = asyncio.create_task(tenants.watch())
    write(tmp_path, one("ann", "sk-ann"))
    await until(lambda: next(stamps) > 100)
    assert len(tenants.roster.callers) == 2
    monkeypatch.setattr(module, "stamp", true_stamp)
    await until(lambda: len(tenants.roster.callers) == 1, 30)
    watch.cancel()


def _roster() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), SECRET, "secret")
        return read_tenants(write(Path(folder), FULL), {})


_ROSTER = _roster()


def test_the_file_in_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "tenants.md").read_text()
    write(tmp_path, _jwks(a=RSA_KEY), "login-keys.json")
    path = write(tmp_path, page.partition("```yaml\n")[2].partition("```")[0])
    acme, operator = sorted(read_tenants(path, {}).callers, key=lambda caller: caller.tenant)
    assert acme.rates == Rates(600, 1_000_000, 50)
    assert operator.admin
