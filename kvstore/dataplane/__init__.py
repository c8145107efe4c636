"""How bytes get in and out of a node: workers of its host, and other nodes.

    worker ── client.RemoteHomeNode ──unix socket + mapped arena──┐
    node ──── peer_reader.SocketPeerReader ──the same, TCP, NIXL──┴── server.DataServer ── session.Session ── KvNode

`protocol.py` has the frames, `auth.py` the handshake, `link.py` the socket, `windows.py` and `nixl.py` the reads
that need none. Threads and blocking sockets throughout.
"""
