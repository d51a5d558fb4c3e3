"""An internet of our own: a name server and a web server, behind a wire.

::

    namespace home                       namespace internet
      HOST  --------- a pair of veth ---------  SERVER
      a default route that leads there          DNS, HTTP

The server under test is at home. So what it does to reach the world is what it does anywhere, and
the machine that the tests run on may have no network at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import socket
import socketserver
import struct
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.guest.rig.namespaces import Namespace, Place
from tests.support.patience import PATIENCE

HOST, SERVER = "10.99.0.1", "10.99.0.2"
NAME = "www.rig.example"
"""What :data:`SERVER` is called; nothing else has a name."""
PAGE = hashlib.sha256(b"page").digest() * 4096
"""What the web server has to say."""
STREAM_PORT = 4000
"""Where streams come back from."""
IPERF_PORT = 5201

_DNS_HEADER = struct.Struct(">HHHHHH")
_A = b"\x00\x01\x00\x01"


def dns_answer(query: bytes) -> bytes:
    """Return the answer to a query of one question: the address of :data:`NAME`, or none.

    Names are compared as they are in the message; its case, which resolvers play with, is ignored.
    """
    number, flags, *_ = _DNS_HEADER.unpack_from(query)
    end = query.index(b"\0", _DNS_HEADER.size) + 5
    question = query[_DNS_HEADER.size : end]
    name = b"".join(bytes((len(each),)) + each.encode() for each in NAME.split("."))
    known = question[:-5].lower() == name
    records = b""
    if known and question.endswith(_A):
        address = socket.inet_aton(SERVER)
        records = b"\xc0\x0c" + _A + struct.pack(">IH", 60, len(address)) + address
    # An answer, with authority, to whoever wants recursion; 3: no such name.
    code = 0x8400 | flags & 0x0100 | (0 if known else 3)
    return _DNS_HEADER.pack(number, code, 1, bool(records), 0, 0) + question + records


class _Names(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(dns_answer(data), self.client_address)


class _Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def do_POST(self) -> None:
        """Say what the SHA-256 is of what somebody sends."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(data).hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(digest)))
        self.end_headers()
        self.wfile.write(digest)

    def log_message(self, *_said: object) -> None:
        """Nobody reads it."""


class _Streams(socketserver.BaseRequestHandler):
    """Takes a stream to its end, and gives it back."""

    def handle(self) -> None:
        data = b"".join(iter(lambda: self.request.recv(1 << 16), b""))
        self.request.sendall(data)


class _NameServer(socketserver.ThreadingUDPServer):
    daemon_threads = True


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def _serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def streams(namespace: Namespace) -> Iterator[None]:
    """Give streams back at :data:`STREAM_PORT` of a namespace, over IPv4 and IPv6."""
    with namespace.inside():
        server = _Server6(("::", STREAM_PORT), _Streams)
    with _serving(server):
        yield


class Internet:
    """See above; use :func:`open_internet`."""

    def __init__(self, home: Namespace, there: Namespace, place: Place) -> None:
        self.home = home
        self.there = there
        self.place = place
        """Home, for programs that look names up."""

    def fetch(self, url: str) -> bytes:
        """Return what a web server has to say to somebody out there."""
        with self.there.inside(), urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            data: bytes = answer.read()
        return data


@contextlib.contextmanager
def open_internet(folder: Path) -> Iterator[Internet]:
    """Make it for the length of a ``with`` block. Raises RigError.

    Args:
        folder: For a file.
    """
    resolv_conf = folder / "resolv.conf"
    resolv_conf.write_text(f"nameserver {SERVER}\n")
    with contextlib.ExitStack() as stack:
        home, there = (
            stack.enter_context(contextlib.closing(Namespace(f"rig{os.getpid()}-{name}")))
            for name in ("home", "there")
        )
        home.ip(
            f"link add wan type veth peer name wan netns {there.name}",
            f"addr add {HOST}/24 dev wan",
            "link set wan up",
        )
        there.ip(f"addr add {SERVER}/24 dev wan", "link set wan up")
        home.ip(f"route add default via {SERVER}")
        with home.inside():
            # As on any machine with systemd: whoever likes may ping.
            Path("/proc/sys/net/ipv4/ping_group_range").write_text(f"0 {2**31 - 1}")
        with there.inside():
            servers: list[socketserver.BaseServer] = [
                _NameServer((SERVER, 53), _Names),
                http.server.ThreadingHTTPServer((SERVER, 80), _Pages),
            ]
        for server in servers:
            stack.enter_context(_serving(server))
        yield Internet(home, there, Place(home.name, str(resolv_conf)))
