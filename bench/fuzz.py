"""Mutated requests over every endpoint, beside streams whose answers are known.

    python bench/fuzz.py --requests 100000
    python bench/fuzz.py --requests 2000 --seed 7 -- --prefill 0     # flags for `tandem serve`

Fields come from the server's own /openapi.json. A request is a small valid one with some of its fields replaced by
extremes, nested in one another, left out, twice there, or with bytes changed. Prints JSON: answers by endpoint and
status, every answer of 500 or more and every lost connection with the request that made it, bystanders whose text was
not the one they got alone, and the memory of each process. The exit status is 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from attack import digest, ready
from attacks import MODEL, VOCABULARY
from batch_beside import machine, tell
from load import stream
from systems import ROOT, Server

MODEL_FOLDER = ROOT / "src/tandem/small_model"
BYSTANDER, FUZZER = "bystander-key", "fuzzer-key"
TENANTS = """
tenants:
  - name: bystander
    keys: [{bystander}]
  - name: fuzzer
    keys: [{fuzzer}]
"""
PATIENCE_S = 20.0
"""For one answer; a longer one is left, as clients do."""
KEPT_FAULTS = 50
BYSTANDERS = 2
Body = dict[str, Any]

MESSAGES = [{"role": "user", "content": "Who are you?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
SEEDS: dict[str, Body] = {
    "/v1/completions": {
        "prompt": "Once upon a time",
        "max_tokens": 4,
        "temperature": 0.5,
        "stop": ["x"],
        "logprobs": 2,
    },
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4, "tools": [TOOL], "logit_bias": {"5": 1}, "n": 2},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4, "instructions": "Be short."},
    "/v1/responses/input_tokens": {"input": "Hello"},
    "/v1/messages": {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "system": "Be short."},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": MESSAGES},
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "float"},
    "/v1/contexts": {"name": "c", "prompt": "Once upon a time", "ttl_s": 2},
    "/v1/batches": {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5, 6]},
}
CONSTRAINTS: list[Body] = [
    {"guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    {"guided_regex": "[ab]{2,4}"},
    {"guided_choice": ["yes", "no"]},
    {"guided_grammar": 'start: "a" | "b" start'},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"regex": "a+"}},
]
EXTREMES: list[object] = [
    *(
        None,
        True,
        False,
        0,
        -0.0,
        1,
        -1,
        2,
        0.5,
        1e-40,
        5e-324,
        -1e-40,
        1e38,
        3.5e38,
        -3.5e38,
        1e300,
        1.7e308,
        -1.7e308,
    ),
    *(2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 0.1 + 0.2, 1e-7, 1.0),
    *(
        "",
        "a",
        " ",
        "\x00",
        "\n",
        "\ufeff",
        "\ud800",
        "\U0010ffff",
        "e\u0301" * 50,
        "NaN",
        "1e400",
        "{{ x }}",
        "a" * 5000,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [""],
        [0],
        [-1],
        [VOCABULARY - 1],
        [VOCABULARY],
        [2**40],
        [0.5],
        [True],
        {"": None},
        {"a": []},
    ),
    [*range(VOCABULARY)],
    ["a"] * 200,
    {str(token): -100 for token in range(VOCABULARY)},
    {str(token): 100 for token in range(0, VOCABULARY, 3)},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
    {"type": "object", "patternProperties": {"(a|a)*$": {"minimum": 1e300}}, "allOf": [{"$ref": "#/x"}]},
    {"type": "function", "function": {"name": "f"}},
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}],
]
RAW_NUMBERS = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"0" * 400, b"9" * 400, b"1." + b"1" * 400]


class Mutator:
    """Requests from a seed; the fields are those of the endpoint's schema."""

    def __init__(self, fields: dict[str, dict[str, list[str]]], chance: random.Random) -> None:
        self._fields = fields
        self._chance = chance
        self._all = sorted({name for names in fields.values() for name in names})
        self._by_type = {
            "boolean": [True, False],
            "integer": [value for value in EXTREMES if type(value) is int] + [*range(-2, 20), 100, 1000],
            "number": [value for value in EXTREMES if type(value) in (int, float)] + [0.1, 0.5, 0.9, 1.1, 2.0, 5.0],
            "string": [value for value in EXTREMES if isinstance(value, str)],
            "array": [value for value in EXTREMES if isinstance(value, list)] + [["a"], ["a", "b"], [5, 6, 7]],
            "object": [value for value in EXTREMES if isinstance(value, dict)] + [{"5": 1.5}, {"5": -100, "6": 100}],
        }

    def request(self) -> tuple[str, dict[str, str], bytes]:
        chance = self._chance
        path = chance.choice(list(SEEDS))
        body = copy.deepcopy(SEEDS[path])
        if chance.random() < 0.15:
            body.update(chance.choice(CONSTRAINTS))
        if chance.random() < 0.3:
            body["stream"] = True
        for _ in range(chance.choice((1, 1, 1, 1, 2, 2, 3, 8))):
            self._change(path, body)
        raw = json.dumps(body).encode()
        if chance.random() < 0.1:
            raw = self._spoil(raw)
        headers = {"content-type": "application/json"}
        if chance.random() < 0.03:
            headers = {"content-type": chance.choice(["text/plain", "multipart/form-data; boundary=x", "", "a/b; c"])}
        if chance.random() < 0.02:
            path = chance.choice(["/v1/files", path + "/x", path + "?n=1&n=2", "/v1/batches/batch_1/cancel"])
        return path, headers, raw

    def _change(self, path: str, body: Body) -> None:
        chance = self._chance
        where: Any = body
        if chance.random() < 0.3:  # somewhere inside
            for _ in range(chance.randrange(1, 5)):
                inner = list(where.values()) if isinstance(where, dict) else where
                deeper = [value for value in inner if isinstance(value, dict | list) and value]
                if not deeper:
                    break
                where = chance.choice(deeper)
        if isinstance(where, list):
            where[chance.randrange(len(where))] = self._value()
            return
        fields = self._fields.get(path, {})
        name = chance.choice([*(fields if where is body and chance.random() < 0.9 else self._all), *where])
        if chance.random() < 0.08:
            where.pop(name, None)
        elif (types := fields.get(name)) and chance.random() < 0.6:
            where[name] = copy.deepcopy(chance.choice(self._by_type[chance.choice(types)]))
        else:
            where[name] = self._value()

    def _value(self) -> object:
        chance = self._chance
        draw = chance.random()
        if draw < 0.7:
            return copy.deepcopy(chance.choice(EXTREMES))
        if draw < 0.8:
            return [copy.deepcopy(chance.choice(EXTREMES)) for _ in range(chance.randrange(1, 6))]
        if draw < 0.9:
            return {chance.choice(self._all): copy.deepcopy(chance.choice(EXTREMES)) for _ in range(3)}
        if draw < 0.95:
            return chance.choice([chance.uniform(-5, 5), chance.randrange(-10, 300), chance.random()])
        value: object = chance.choice(EXTREMES)
        for _ in range(chance.choice((3, 90, 110, 980, 3000)) if chance.random() < 0.2 else 2):
            value = [value] if chance.random() < 0.5 else {"a": value}
        return value

    def _spoil(self, raw: bytes) -> bytes:
        chance = self._chance
        at = chance.randrange(len(raw))
        kinds: list[Callable[[], bytes]] = [
            lambda: raw[:at],
            lambda: raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :],
            lambda: raw + raw,
            lambda: b"\xef\xbb\xbf" + raw,
            lambda: raw.decode().encode("utf-16"),
            lambda: raw.replace(b"4", chance.choice(RAW_NUMBERS), 1),
            lambda: raw.replace(b"{", b'{"max_tokens": 2, "max_tokens": 3, ', 1),
            lambda: b"[" * chance.choice((5, 200, 100_000)) + raw,
        ]
        return chance.choice(kinds)()


class Fuzz:
    def __init__(self, url: str, pid: int, options: argparse.Namespace) -> None:
        self.url = url
        self.platform = psutil.Process(pid)
        self.options = options
        self.left = options.requests
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self.faults: list[dict[str, object]] = []
        self.fault_count = 0
        self.known: list[tuple[Body, str]] = []
        self.bystanders = Counter[str]()
        self.chance = random.Random(options.seed)

    async def run(self) -> dict[str, object]:
        await ready(self.url)
        limits = httpx.Limits(max_connections=self.options.connections + 4)
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, limits=limits, timeout=PATIENCE_S) as http:
            mutator = Mutator(fields_of((await http.get("/openapi.json")).json()), self.chance)
            for index in range(8):
                body = {"prompt": f"Chapter {index}. It was", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
                body["logprobs"] = 1
                result = await stream(self.url, body, keep_text=True, api_key=BYSTANDER)
                assert not result.error, result.error
                self.known.append((body, result.text))
            memory = [self._memory()]
            fuzzers = [asyncio.create_task(self._send(http, mutator)) for _ in range(self.options.connections)]
            watch = asyncio.create_task(self._sample(memory))
            beside = [asyncio.create_task(self._stand_by()) for _ in range(BYSTANDERS)]
            await asyncio.gather(*fuzzers)
            watch.cancel()
            await asyncio.gather(*beside)
            memory.append(self._memory())
        return {
            "requests": sum(sum(statuses.values()) for statuses in self.answers.values()),
            "answers": {path: dict(sorted(statuses.items())) for path, statuses in sorted(self.answers.items())},
            "faults": self.fault_count,
            "first_faults": self.faults,
            "bystanders": dict(self.bystanders),
            "memory_mib": memory,
        }

    async def _send(self, http: httpx.AsyncClient, mutator: Mutator) -> None:
        while self.left > 0:
            self.left -= 1
            if self.left % 1000 == 0:
                print(
                    f"{self.left} left, {self.fault_count} faults, {dict(self.bystanders)}", file=sys.stderr, flush=True
                )
            path, headers, raw = mutator.request()
            headers["authorization"] = f"Bearer {FUZZER}"
            try:
                answer = await http.post(path, content=raw, headers=headers)
            except httpx.TimeoutException:
                self.answers[path]["left"] += 1
                continue
            except httpx.TransportError as error:
                self._fault(path, type(error).__name__, raw, str(error))
                continue
            self.answers[path][str(answer.status_code)] += 1
            if answer.status_code >= 500 and answer.status_code != 503:
                self._fault(path, str(answer.status_code), raw, answer.text)
            elif b'"code":"internal' in answer.content or b'"server_error"' in answer.content:  # inside a stream
                self._fault(path, "error event", raw, answer.text)

    def _fault(self, path: str, what: str, raw: bytes, answer: str) -> None:
        self.fault_count += 1
        if len(self.faults) < KEPT_FAULTS:
            shown = raw.decode() if raw.isascii() and len(raw) < 4000 else base64.b64encode(raw[:20_000]).decode()
            self.faults.append({"path": path, "what": what, "answer": answer[:500], "request": shown})

    async def _stand_by(self) -> None:
        while self.left > 0:
            body, text = self.chance.choice(self.known)
            result = await stream(self.url, body, keep_text=True, api_key=BYSTANDER)
            outcome = result.error or ("same" if result.text == text else "another text")
            self.bystanders[outcome] += 1

    async def _sample(self, memory: list[dict[str, int]]) -> None:
        while True:
            await asyncio.sleep(60.0)
            memory.append(self._memory())

    def _memory(self) -> dict[str, int]:
        """Resident MiB by process, named by its command's first word after the program."""
        found: dict[str, int] = {"at_s": round(time.monotonic())}
        for process in self.platform.children(recursive=True):
            try:
                found[f"{process.name()}-{process.pid}"] = process.memory_info().rss >> 20
            except psutil.Error:
                continue
        return found


def fields_of(document: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """The fields of each endpoint's body, each with its types."""
    schemas = document["components"]["schemas"]

    def followed(schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def types(schema: dict[str, Any]) -> list[str]:
        kinds = [followed(each).get("type", "object") for each in schema.get("anyOf", [schema])]
        return [kind for kind in kinds if kind != "null"]

    fields = {}
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if content:
            properties = followed(content["schema"]).get("properties", {})
            fields[path] = {name: types(schema) for name, schema in sorted(properties.items())}
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("flags", nargs="*", help="of `tandem serve`, after --")
    options = parser.parse_args()
    sys.setrecursionlimit(50_000)  # to write nested bodies
    before = machine()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        tenants = Path(folder, "tenants.yaml")
        tenants.write_text(TENANTS.format(bystander=digest(BYSTANDER), fuzzer=digest(FUZZER)))
        flags = ["--tenants-file", str(tenants), "--storage", folder, *options.flags]
        command = [sys.executable, "-m", "tandem.runtime.cli", "serve", str(MODEL_FOLDER), *flags]
        server = Server("fuzzed", lambda port: [*command, "--port", str(port)], ROOT)
        process, url = server.start()
        try:
            found = asyncio.run(Fuzz(url, process.pid, options).run())
        finally:
            process.terminate()
            process.wait()
    result = {"machine": before, "load_after": os.getloadavg(), "seed": options.seed, **found}
    tell(result, options.out)
    sys.exit(bool(found["faults"]) or set(found["bystanders"]) != {"same"})


if __name__ == "__main__":
    main()
