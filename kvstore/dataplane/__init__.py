"""How bytes get in and out of a node: workers of its host, and other nodes.

    worker ── client.RemoteHomeNode ──unix socket + mapped arena──┐
    node ──── peer_reader.SocketPeerReader ──the same, TCP, NIXL──┴── server.DataServer ── Connection ── KvNode

`protocol.py` has the frames; header, handshake and sockets are those of `wire/`. `windows.py` and `nixl.py` are the
reads that need no byte on a socket. Threads and blocking sockets throughout.
"""
