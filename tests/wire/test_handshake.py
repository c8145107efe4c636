"""Two ends that get to know each other, or find out why they must not talk."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem.wire.handshake import Greeting, HandshakeRefused, admit, answer, connect, greet
from tandem.wire.header import Header, ProtocolError
from tandem.wire.link import Link, LinkClosed, Patience
from tandem.wire.peers import Endpoint, PeerIdentity, local_host_id
from tandem.wire.protocol import Hello
from tandem.wire.serving import Server
from tandem.wire.shared_memory import share

from .notes import NOTES, PATIENCE, VERSION, Kind, notes

SIZE = 8192
DEADLINE_S = 30.0
SERVER = PeerIdentity("server", 3, b"digest")
CLIENT = PeerIdentity("client", 1, b"digest")


class Served:
    """A server on both kinds of socket that admits, answers, and keeps what it heard."""

    def __init__(self, folder: Path, me: PeerIdentity = SERVER, patience: Patience = PATIENCE, room: int = 8) -> None:
        self.me = me
        self.greetings: list[Greeting] = []
        self.errors: list[Exception] = []
        self.changed = threading.Condition()
        self.memory, self.view = share("test", SIZE)
        self.shares = True
        path = folder / "s.sock"
        self.server = Server(
            path, ("127.0.0.1", 0), NOTES, patience, key=me.key, max_connections=room, serve=self._serve
        )
        self.server.start()
        listener = self.server.listener
        self.unix = Endpoint("server", 3, local_host_id(), str(path))
        self.tcp = Endpoint("server", 3, host=listener.host, port=listener.port)
        self.both = Endpoint("server", 3, local_host_id(), str(path), listener.host, listener.port)

    def _serve(self, link: Link) -> None:
        try:
            greeting = admit(link, self.me)
            answer(link, self.me, lease_s=1.5, memory=self.memory if self.shares else None)
            with self.changed:
                self.greetings.append(greeting)
                self.changed.notify_all()
            link.receive()
        except (HandshakeRefused, ProtocolError, OSError) as error:
            with self.changed:
                self.errors.append(error)
                self.changed.notify_all()

    def wait_for(self, predicate: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(predicate, DEADLINE_S)

    def error(self) -> Exception:
        self.wait_for(lambda: self.errors)
        return self.errors[0]

    def stop(self) -> None:
        self.server.stop()
        self.memory.close()
        for greeting in self.greetings:
            greeting.drop_memory()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(*args: object, **kwargs: object) -> Served:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Served(folder, *args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for served in made:
        served.stop()


@pytest.fixture
def served(make: Callable[..., Served]) -> Served:
    return make()


def meet(place: Endpoint, me: PeerIdentity = CLIENT, **options: object) -> tuple[Link, Greeting]:
    def both(link: Link) -> tuple[Link, Greeting]:
        return link, greet(link, me, **options)  # type: ignore[arg-type]

    return connect(place, NOTES, PATIENCE, both)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_each_end_knows_the_other(served: Served, transport: str) -> None:
    link, greeting = meet(getattr(served, transport), expected="server", expected_epoch=3)
    memory = greeting.memory
    greeting.drop_memory()
    link.close()
    assert greeting.peer == Hello("server", 3, b"digest", 1.5, SIZE if transport == "unix" else 0)
    assert (memory is None) == (transport == "tcp")
    served.wait_for(lambda: served.greetings)
    assert served.greetings[0].peer == Hello("client", 1, b"digest")


def test_memory_goes_both_ways_on_one_host(served: Served) -> None:
    mine, view = share("test", 2 * SIZE)
    link, greeting = meet(served.unix, memory=mine)
    assert greeting.memory is not None
    served.view[:5], view[:5] = b"theirs"[:5], b"mine!"
    assert bytes(greeting.memory.map()[:5]) == b"their"
    served.wait_for(lambda: served.greetings)
    theirs = served.greetings.pop().memory
    assert theirs is not None
    assert bytes(theirs.map()[:5]) == b"mine!"
    mine.close()
    link.close()


def test_the_unix_socket_is_taken_where_it_leads_to_the_other(served: Served, tmp_path: Path) -> None:
    for path, is_unix in ((served.unix.unix_path, True), (str(tmp_path / "dead.sock"), False)):
        if not is_unix:
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(path)
        place = Endpoint("server", 3, local_host_id(), path, served.tcp.host, served.tcp.port)
        link, greeting = meet(place)
        greeting.drop_memory()
        assert link.is_unix is is_unix
        link.close()


def test_another_behind_the_unix_socket_does_not_hide_who_is_meant(make: Callable[..., Served]) -> None:
    """Another container may show another server under the same path."""
    meant = make()
    for other in (make(PeerIdentity("other", 3, b"digest")), make(PeerIdentity("other", 3, b"another digest"))):
        place = Endpoint("server", 3, local_host_id(), other.unix.unix_path, meant.tcp.host, meant.tcp.port)
        link, greeting = meet(place, expected="server")
        assert greeting.peer.name == "server"
        link.close()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_another_name_or_start_is_not_taken_for_the_one_meant(served: Served, transport: str) -> None:
    for name, epoch in (("somebody", 3), ("server", 4)):
        with pytest.raises(ConnectionError, match=f"not '{name}' epoch {epoch}"):
            meet(getattr(served, transport), expected=name, expected_epoch=epoch)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_another_digest_is_refused_for_good_and_both_ends_name_the_two(served: Served, transport: str) -> None:
    with pytest.raises(HandshakeRefused) as refused:
        meet(getattr(served, transport), PeerIdentity("client", 1, b"other"))
    error = served.error()
    assert isinstance(error, HandshakeRefused)
    for reason in (refused.value.reason, error.reason):
        assert (reason.code, reason.retriable) == ("incompatible", False)
        assert b"digest".hex() in reason.message
        assert b"other".hex() in reason.message


def test_a_client_of_another_version_is_told_so(served: Served) -> None:
    """Also one whose whole header is shorter."""
    for later in (
        notes(VERSION + 1).frame(Kind.HELLO, 0, Hello("x")),
        notes(VERSION + 1).pack(Header(Kind.HELLO, 0))[:32],
    ):
        with socket.create_connection((served.tcp.host, served.tcp.port)) as sock:
            sock.sendall(later)
            sock.settimeout(DEADLINE_S)
            said = sock.recv(4096)
        assert b"incompatible" in said
        assert f"version {VERSION + 1}".encode() in said
        assert f"version {VERSION}".encode() in said


def test_a_server_of_another_version_is_refused_for_good() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def later_version() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(notes(VERSION + 1).frame(Kind.HELLO, 0, Hello("server")))
                sock.recv(1000)

        thread = threading.Thread(target=later_version)
        thread.start()
        host, port = listening.getsockname()
        with pytest.raises(HandshakeRefused, match=f"version {VERSION + 1}, this side version {VERSION}") as refused:
            meet(Endpoint("server", 3, host=host, port=port))
        assert not refused.value.reason.retriable
        thread.join()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("server_key", "client_key", "complaint"),
    [
        (b"k" * 32, b"", "this process has none"),
        (b"k" * 32, b"o" * 32, "another secret"),
        (b"", b"k" * 32, "it may have no secret"),
    ],
)
def test_without_the_same_secret_nobody_is_met(
    make: Callable[..., Served], transport: str, server_key: bytes, client_key: bytes, complaint: str
) -> None:
    served = make(PeerIdentity("server", 3, b"digest", server_key))
    with pytest.raises(ConnectionError, match=complaint):
        meet(getattr(served, transport), PeerIdentity("client", 1, b"digest", client_key))
    assert isinstance(served.error(), HandshakeRefused if server_key else ProtocolError)
    assert served.greetings == []


def test_with_the_same_secret_both_are_met(make: Callable[..., Served]) -> None:
    key = NOTES.key(b"a secret of at least 16 bytes")
    served = make(PeerIdentity("server", 3, b"digest", key))
    link, greeting = meet(served.tcp, PeerIdentity("client", 1, b"digest", key))
    assert greeting.peer.name == "server"
    link.close()
    assert NOTES.key(b"") == b""
    assert key != notes(name="else").key(b"a secret of at least 16 bytes")


@pytest.mark.parametrize("first", [NOTES.frame(Kind.PING, 1), NOTES.frame(Kind.HELLO, 0, Hello("x", arena_bytes=9))])
def test_what_is_no_hello_or_lacks_its_memory_ends_the_connection(served: Served, first: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(served.unix.unix_path)
        sock.sendall(first)
        sock.settimeout(DEADLINE_S)
        assert sock.recv(10) == b""
    assert isinstance(served.error(), ProtocolError)


@pytest.mark.parametrize(
    "said",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n........................", NOTES.frame(Kind.PING, 1)],
)
def test_a_server_that_says_something_else_is_not_taken(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(said)

        thread = threading.Thread(target=talk)
        thread.start()
        host, port = listening.getsockname()
        with pytest.raises(ConnectionError, match=f"{host}:{port}"):
            meet(Endpoint("server", 3, host=host, port=port))
        thread.join()


def test_who_says_nothing_is_dropped_after_a_while(make: Callable[..., Served]) -> None:
    for key in (b"", b"k" * 32):
        served = make(PeerIdentity("server", 3, b"digest", key), Patience(connect_s=0.2))
        with socket.create_connection((served.tcp.host, served.tcp.port)) as sock:
            sock.settimeout(DEADLINE_S)
            assert sock.recv(1) == b""


def test_a_silent_server_costs_a_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        with pytest.raises(ConnectionError, match="sent nothing"):
            connect(
                Endpoint("server", 3, host=host, port=port),
                NOTES,
                Patience(connect_s=0.2),
                lambda link: greet(link, CLIENT),
            )


def test_nobody_there_is_said_with_every_address(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    with pytest.raises(ConnectionError, match=r"dead\.sock.*127\.0\.0\.1:1"):
        meet(Endpoint("server", 3, local_host_id(), str(tmp_path / "dead.sock"), "127.0.0.1", 1))
    with pytest.raises(ConnectionError, match="none of its addresses"):
        meet(Endpoint("server", 3, "another host", str(tmp_path / "dead.sock")))


def test_refusals_and_failures_leave_no_descriptor(
    served: Served, make: Callable[..., Served], eventually: Callable[..., None], open_descriptors: Callable[[], int]
) -> None:
    guarded = make(PeerIdentity("server", 3, b"digest", b"k" * 32))

    def fail() -> None:
        mine, _ = share("test", SIZE)
        for me, place in (
            (PeerIdentity("client", 1, b"other"), served.both),
            (CLIENT, guarded.both),
            (PeerIdentity("client", 1, b"digest", b"o" * 32), guarded.both),
        ):
            with pytest.raises((HandshakeRefused, ConnectionError)):
                meet(place, me, memory=mine if place.unix_path else None)
        with pytest.raises(ConnectionError):
            meet(served.unix, expected="somebody", memory=mine)
        mine.close()
        for each in (served, guarded):
            eventually(lambda each=each: each.server.num_connections == 0)

    fail()
    served.wait_for(lambda: len(served.greetings) == 1)
    served.greetings.pop().drop_memory()
    before = open_descriptors()
    fail()
    served.wait_for(lambda: len(served.greetings) == 1)
    served.greetings.pop().drop_memory()
    assert open_descriptors() <= before


def test_a_server_without_room_says_so_where_it_may_be_anybody(make: Callable[..., Served]) -> None:
    for key in (b"", b"k" * 32):
        served = make(PeerIdentity("server", 3, b"digest", key), room=1)
        me = PeerIdentity("client", 1, b"digest", key)
        link, greeting = meet(served.unix, me)
        greeting.drop_memory()
        served.wait_for(lambda served=served: served.greetings)  # type: ignore[misc]
        with pytest.raises((HandshakeRefused, LinkClosed, ConnectionError)) as turned_away:
            meet(served.unix, me)
        assert isinstance(turned_away.value, HandshakeRefused) == (not key)
        link.close()


def test_a_stopped_server_ends_its_connections_and_may_be_stopped_again(served: Served) -> None:
    link, greeting = meet(served.unix)
    greeting.drop_memory()
    served.server.stop()
    served.server.stop()
    with pytest.raises(LinkClosed):
        link.receive(DEADLINE_S)
    link.close()
    assert served.server.num_connections == 0
    assert not Path(served.unix.unix_path).exists()


def test_a_server_that_gets_no_thread_goes_on_listening(
    served: Served, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(ConnectionError):
            meet(served.tcp)
    link, _ = meet(served.tcp)
    link.close()
    eventually(lambda: served.server.num_connections == 0)


def test_a_socket_file_in_use_is_not_taken_over_and_a_dead_one_is_replaced(make: Callable[..., Served]) -> None:
    served = make()
    path = Path(served.unix.unix_path)
    rival = Server(path, None, NOTES, PATIENCE, key=b"", max_connections=1, serve=lambda link: None)
    with pytest.raises(OSError, match=r"s\.sock") as error:
        rival.start()
    assert error.value.filename == str(path)
    rival.stop()
    assert path.is_socket()
    served.server.stop()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    heir = Server(path, None, NOTES, PATIENCE, key=b"", max_connections=1, serve=lambda link: None)
    heir.start()
    heir.stop()
    assert not path.exists()
    with pytest.raises(ValueError, match="no address"):
        Server(None, None, NOTES, PATIENCE, key=b"", max_connections=1, serve=lambda link: None)
