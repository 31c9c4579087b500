"""Length-prefixed frames on the socket between server and engine child.

Owns the byte layout (4-byte little-endian length, then the payload) and the limit on a frame's
size; knows nothing of what the frames say. Used by the server's event loop and by the child's
threads.
"""

import asyncio
import socket
import struct

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 * 1024 * 1024


class FrameError(Exception):
    """The peer sent a frame that breaks the layout."""


def frame(payload: bytes) -> bytes:
    """Return payload with its length in front."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"frame of {len(payload)} bytes is over {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Return the next frame, or None when the peer has closed the socket."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"peer announced a frame of {length} bytes")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive_frame(sock: socket.socket) -> bytes | None:
    """Block until the next frame and return it, or None when the peer has closed the socket."""
    head = _receive_exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"peer announced a frame of {length} bytes")
    return _receive_exactly(sock, length)


def _receive_exactly(sock: socket.socket, length: int) -> bytes | None:
    received = bytearray(length)
    view = memoryview(received)
    filled = 0
    while filled < length:
        try:
            count = sock.recv_into(view[filled:])
        except ConnectionError:
            return None
        if count == 0:
            return None
        filled += count
    return bytes(received)
