"""What begins a connection between sockets where there is a secret: both ends prove that they know it.

    client                                server
    mark, nonce                     ->
                                    <-    nonce
    proof of the client             ->
                                    <-    proof of the server

A proof is HMAC-SHA256 over the role and both nonces, with a key for this kind of connection: a recorded one is of no
use, and neither side's proof can be sent back as the other's. Until the client has proved itself it learns nothing, not
even that there is a node. What follows is not encrypted, and somebody on the way can take a connection over once it is
open: TCP belongs inside a trusted network.
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import time

_MARK = b"TDMSEC1\n"
_NONCE_BYTES = 64
"""More bytes, with the mark, than a header of either protocol: who has no secret sees at once that it is none, and
hangs up."""
_PROOF_BYTES = 32


class Unproven(ConnectionError):
    """The two do not know the same secret; the message says what this side knows of the other."""


def prove(sock: socket.socket, key: bytes, timeout_s: float) -> None:
    """The client's half. Raises Unproven, other OSError."""
    deadline = time.monotonic() + timeout_s
    mine = os.urandom(_NONCE_BYTES)
    sock.sendall(_MARK + mine)
    theirs = _read(
        sock,
        _NONCE_BYTES,
        deadline,
        "it hung up at once: it may have no secret, while this process has one, or no room",
    )
    sock.sendall(_proof(key, b"client", mine, theirs))
    answer = _read(sock, _PROOF_BYTES, deadline, "it has another secret: give both the same secret_file")
    if not hmac.compare_digest(answer, _proof(key, b"server", mine, theirs)):
        raise Unproven("it has another secret: give both the same secret_file")


def demand(sock: socket.socket, key: bytes, timeout_s: float) -> None:
    """The server's half. Says nothing to those who do not know the secret. Raises Unproven, other OSError."""
    deadline = time.monotonic() + timeout_s
    silent = "it hung up before it proved anything"
    # Byte for byte as far as it goes: who has no secret may have sent less than this and waits for an answer.
    if _read(sock, len(_MARK), deadline, silent) != _MARK:
        raise Unproven("it proves no secret: give both the same secret_file")
    theirs = _read(sock, _NONCE_BYTES, deadline, silent)
    mine = os.urandom(_NONCE_BYTES)
    sock.sendall(mine)
    if not hmac.compare_digest(_read(sock, _PROOF_BYTES, deadline, silent), _proof(key, b"client", theirs, mine)):
        raise Unproven("it has another secret: give both the same secret_file")
    sock.sendall(_proof(key, b"server", theirs, mine))


def _proof(key: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hmac.digest(key, role + client_nonce + server_nonce, "sha256")


def _read(sock: socket.socket, length: int, deadline: float, hung_up: str) -> bytes:
    """Exactly `length` bytes, as what follows may come with a file descriptor."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    raw = b""
    while len(raw) < length:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError("the other side does not say whether it knows the secret")
        try:
            piece = sock.recv(length - len(raw))
        except BlockingIOError:
            continue
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise Unproven(hung_up)
        raw += piece
    return raw
