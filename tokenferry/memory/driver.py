"""The few calls of the CUDA driver behind the sharing of ordinary allocations, by ctypes.

The library is loaded when a :class:`Driver` is made: importing this module costs nothing and needs no GPU.

Every call acts on the current context of the calling thread, which any use of the device through torch sets up.
A driver that cannot answer at all (no context, an earlier kernel failed) raises; it never looks like memory
that is gone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

from tokenferry.errors import HeapError

HANDLE_BYTES = 64
"""Bytes of the handle by which another process opens an allocation."""

_LIBRARY = "libcuda.so.1"
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_CAPTURE_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_NO_SUCH_MEMORY = (1, 500)  # CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_FOUND


class Allocation(NamedTuple):
    """One allocation of device memory of this process."""

    base: int
    size: int
    identity: int
    """The driver's buffer id: never given twice in the life of a process, other than the address."""


class DriverCalls(Protocol):
    """What is asked of the driver."""

    def locate(self, address: int) -> Allocation | None:
        """The allocation that an address lies in; None for memory that the driver does not know."""

    def identity(self, address: int) -> int | None:
        """The identity of the allocation that an address lies in; None for memory that the driver does not know."""

    def export(self, base: int) -> bytes | None:
        """A handle by which other processes open an allocation; None where the driver refuses."""

    def open_peer(self, handle: bytes) -> int:
        """Map an allocation of another process and return its base here, or raise HeapError."""

    def close_peer(self, address: int) -> None:
        """Undo one :meth:`open_peer`, or raise HeapError."""

    def relaxed_capture(self) -> AbstractContextManager[None]:
        """Allow all of these calls while this thread, or another, captures a CUDA graph."""

    def capture(self, stream: int) -> int | None:
        """The number of the capture that a stream takes part in; None if it is in none, or nobody tells."""

    def copy_aside(self, to: int, source: int, nbytes: int) -> None:
        """Copy pinned memory to the device beside all that is queued, and wait for that copy alone."""

    def end_aside(self) -> None:
        """Let go of what such copies need, if there were any."""


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class Driver:
    """The driver of this process.

    Not thread safe (results pass through memory that is allocated once): used under its owner's lock.

    Raises:
        HeapError: there is no CUDA driver.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise HeapError(f"cannot load the CUDA driver: {error}") from error
        address, status = ctypes.c_uint64, ctypes.c_int
        library.cuGetErrorName.argtypes = [status, ctypes.POINTER(ctypes.c_char_p)]
        library.cuPointerGetAttribute.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_int, address]
        library.cuMemGetAddressRange_v2.argtypes = [
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.POINTER(ctypes.c_size_t),
            address,
        ]
        library.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_IpcHandle), address]
        library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint]
        library.cuIpcCloseMemHandle.argtypes = [address]
        library.cuThreadExchangeStreamCaptureMode.argtypes = [ctypes.POINTER(ctypes.c_int)]
        library.cuStreamCreate.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint]
        library.cuStreamCreateWithPriority.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_int]
        library.cuMemcpyHtoDAsync_v2.argtypes = [address, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        library.cuStreamSynchronize.argtypes = [ctypes.c_void_p]
        library.cuStreamDestroy_v2.argtypes = [ctypes.c_void_p]
        self._aside = ctypes.c_void_p()
        self._library = library
        self._pointer_attribute = library.cuPointerGetAttribute
        self._identity = ctypes.c_uint64()
        self._identity_out = ctypes.pointer(self._identity)
        self._check("cuInit", library.cuInit(0))

    def _check(self, call: str, status: int) -> None:
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            known = name.value.decode() if name.value else "unknown error"
            raise HeapError(f"{call}: {known} ({status})")

    def locate(self, address: int) -> Allocation | None:
        """The allocation that an address lies in; None for memory that the driver does not know.

        Raises:
            HeapError: the driver cannot answer.
        """
        identity = self.identity(address)
        if identity is None:
            return None
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        status = self._library.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
        if status in _NO_SUCH_MEMORY:
            return None
        self._check("cuMemGetAddressRange", status)
        return Allocation(base.value, size.value, identity)

    def identity(self, address: int) -> int | None:
        """The identity of the allocation that an address lies in; None for memory that the driver does not know.

        Raises:
            HeapError: the driver cannot answer.
        """
        status = self._pointer_attribute(self._identity_out, _BUFFER_ID, address)
        if status:
            if status in _NO_SUCH_MEMORY:
                return None
            self._check("cuPointerGetAttribute", status)
        return self._identity.value

    def export(self, base: int) -> bytes | None:
        """A handle by which other processes open an allocation.

        Returns:
            64 bytes, or None where the driver refuses (as for memory of expandable segments).
        """
        handle = _IpcHandle()
        if self._library.cuIpcGetMemHandle(ctypes.byref(handle), base):
            return None
        return bytes(handle)

    def open_peer(self, handle: bytes) -> int:
        """Map an allocation of another process: milliseconds.

        Returns:
            The address of its first byte in this process.

        Raises:
            HeapError: the driver refuses; the message has its reason.
        """
        address = ctypes.c_uint64()
        status = self._library.cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
        )
        self._check("cuIpcOpenMemHandle", status)
        return address.value

    def close_peer(self, address: int) -> None:
        """Undo one :meth:`open_peer`.

        Raises:
            HeapError: the driver refuses; the message has its reason.
        """
        self._check("cuIpcCloseMemHandle", self._library.cuIpcCloseMemHandle(address))

    def capture(self, stream: int) -> int | None:
        """The number of the capture that a stream takes part in; None if it is in none, or nobody tells."""
        ask = getattr(self._library, "cuStreamGetCaptureInfo_v2", None)
        if ask is None:
            return None
        state, number, none = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
        failed = ask(ctypes.c_void_p(stream), ctypes.byref(state), ctypes.byref(number), none, none, none)
        return None if failed or state.value != _CAPTURE_ACTIVE else number.value

    def copy_aside(self, to: int, source: int, nbytes: int) -> None:
        """Copy pinned memory to the device beside all that is queued, and wait for that copy alone.

        On a stream of its own: one of torch's may be somebody's who captures a graph on it.

        Raises:
            HeapError: the driver refuses; the message has its reason.
        """
        library = self._library
        if not self._aside:
            self._check("cuStreamCreate", library.cuStreamCreate(ctypes.byref(self._aside), _NON_BLOCKING))
        self._check("cuMemcpyHtoDAsync", library.cuMemcpyHtoDAsync_v2(to, source, nbytes, self._aside))
        self._check("cuStreamSynchronize", library.cuStreamSynchronize(self._aside))

    def make_stream(self, priority: int) -> int:
        """The address of a stream that nobody else has, and that lives as long as the process.

        Raises:
            HeapError: the driver refuses; the message has its reason.
        """
        stream = ctypes.c_void_p()
        made = self._library.cuStreamCreateWithPriority(ctypes.byref(stream), _NON_BLOCKING, priority)
        self._check("cuStreamCreateWithPriority", made)
        return stream.value or 0

    def end_aside(self) -> None:
        """Let go of what such copies need, if there were any."""
        stream, self._aside = self._aside, ctypes.c_void_p()
        if stream:
            self._library.cuStreamDestroy_v2(stream)  # a device that has failed has none any more

    @contextmanager
    def relaxed_capture(self) -> Iterator[None]:
        """Allow all of these calls while this thread, or another, captures a CUDA graph."""
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        exchange = self._library.cuThreadExchangeStreamCaptureMode
        self._check("cuThreadExchangeStreamCaptureMode", exchange(ctypes.byref(mode)))
        try:
            yield
        finally:
            exchange(ctypes.byref(mode))  # mode has been the thread's own one since the first exchange
