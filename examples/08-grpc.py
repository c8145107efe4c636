"""The same platform over gRPC: a stream, a call of a function, vectors, and where a request was computed.

Start the server first, with a port for gRPC (`.venv/bin/tandem serve --grpc-port 8001`), then:
    .venv/bin/python examples/08-grpc.py

Needs grpcio and the stubs of proto/inference.proto, which come with this package; for other languages make them with
protoc.
"""

from __future__ import annotations

import argparse
import json

import grpc

from tandem.proto import inference_pb2 as pb
from tandem.proto.inference_pb2_grpc import InferenceStub

WEATHER = pb.Tool(
    name="get_weather",
    description="Weather of a city.",
    parameters=json.dumps(
        {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:8001")
    parser.add_argument("--api-key", default="none", help="needed only where the server was started with keys")
    options = parser.parse_args()
    key = (("authorization", f"Bearer {options.api_key}"),)
    with grpc.insecure_channel(options.target) as channel:
        stub = InferenceStub(channel)
        stream(stub, key)
        embed(stub, key)
        explain(stub, key)
        call_a_function(stub, key)


def stream(stub: InferenceStub, key: tuple[tuple[str, str], ...]) -> None:
    request = pb.GenerateRequest(prompt="It was a dark evening, and", max_tokens=24, logprobs=1, seed=1)
    print("stream:", end="")
    for response in stub.Generate(request, metadata=key, timeout=60):
        print(response.text, end="", flush=True)
        if response.HasField("usage"):
            print(
                f"\nusage: {response.usage.prompt_tokens} prompt tokens, {response.usage.completion_tokens} generated"
            )


def embed(stub: InferenceStub, key: tuple[tuple[str, str], ...]) -> None:
    texts = ["the sea", "the ocean"]
    answer = stub.Embed(pb.EmbedRequest(input=[pb.EmbedInput(text=text) for text in texts]), metadata=key, timeout=60)
    first, second = (vector.values for vector in answer.embeddings)
    print(f"alike: {sum(a * b for a, b in zip(first, second, strict=True)):.3f}")


def explain(stub: InferenceStub, key: tuple[tuple[str, str], ...]) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Who are you?")])
    answer = stub.Complete(pb.GenerateRequest(chat=chat, max_tokens=8, explain=True), metadata=key, timeout=60)
    (attempt,) = answer.explain.attempts
    print(f"ran on: decode {attempt.decode}, prefill {attempt.prefill or 'none'} ({attempt.reason})")
    account = stub.GetRequest(pb.GetRequestRequest(id=answer.request_id), metadata=key)
    print(f"looked up: request {account.id} was {account.outcome}")


def call_a_function(stub: InferenceStub, key: tuple[tuple[str, str], ...]) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="What is the weather in Paris?")])
    request = pb.GenerateRequest(chat=chat, tools=[WEATHER], tool_mode=pb.TOOL_MODE_REQUIRED, max_tokens=60)
    (choice,) = stub.Complete(request, metadata=key, timeout=60).choices
    for call in choice.tool_calls:
        print(f"call: {call.name} {call.arguments}")


if __name__ == "__main__":
    main()
