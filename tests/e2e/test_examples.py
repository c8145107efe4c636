"""The numbered examples work against the bundled model, and what it writes is English."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tandem.runtime.settings import BUNDLED_MODEL
from tests.e2e.conftest import ServeFactory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_openai_client(serves: ServeFactory) -> None:
    url = serves(BUNDLED_MODEL).url
    script = EXAMPLES / "01-openai-client.py"
    done = subprocess.run(
        [sys.executable, script, "--base-url", f"{url}/v1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    models, completion, chat, usage = re.split(r"\n\n", done.stdout.strip(), maxsplit=3)
    assert models == "models: model"  # the name of the folder
    words = re.findall(r"[a-z]+", completion.removeprefix("completion: It was a dark evening, and").lower())
    common = {"the", "and", "of", "to", "a", "in", "he", "was", "that", "it", "his", "i", "had", "with", "as", "for"}
    assert len(words) >= 20
    assert sum(word in common for word in words) >= len(words) / 6, completion
    assert len(chat.removeprefix("chat: ").split()) >= 3
    assert re.search(r"\d+ prompt tokens, \d+ generated", usage)
