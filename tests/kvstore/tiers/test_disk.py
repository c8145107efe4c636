"""The disk tier's own rules: bounded files, moving of live records, faults of the disk, one process per directory."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, StoreIntegrityError, Tier
from tandem.kvstore.tiers import blockfile, disk
from tandem.kvstore.tiers.disk import DiskTier
from tandem.kvstore.tiers.records import DEAD, PAGE
from tests.kvstore.tiers.disk_writer import key_of


def put(tier: Tier, number: int, content: bytes) -> bool:
    return tier.put(key_of(number), ObjectInfo(size=len(content), num_tokens=1), memoryview(content))


def get(tier: Tier, number: int) -> bytes | None:
    info = tier.info(key_of(number))
    if info is None:
        return None
    out = memoryview(bytearray(info.size))
    return out.tobytes() if tier.read(key_of(number), 0, out) else None


def file_bytes(tier: DiskTier) -> int:
    return sum(path.stat().st_size for path in tier.directory.glob("*.seg"))


def random_load(tier: DiskTier, puts: int, choose: random.Random, sizes: list[int]) -> tuple[dict[int, bytes], int]:
    """Puts that replace random objects whenever the tier says that it is full: the worst that eviction can do."""
    stored: dict[int, bytes] = {}
    written = 0
    for number in range(puts):
        content = choose.randbytes(8) * (choose.choice(sizes) // 8)
        while tier.used_bytes + 2 * PAGE + len(content) > tier.capacity_bytes:
            victim = choose.choice(list(stored))
            assert tier.delete(key_of(victim))
            del stored[victim]
        assert put(tier, number, content), "what fits by the tier's own figures is stored"
        written += PAGE + len(content)
        stored[number] = content
        assert file_bytes(tier) <= tier.directory_bytes
    return stored, written


def test_files_stay_within_their_bytes_whatever_is_deleted(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 16 << 20)
    stored, written = random_load(tier, 400, random.Random(1), [8192, 40_000, 65_536, 120_000])
    assert tier.moved_bytes > 0
    assert tier.moved_bytes < 7 * written, "moving costs no more than the docstring says"
    tier.check_integrity()
    tier.close()
    again = DiskTier(tmp_path, 16 << 20)
    again.check_integrity()
    assert {key for key, _ in again.objects()} == {key_of(number) for number in stored}
    for number, content in stored.items():
        assert get(again, number) == content
    again.close()


def test_the_folder_is_closed_to_other_users(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    tier = DiskTier(tmp_path, 16 << 20)
    assert put(tier, 1, b"x" * 4096)
    tier.close()
    assert not [path for path in (tmp_path, *tmp_path.iterdir()) if path.stat().st_mode & 0o077]


def test_objects_larger_than_a_segment_are_stored_and_give_their_place_back(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 8 << 20)
    assert tier.segment_bytes < 1 << 20
    random_load(tier, 60, random.Random(2), [1 << 20, 8192])
    for key, _ in list(tier.objects()):
        assert tier.delete(key)
    assert tier.used_bytes == 0
    assert file_bytes(tier) <= (1 << 20) + PAGE, "at most the segment that is being filled"
    tier.close()


def test_an_object_larger_than_the_tier_is_refused_and_moves_nothing(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    assert put(tier, 1, b"small")
    assert not put(tier, 2, bytes(1 << 20))
    assert get(tier, 1) == b"small"
    assert tier.moved_bytes == 0
    tier.close()


def test_objects_come_oldest_first_also_after_moving_and_a_restart(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4 << 20)
    stored, _ = random_load(tier, 300, random.Random(3), [8192, 65_536])
    assert tier.moved_bytes > 0
    expected = [key_of(number) for number in stored]
    assert [key for key, _ in tier.objects()] == expected
    tier.close()
    tier = DiskTier(tmp_path, 4 << 20)
    assert [key for key, _ in tier.objects()] == expected
    tier.close()


def test_a_deleted_object_stays_deleted_and_a_replaced_one_replaced(tmp_path: Path) -> None:
    for _ in range(3):
        tier = DiskTier(tmp_path, 4 << 20)
        assert put(tier, 1, b"old")
        assert put(tier, 1, b"newer")
        assert put(tier, 2, b"deleted")
        assert tier.delete(key_of(2))
        tier.close()
        tier = DiskTier(tmp_path, 4 << 20)
        assert get(tier, 1) == b"newer"
        assert get(tier, 2) is None
        tier.check_integrity()
        tier.close()


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, code: int
) -> None:
    """A real short write first, as a full disk does it; `after` pieces of a megabyte go well."""
    tier = DiskTier(tmp_path, 64 << 20)
    assert put(tier, 1, b"before")
    size = file_bytes(tier)
    pwrite, calls = os.pwrite, iter(range(100))

    def failing(fd: int, data: memoryview, position: int) -> int:
        if next(calls) < after:
            return pwrite(fd, data, position)
        pwrite(fd, data[:PAGE], position)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(blockfile.os, "pwrite", failing)
    assert not put(tier, 2, bytes(2_500_000))
    monkeypatch.undo()
    assert tier.faults.count == 1
    assert file_bytes(tier) == size
    assert get(tier, 2) is None
    tier.check_integrity()
    assert put(tier, 3, b"after")
    tier.close()
    tier = DiskTier(tmp_path, 64 << 20)
    assert (get(tier, 1), get(tier, 2), get(tier, 3)) == (b"before", None, b"after")
    tier.close()


def test_a_full_disk_while_records_move_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 4 << 20)
    choose = random.Random(5)
    stored, _ = random_load(tier, 200, choose, [65_536])
    write = blockfile.BlockFile.write_record

    def full(self: blockfile.BlockFile, position: int, page: bytes, content: memoryview) -> None:
        if choose.random() < 0.3:
            raise OSError(errno.ENOSPC, "full")
        write(self, position, page, content)

    monkeypatch.setattr(blockfile.BlockFile, "write_record", full)
    failed = 0
    for number in range(1000, 1100):
        while tier.used_bytes + 70_000 > tier.capacity_bytes:
            victim = choose.choice(list(stored))
            assert tier.delete(key_of(victim))
            del stored[victim]
        if put(tier, number, content := choose.randbytes(65_536)):
            stored[number] = content
        else:
            failed += 1
        assert file_bytes(tier) <= tier.directory_bytes
    assert failed > 10
    monkeypatch.undo()
    tier.check_integrity()
    tier.close()
    tier = DiskTier(tmp_path, 4 << 20)
    for number, content in stored.items():
        assert get(tier, number) == content
    assert len(list(tier.objects())) == len(stored)
    tier.close()


def test_a_disk_that_cannot_be_read_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 4 << 20)
    assert put(tier, 1, b"content")

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(blockfile.os, "preadv", failing)
    assert get(tier, 1) is None
    monkeypatch.undo()
    assert get(tier, 1) == b"content"
    tier.close()


def test_a_segment_that_cannot_be_read_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    for number in range(4):
        assert put(tier, number, bytes([number]) * 40_000)
    assert len(list(tmp_path.glob("*.seg"))) == 4
    tier.close()
    (tmp_path / "notes.seg").write_text("not ours")
    read_page = blockfile.BlockFile.read_page

    def failing(self: blockfile.BlockFile, position: int) -> bytes:
        if self.path.stem.endswith("2"):
            raise OSError(errno.EIO, "broken")
        return read_page(self, position)

    monkeypatch.setattr(blockfile.BlockFile, "read_page", failing)
    tier = DiskTier(tmp_path, 1 << 20)
    assert [get(tier, number) is not None for number in range(4)] == [True, False, True, True]
    assert put(tier, 1, b"again")
    tier.close()


def test_a_segment_that_cannot_be_opened_for_long_takes_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of descriptors between the two that a segment needs: the next put uses another name."""
    tier = DiskTier(tmp_path, 1 << 20)
    posix_fadvise, calls = os.posix_fadvise, iter(range(10))

    def failing(fd: int, offset: int, length: int, advice: int) -> None:
        if next(calls) == 0:
            raise OSError(errno.EMFILE, "too many open files")
        posix_fadvise(fd, offset, length, advice)

    monkeypatch.setattr(blockfile.os, "posix_fadvise", failing)
    assert not put(tier, 1, b"x")
    assert put(tier, 1, b"x")
    tier.check_integrity()
    tier.close()


def test_a_directory_that_vanishes_is_a_refusal_not_a_crash(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "kv", 1 << 20)
    assert put(tier, 1, bytes(100_000))
    for path in (tmp_path / "kv").iterdir():
        path.unlink()
    (tmp_path / "kv").rmdir()
    assert not put(tier, 2, bytes(100_000))
    tier.delete(key_of(1))
    tier.close()


@pytest.mark.parametrize("direct", [True, False])
def test_any_alignment_reads_right_with_and_without_direct_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if not direct:
        monkeypatch.setattr(disk, "takes_direct_io", lambda _: False)
    tier = DiskTier(tmp_path, 64 << 20)
    if direct and not tier.direct_io:
        pytest.skip("this file system has no direct I/O")
    assert tier.direct_io == direct
    content = random.Random(4).randbytes(3_000_001)
    assert put(tier, 1, content)
    room = memoryview(bytearray(len(content) + 2 * PAGE))
    aligned = -blockfile._address(room) % PAGE
    for start in (aligned, aligned + 64, aligned + 1):
        for offset, length in ((0, PAGE), (0, len(content)), (4096, 1 << 20), (64, 1 << 20), (1, 2_999_999), (7, 1)):
            out = room[start : start + length]
            assert tier.read(key_of(1), offset, out)
            assert out.tobytes() == content[offset : offset + length]
    tier.close()


def test_one_process_per_directory(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    with pytest.raises(ConfigError, match="in use by another process"):
        DiskTier(tmp_path, 1 << 20)
    tier.close()
    DiskTier(tmp_path, 1 << 20).close()


def test_a_place_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="kv_disk: cannot use"):
        DiskTier(tmp_path / "file" / "kv", 1 << 20)
    with pytest.raises(ConfigError, match="kv_disk: cannot use"):
        DiskTier("/proc/kv", 1 << 20)
    with pytest.raises(ConfigError, match="kv_disk_bytes is 100"):
        DiskTier(tmp_path, 100)


def test_a_reader_keeps_its_segment_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    content = random.Random(6).randbytes(100_000)
    assert put(tier, 1, content)
    assert put(tier, 2, bytes(100_000))
    reading, go_on = threading.Event(), threading.Event()
    read = blockfile.BlockFile.read

    def slow(self: blockfile.BlockFile, position: int, out: memoryview) -> None:
        reading.set()
        assert go_on.wait(60)
        read(self, position, out)

    monkeypatch.setattr(blockfile.BlockFile, "read", slow)
    got: list[bytes | None] = []
    reader = threading.Thread(target=lambda: got.append(get(tier, 1)))
    reader.start()
    assert reading.wait(60)
    assert tier.delete(key_of(1))
    assert len(list(tmp_path.glob("*.seg"))) == 1
    go_on.set()
    reader.join()
    assert got == [content]
    tier.close()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        tier = DiskTier(tmp_path, 2 << 20)
        random_load(tier, 50, random.Random(8), [65_536, 300_000])
        for key, _ in list(tier.objects()):
            tier.delete(key)
        tier.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_integrity_check_finds_a_header_that_changed(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    assert put(tier, 1, b"x")
    segment = next(iter(tier._segments.values()))
    segment.file.set_state(0, DEAD)
    with pytest.raises(StoreIntegrityError, match="another header"):
        tier.check_integrity()
    tier.close()


def test_look_ups_take_microseconds(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4 << 20)
    keys = [key_of(number) for number in range(64)]
    for number in range(64):
        assert put(tier, number, b"x")
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        for key in keys:
            tier.info(key)
        best = min(best, time.perf_counter() - start)
    assert best < 500e-6
    assert tier.info(ObjectKey(b"?" * 32)) is None
    tier.close()


def test_opened_later_it_tells_file_by_file_what_it_holds_and_stores_nothing_before(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4 << 20)
    stored, _ = random_load(tier, 300, random.Random(3), [8192, 65_536])
    tier.close()
    tier = DiskTier(tmp_path, 4 << 20, later=True)
    assert tier.info(key_of(next(iter(stored)))) is None
    assert not put(tier, 999, b"x")
    known = set()
    for key, info in tier.objects():
        known.add(key)
        assert tier.info(key) == info
        assert not put(tier, 999, b"x")
    assert known == {key_of(number) for number in stored}
    assert [key for key, _ in tier.objects()] == [key_of(number) for number in stored]
    tier.check_integrity()
    assert put(tier, 999, b"x")
    tier.close()
