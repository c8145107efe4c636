"""One dataclass, filled from flags, environment and YAML; mistakes name the flag and say what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from tandem.common.errors import ConfigError
from tandem.common.settings import Foreign, Group, parse_settings


@dataclass(frozen=True, slots=True)
class Colours:
    """Of the house."""

    basics: ClassVar[Group]
    """Basics"""
    walls: str
    """What visitors see first."""
    num_windows: int | None = None
    """None: as many as fit."""
    rooms: tuple[str, ...] = ()
    """Names."""

    cellar: ClassVar[Group]
    """Cellar: what nobody sees."""
    cellar_bytes: int = 1 << 30
    """Room for paint."""
    drying_s: float = 60.0
    """How long nobody may touch it."""
    max_len: int = 10
    """Of a brush."""
    finish: Literal["matt", "glossy", "auto"] = "auto"
    """How it shines."""
    primer: bool = True
    """Whether there is one."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of the painters."""
    plan: Path | None = None
    """Where it is drawn."""
    door_code: list[str] = field(default_factory=list, repr=False)
    """Opens the door."""

    def __post_init__(self) -> None:
        if self.num_windows == 0:
            raise ConfigError("num_windows 0: it would be dark")


FOREIGN = {
    "coats": Foreign(fine=frozenset({"1"}), remedy="one coat is all there is; paint twice"),
    "sheen": Foreign(becomes="finish", values={"shiny": "glossy"}),
    "fast": Foreign(switch=True, fine=frozenset({"true"}), remedy="it is always fast"),
}


def parse(*argv: str) -> Colours:
    return parse_settings(
        Colours,
        argv,
        command="paint",
        description="Paints.",
        examples=[("all white", "paint --walls white")],
        foreign=FOREIGN,
        short={"c": "coats", "w": "num_windows"},
    )


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((". See `paint --help`.", "? See `paint --help`."))
    return message


def test_dashes_and_underscores_are_the_same() -> None:
    assert parse("--walls", "red-ish", "--num-windows=3") == parse("--num_windows", "3", "--walls=red-ish")


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paint.yaml").write_text("walls: blue\nnum-windows: 2\nmax_len: 3\n")
    monkeypatch.setenv("TANDEM_WALLS", "green")
    monkeypatch.setenv("TANDEM_ROOMS", "[attic]")
    assert parse() == Colours("green", None, ("attic",))
    in_file = parse("--config", str(tmp_path / "paint.yaml"), "--num-windows", "5")
    assert in_file == Colours("green", 5, ("attic",), max_len=3)
    monkeypatch.setenv("TANDEM_CONFIG", str(tmp_path / "paint.yaml"))
    assert parse().num_windows == 2


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--cellar-bytes", "4GiB"], "cellar_bytes", 4 << 30),
        (["--cellar-bytes", "1.5 gib"], "cellar_bytes", 3 << 29),
        (["--cellar-bytes", "4GB"], "cellar_bytes", 4 * 10**9),
        (["--cellar-bytes", "4Gi"], "cellar_bytes", 4 << 30),
        (["--cellar-bytes", "4G"], "cellar_bytes", 4 << 30),
        (["--cellar-bytes", "4g"], "cellar_bytes", 4 * 10**9),
        (["--cellar-bytes", "2e9"], "cellar_bytes", 2 * 10**9),
        (["--cellar-bytes", "8_000"], "cellar_bytes", 8000),
        (["--cellar-bytes", "123456789012345678901"], "cellar_bytes", 123456789012345678901),
        (["--drying-s", "5m"], "drying_s", 300.0),
        (["--drying-s", "250ms"], "drying_s", 0.25),
        (["--drying-s", "7"], "drying_s", 7.0),
        (["--max-len", "32k"], "max_len", 32000),
        (["--max-len", "32K"], "max_len", 32768),
        (["--finish", "matt"], "finish", "matt"),
        (["--no-primer"], "primer", False),
        (["--primer=false"], "primer", False),
        (["--primer", "off"], "primer", False),
        (["--primer", "--max-len", "3"], "primer", True),
        (["--rooms", "a,b", "--rooms", "c"], "rooms", ("a,b", "c")),
        (["--rooms", "a, b"], "rooms", ("a", "b")),
        (["--rooms", "[a, 'b c']"], "rooms", ("a", "b c")),
        (["--shares", "ann=0.25,bob=1"], "shares", {"ann": 0.25, "bob": 1}),
        (["--shares", "{ann: 0.25}"], "shares", {"ann": 0.25}),
        (["--num-windows", "3", "--num-windows", "none"], "num_windows", None),
        (["--num-windows", "-1"], "num_windows", -1),
        (["-w", "4"], "num_windows", 4),
        (["--plan", "a b"], "plan", Path("a b")),
        (["--door-code", "1,2", "--door-code=--3"], "door_code", ["1,2", "--3"]),
        (["--sheen", "shiny"], "finish", "glossy"),
        (["--coats", "1", "--fast", "-c", "1"], "walls", "red"),
    ],
)
def test_values_are_read_as_they_are_written(argv: list[str], field: str, value: object) -> None:
    assert getattr(parse("--walls", "red", *argv), field) == value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "--walls is required"),
        (("--walls",), "--walls needs a value"),
        (("--walls", "--primer"), "--walls needs a value"),
        (("--walls", "red", "--num-windows", "many"), '--num-windows: must be a whole number, not "many"'),
        (("--walls", "red", "--num-windows", "1.5"), "--num-windows: must be a whole number"),
        (("--walls", "red", "--num-windows", "4k"), "--num-windows: must be a whole number"),
        (("--walls", "red", "--num-windows", "0"), "--num-windows 0: it would be dark"),
        (("--walls", "red", "--cellar-bytes", "4 parsecs"), "a number of bytes, such as 4GiB"),
        (("--walls", "red", "--drying-s", "inf"), "seconds, such as 30 or 5m"),
        (("--walls", "red", "--drying-s", "1e999"), "seconds, such as 30 or 5m"),
        (("--walls", "red", "--finish", "glosy"), 'one of matt, glossy, auto, not "glosy"; did you mean glossy?'),
        (("--walls", "red", "--primer=maybe"), "true or false"),
        (("--walls", "red", "--shares", "ann"), "shares by name"),
        (("--walls", "red", "--doors", "1"), "there is no flag --doors"),
        (("--walls", "red", "--num-window", "1"), "there is no flag --num-window; did you mean --num-windows?"),
        (("--wal", "red"), "there is no flag --wal; did you mean --walls? See `paint --help`."),
        (("--walls", "red", "-x"), "there is no flag -x"),
        (("--walls", "red", "white"), "a word too many behind --walls"),
        (("--walls", "red", "--door-code", "1", "2"), "behind --door-code"),
        (("--walls", "red", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("--walls", "red", "--coats", "2"), "--coats: one coat is all there is; paint twice"),
        (("--walls", "red", "--no-fast"), "--no-fast: it is always fast"),
        (("--help=attic",), "--help=attic"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(argv: tuple[str, ...], said: str) -> None:
    assert said in refusal(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ("--walls", "red", "--door-cod", "hunter2"),
        ("--walls", "red", "--door-cod=hunter2"),
        ("--walls", "red", "--door-code", "1", "hunter2"),
        ("--walls", "red", "--num-windows", "0", "--door-code", "hunter2"),
        ("--door", "hunter2"),
    ],
)
def test_a_secret_is_in_no_error(argv: tuple[str, ...]) -> None:
    assert "hunter2" not in refusal(*argv)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("walls: red\nnum_window: 3\n", "line 2: num_window is not a setting; did you mean num_windows?"),
        ("walls: red\nnum_windows: many\n", 'line 2: num_windows: must be a whole number, not "many"'),
        ("walls: red\nrooms: {a: [1]}\n", "line 2: rooms"),
        ("walls: red\n\nnum_windows: 0\n", "line 3: num_windows says"),
        ("coats: 2\n", "line 1: coats: one coat"),
        ("walls: [red\n", "not valid YAML"),
        ("- walls\n", "must be a mapping"),
        ("walls: red\nwalls: blue\n", "walls is there twice"),
        ("door_code: {a: hunter2}\n", "line 1: door_code"),
    ],
)
def test_mistakes_in_the_file_name_its_line(tmp_path: Path, yaml: str, said: str) -> None:
    path = tmp_path / "paint.yaml"
    path.write_text(yaml)
    message = refusal("--config", str(path))
    assert said in message
    assert "hunter2" not in message


def test_a_file_may_write_values_as_yaml_does(tmp_path: Path) -> None:
    (tmp_path / "paint.yaml").write_text(
        "walls: red\nrooms: [hall, 7]\nshares: {ann: 0.25}\nprimer: no\ncellar_bytes: 2GiB\nnum_windows: null\n"
        "sheen: shiny\nfast: true\n"
    )
    parsed = parse("--config", str(tmp_path / "paint.yaml"))
    assert parsed == Colours(
        "red", None, ("hall", "7"), primer=False, shares={"ann": 0.25}, cellar_bytes=2 << 30, finish="glossy"
    )


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_basics_and_the_way_to_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    first = shown(capsys, "--help")
    for part in (
        "What visitors see first",
        "required",
        "# all white\n  paint --walls white",
        "--help=GROUP",
        "TANDEM_",
    ):
        assert part in first
    assert "--cellar-bytes" not in first
    assert "cellar     what nobody sees." in first
    assert "--cellar-bytes SIZE\n" in shown(capsys, "--help=cellar") == shown(capsys, "--help", "cellar")
    assert "default 1GiB" in shown(capsys, "--help=cellar-bytes")
    everything = shown(capsys, "--help=all")
    assert "--num-windows N\n" in everything
    assert "--finish matt|glossy|auto\n" in everything
    assert "--primer, --no-primer\n" in everything


def test_what_is_printed_as_configuration_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--walls", "null", "--rooms", "a,b", "--shares", "ann=0.5", "--plan", "p", "--no-primer"]
    printed = shown(capsys, *argv, "--door-code", "hunter2", "--print-config")
    assert "hunter2" not in printed
    (tmp_path / "paint.yaml").write_text(printed)
    assert parse("--config", str(tmp_path / "paint.yaml")) == parse(*argv)


@dataclass(frozen=True)
class Server:
    port: int = 8000
    """Where."""
    grpc_port: int | None = None
    """Where else."""
    kv_store_address: str = ""
    """Called kv_store before."""


def parse_server(*argv: str) -> Server:
    return parse_settings(Server, argv, command="t", description="d", examples=())


def test_kubernetes_may_have_services_with_our_names(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TANDEM_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("TANDEM_GRPC_PORT", "udp://[fd00::1]:8001")
    assert parse_server() == Server()
    assert [record.message.partition("=")[0] for record in caplog.records] == ["TANDEM_PORT", "TANDEM_GRPC_PORT"]
    monkeypatch.setenv("TANDEM_GRPC_PORT", "8001")
    assert parse_server().grpc_port == 8001
    monkeypatch.setenv("TANDEM_GRPC_PORT", "http://10.0.0.1:8001")
    with pytest.raises(ConfigError, match="TANDEM_GRPC_PORT: must be a whole number"):
        parse_server()


def test_an_old_name_is_refused_with_the_new_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for flag in ("--kv-store", "--kv_store"):
        with pytest.raises(ConfigError, match=f"^{flag} is called --kv-store-address now"):
            parse_server(flag, "unix:/run/kv.sock")
    (tmp_path / "t.yaml").write_text("port: 1\nkv_store: unix:/run/kv.sock\n")
    with pytest.raises(ConfigError, match=r"t\.yaml, line 2: kv_store is called kv_store_address now"):
        parse_server("--config", str(tmp_path / "t.yaml"))
    with pytest.raises(ConfigError, match="there is no flag --kv-listen"):
        parse_server("--kv-listen", "host:1")
    monkeypatch.setenv("TANDEM_KV_LISTEN", "another command's")
    assert parse_server() == Server()
    monkeypatch.setenv("TANDEM_KV_STORE", "unix:/run/kv.sock")
    with pytest.raises(ConfigError, match=r"^TANDEM_KV_STORE is called TANDEM_KV_STORE_ADDRESS now"):
        parse_server()


def test_a_value_that_looks_like_a_flag_name_is_left_alone() -> None:
    parsed: Any = parse("--walls=off-white")
    assert parsed.walls == "off-white"
