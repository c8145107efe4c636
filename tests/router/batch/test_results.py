"""Input lines and the journal of results: what is refused, and what a crash may do to it."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tandem.router.batch import lines
from tandem.router.batch.lines import Line, Results, answered_line, read_lines, request_json, unanswered_line
from tandem.router.batch.records import BatchError, Counts

URL = "/v1/completions"


def line(custom_id: str = "a", **changes: Any) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"prompt": "x"}} | changes
    return json.dumps(whole).encode() + b"\n"


def read(content: bytes, limit: int = 10_000) -> tuple[list[Line], list[BatchError]]:
    return read_lines(io.BytesIO(content), URL, limit)


def test_lines_are_found_by_place(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(line("a") + b"\n  \n" + line("b", body={"prompt": "äöü"}) + line("c").rstrip())
    with path.open("rb") as file:
        found, errors = read_lines(file, URL, 10_000)
        assert errors == []
        assert [line.custom_id for line in found] == ["a", "b", "c"]
        assert [json.loads(request_json(file, line))["prompt"] for line in found] == ["x", "äöü", "x"]


def test_files_from_windows_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"\xef\xbb\xbf" + (line("a") + line("b")).replace(b"\n", b"\r\n"))
    with path.open("rb") as file:
        found, errors = read_lines(file, URL, 10_000)
        assert errors == []
        assert [json.loads(request_json(file, line))["prompt"] for line in found] == ["x", "x"]


def test_depth_is_counted_where_there_is_some() -> None:
    wide = line("a", body={"prompt": "[" * 2000, "x": [[], {}] * 1000, "y": json.loads("[" * 90 + "]" * 90)})
    assert read(wide, 20_000)[1] == []


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{not json\n", "invalid_json_line", None),
        (b"\xff\xfe\n", "invalid_json_line", None),
        (b"[" * 5000 + b"\n", "invalid_json_line", None),
        (b'{"custom_id": "b"}\n', "invalid_json_line", "method"),
        (line("b", body=[]), "invalid_json_line", "body"),
        (line("b", body={"x": "DEEP"}).replace(b'"DEEP"', b"[" * 700 + b"]" * 700), "invalid_json_line", "body"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 600), "invalid_custom_id", "custom_id"),
        (line("a"), "duplicate_custom_id", "custom_id"),
        (line("b", method="GET"), "invalid_method", "method"),
        (line("b", url="/v1/chat/completions"), "mismatched_endpoint", "url"),
        (line("b", body={"prompt": "x" * 20_000}), "request_too_large", None),
    ],
)
def test_a_bad_line_is_named(bad: bytes, code: str, param: str | None) -> None:
    _, errors = read(line("a") + bad)
    assert [(error.code, error.line, error.param) for error in errors] == [(code, 2, param)]


def test_an_empty_file_and_too_many_lines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [error.code for error in read(b"\n\n")[1]] == ["empty_file"]
    monkeypatch.setattr(lines, "MAX_LINES", 3)
    assert read(b"".join(line(str(i)) for i in range(3)))[1] == []
    assert [error.code for error in read(b"".join(line(str(i)) for i in range(4)))[1]] == ["too_many_lines"]


def test_only_the_first_errors_are_reported() -> None:
    assert len(read(b"x\n" * 1000)[1]) == lines.MAX_ERRORS


def test_results_survive_a_crash_at_every_byte(tmp_path: Path) -> None:
    """However much of the last line reached the file, whole lines count and the rest is cut off."""
    answers = [answered_line(f"id-{i}", "r", 200, b'{"text":"\\n \xc3\xa4"}') for i in range(2)]
    whole = b"".join(answers)
    for length in range(len(whole) + 1):
        output, errors = tmp_path / "output", tmp_path / "errors"
        output.write_bytes(whole[:length])
        results = Results(output, errors)
        complete = whole[:length].count(b"\n")
        assert results.done == {f"id-{i}" for i in range(complete)}
        for i in range(complete, 2):
            results.add(f"id-{i}", answers[i], failed=False)
        assert results.finish() == (len(whole), 0)
        results.close()
        assert output.read_bytes() == whole


def test_blocks_that_never_reached_the_disk_are_cut_off(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_bytes(answered_line("a", "r", 200, b"{}") + bytes(100) + b"\n" + answered_line("b", "r", 200, b"{}"))
    results = Results(output, tmp_path / "errors")
    assert results.done == {"a"}
    assert output.read_bytes() == answered_line("a", "r", 200, b"{}")[:0] + output.read_bytes()[: results.finish()[0]]
    results.close()


def test_good_and_bad_results_are_counted_apart(tmp_path: Path) -> None:
    paths = tmp_path / "output", tmp_path / "errors"
    results = Results(*paths)
    results.add("a", answered_line("a", "r1", 200, b'{"x":1}'), failed=False)
    results.add("b", answered_line("b", "r2", 400, b'{"error":{}}'), failed=True)
    results.add("c", unanswered_line("c", "batch_expired", "too late"), failed=True)
    assert results.counts(5) == Counts(5, 1, 2)
    results.close()
    again = Results(*paths)
    assert again.done == {"a", "b", "c"}
    assert again.counts(5) == Counts(5, 1, 2)
    again.close()
    rows = [json.loads(row) for row in paths[1].read_bytes().splitlines()]
    assert rows[0]["response"] == {"status_code": 400, "request_id": "r2", "body": {"error": {}}}
    assert rows[1]["response"] is None
    assert rows[1]["error"] == {"code": "batch_expired", "message": "too late"}


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "output", tmp_path / "errors")
    results.add("a", answered_line("a", "r", 200, b"{}"), failed=False)
    before = (tmp_path / "output").read_bytes()
    real, room = os.write, [10]

    def write(descriptor: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: room.pop()])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        results.add("b", answered_line("b", "r", 200, b"{}"), failed=False)
    monkeypatch.undo()
    assert (tmp_path / "output").read_bytes() == before
    assert results.done == {"a"}
    results.add("b", answered_line("b", "r", 200, b"{}"), failed=False)
    assert results.counts(2) == Counts(2, 2, 0)
    results.close()
