#!/usr/bin/env bash
# Regenerates the stubs beside the .proto files. Run by `make proto`; a test checks that the result is committed.
# Usage: proto/generate.sh [OUT_ROOT]   (default: src, whose tandem/proto is this folder)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-src}"
mkdir -p "$out"
python -m grpc_tools.protoc -I src --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" \
  --mypy_grpc_out="$out" src/tandem/proto/*.proto
