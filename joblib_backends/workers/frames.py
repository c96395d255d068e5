"""Messages on a worker's socket: a kind, a length, that many bytes.

The worker's end blocks: it has nothing else to do. The parent's end never does: :class:`FrameReader` takes what is
there and keeps the rest of a frame for the next time.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

__all__ = ["BATCH", "ERROR", "HELLO", "PREPARE", "RESULT", "FrameReader", "pack", "receive", "send"]

#: Parent to worker: be like the parent (``preparation.py``); run this.
PREPARE: Final = b"P"
BATCH: Final = b"B"
#: Worker to parent: my loop runs; what came out; what the loop itself could not do.
HELLO: Final = b"H"
RESULT: Final = b"R"
ERROR: Final = b"E"

_HEADER: Final = struct.Struct("<cQ")

#: Bytes to ask of the kernel at once: what a Unix socket holds by default is 208 KiB.
_CHUNK: Final = 256 * 1024

#: Bytes to read from one worker before the others get their turn: 10 ms of a large result.
_TURN: Final = 8 * 1024 * 1024

#: Below this a header and its body are joined, which is faster than to hand the kernel two buffers.
_JOINED_BELOW: Final = 64 * 1024

Frame = tuple[bytes, bytes | bytearray]


def pack(kind: bytes, body: bytes) -> list[bytes]:
    """Return the pieces of a frame, to be written in order."""
    header = _HEADER.pack(kind, len(body))
    return [header + body] if len(body) < _JOINED_BELOW else [header, body]


def send(sock: socket.socket, kind: bytes, body: bytes) -> None:
    """Write a whole frame to a socket that blocks."""
    for piece in pack(kind, body):
        sock.sendall(piece)


def receive(sock: socket.socket) -> Frame | None:
    """Read a whole frame from a socket that blocks; None at its end, which is also the parent's."""
    header = _receive_exactly(sock, _HEADER.size)
    if header is None:
        return None
    kind, length = _HEADER.unpack(header)
    body = _receive_exactly(sock, length)
    return None if body is None else (kind, body)


def _receive_exactly(sock: socket.socket, length: int) -> bytes | bytearray | None:
    try:
        if length <= _CHUNK:
            data = sock.recv(length, socket.MSG_WAITALL) if length else b""
            if len(data) == length:
                return data
        else:
            data = b""
        # Large, or a signal came in between: the rest goes to its place at once.
        whole = bytearray(length)
        whole[: len(data)] = data
        view, got = memoryview(whole), len(data)
        while got < length:
            n = sock.recv_into(view[got:])
            if not n:
                return None
            got += n
        return whole
    except ConnectionError:
        return None


class FrameReader:
    """Puts frames together from what a socket that does not block has. Used by one thread."""

    def __init__(self) -> None:
        self._start = b""
        self._kind = b""
        self._body: bytearray | None = None
        self._got = 0
        #: Whether the last ``read`` left bytes that were there already.
        self.has_more = False
        #: Whether the other side died before it had read all that was sent to it.
        self.was_reset = False

    def read(self, sock: socket.socket) -> tuple[list[Frame], bool]:
        """Return the frames that are complete, and whether the other side is gone."""
        frames: list[Frame] = []
        taken = 0
        self.has_more = True
        while taken < _TURN:
            try:
                n, wanted = self._take(sock, frames)
            except BlockingIOError:
                self.has_more = False
                break
            except OSError:
                self.was_reset = True
                return frames, True
            if not n:
                return frames, True
            if n < wanted:
                self.has_more = False
                break
            taken += n
        return frames, False

    def _take(self, sock: socket.socket, frames: list[Frame]) -> tuple[int, int]:
        if self._body is not None:
            # A frame larger than one read: its bytes go where they belong.
            wanted = len(self._body) - self._got
            n = sock.recv_into(memoryview(self._body)[self._got :])
            self._got += n
            if self._got == len(self._body):
                frames.append((self._kind, self._body))
                self._body = None
            return n, wanted
        data = sock.recv(_CHUNK)
        self._split(self._start + data if self._start else data, frames)
        return len(data), _CHUNK

    def _split(self, data: bytes, frames: list[Frame]) -> None:
        at = 0
        while len(data) - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(data, at)
            body = data[at + _HEADER.size : at + _HEADER.size + length]
            if len(body) < length:
                self._kind, self._body, self._got = kind, bytearray(length), len(body)
                self._body[: len(body)] = body
                self._start = b""
                return
            frames.append((kind, body))
            at += _HEADER.size + length
        self._start = data[at:]
