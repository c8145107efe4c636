"""A disk tier whose process dies at any moment, and files that are damaged in any place."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey
from tandem.kvstore.tiers.disk import DiskTier
from tests.kvstore.tiers.disk_writer import content_of, key_of

pytestmark = pytest.mark.processes

CAPACITY = 24 << 20


def kill_at_random(directory: Path, seed: int, kept: set[int]) -> set[int]:
    """Runs a writer for a random number of puts, kills it, and checks everything that it and its predecessor, which
    left `kept`, promised. Returns what is there now."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.kvstore.tiers.disk_writer", str(directory), str(CAPACITY), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    choose = random.Random(seed)
    lines = [child.stdout.readline() for _ in range(choose.randrange(1, 120))]
    child.kill()
    lines += child.stdout.readlines()
    child.wait()
    child.stdout.close()
    promised = set(kept)
    for line in lines:
        if not line.endswith("\n"):
            continue
        number = int(line[2:])
        (promised.add if line[0] == "P" else promised.discard)(number)
    tier = DiskTier(directory, CAPACITY)
    tier.check_integrity()
    assert sum(path.stat().st_size for path in directory.glob("*.seg")) <= CAPACITY
    present = {int.from_bytes(key, "little") for key, _ in tier.objects()}
    assert promised <= present
    assert len(present - promised) <= 2, "at most the put and the delete that were under way are left open"
    for number in present:
        content = content_of(number)
        out = memoryview(bytearray(len(content)))
        assert tier.read(key_of(number), 0, out)
        assert out.tobytes() == content
    tier.close()
    return present


def test_a_killed_writer_loses_nothing_that_it_promised(tmp_path: Path) -> None:
    kept: set[int] = set()
    for seed in range(1, 5):
        kept = kill_at_random(tmp_path, seed, kept)


@pytest.mark.slow
def test_a_writer_killed_many_times_loses_nothing_that_it_promised(tmp_path: Path) -> None:
    kept: set[int] = set()
    for seed in range(10, 50):
        kept = kill_at_random(tmp_path, seed, kept)


def filled(directory: Path) -> tuple[dict[ObjectKey, bytes], Path]:
    tier = DiskTier(directory, 64 << 20)
    objects = {
        key_of(number): random.Random(number).randbytes(size) for number, size in enumerate([100, 9000, 0, 5000])
    }
    for key, content in objects.items():
        assert tier.put(key, ObjectInfo(size=len(content), num_tokens=1), memoryview(content))
    tier.close()
    (path,) = directory.glob("*.seg")
    return objects, path


def check_survivors(directory: Path, objects: dict[ObjectKey, bytes]) -> set[ObjectKey]:
    """Opens a damaged directory: what is there is right, and it can be written."""
    tier = DiskTier(directory, 64 << 20)
    tier.check_integrity()
    survivors = set()
    for key, info in tier.objects():
        out = memoryview(bytearray(info.size))
        assert tier.read(key, 0, out)
        assert info.size == len(objects[key])
        survivors.add(key)
    assert tier.put(key_of(99), ObjectInfo(size=5, num_tokens=1), memoryview(b"fresh"))
    tier.close()
    again = DiskTier(directory, 64 << 20)
    out = memoryview(bytearray(5))
    assert again.read(key_of(99), 0, out)
    assert out.tobytes() == b"fresh"
    assert {key for key, _ in again.objects()} == survivors | {key_of(99)}
    again.close()
    return survivors


RECORD_ENDS = [8192, 8192 + 16384, 24576 + 4096, 28672 + 12288]


@pytest.mark.parametrize(
    "length", sorted({max(0, end + step) for end in [0, *RECORD_ENDS] for step in (-4097, -4096, -1, 0, 1, 40, 4096)})
)
def test_a_file_cut_anywhere_keeps_the_records_before(tmp_path: Path, length: int) -> None:
    objects, path = filled(tmp_path)
    size = path.stat().st_size
    assert size == RECORD_ENDS[-1]
    with open(path, "r+b") as file:
        file.truncate(min(length, size))
    survivors = check_survivors(tmp_path, objects)
    assert survivors == {key for key, end in zip(objects, RECORD_ENDS, strict=True) if end <= length}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(flips=st.lists(st.tuples(st.integers(0, RECORD_ENDS[-1] - 1), st.integers(0, 7)), min_size=1, max_size=8))
def test_flipped_bits_cost_at_most_the_records_they_hit(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("flips")
    objects, path = filled(directory)
    raw = bytearray(path.read_bytes())
    hit = set()
    for position, bit in flips:
        raw[position] ^= 1 << bit
        hit.add(next(index for index, end in enumerate(RECORD_ENDS) if position < end))
    path.write_bytes(raw)
    survivors = check_survivors(directory, objects)
    assert survivors >= {key for index, key in enumerate(objects) if index not in hit}


def test_bytes_inside_an_object_never_pass_for_a_record(tmp_path: Path) -> None:
    """An object that is itself a segment file, in a segment whose own header is destroyed."""
    inner, path = filled(tmp_path / "inner")
    image = path.read_bytes()
    tier = DiskTier(tmp_path / "outer", 64 << 20)
    assert tier.put(key_of(7), ObjectInfo(size=len(image), num_tokens=1), memoryview(image))
    tier.close()
    (outer,) = (tmp_path / "outer").glob("*.seg")
    with open(outer, "r+b") as file:
        file.write(bytes(4096))
    assert check_survivors(tmp_path / "outer", inner) == set()
