"""HTTP servers out of order, on real sockets: each connection is answered by one function that may write anything."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


@contextlib.contextmanager
def answering(write):
    """The address of a server that calls `write(connection)` once a request's head and announced body are read."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            if _read_request(connection):
                write(connection)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _read_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < lengths[0]:
        body += connection.recv(65536)
    return head


def fixed(body, head=b""):
    """Answers with a body, its length announced, and that the connection ends behind it."""
    return lambda connection: connection.sendall(
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n%s\r\n" % (len(body), head) + body
    )


def dripping_head(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X")
        time.sleep(0.05)


def dripping_body(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


def endless_interim_answers(connection):
    while True:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        time.sleep(0.01)


def endless_head(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Long: " + b"x" * 1000 + b"\r\n")


def endless_body(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


# All that must end in time and in bounds, whoever asks.
UNBOUNDED = {
    function.__name__: function
    for function in (dripping_head, dripping_body, endless_interim_answers, endless_head, endless_body)
}
