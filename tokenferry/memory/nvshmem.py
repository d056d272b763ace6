"""NVSHMEM by ctypes, as a package brings it that CUDA builds of torch depend on.

It is initialised once in a process, by ranks that stay its members until the process ends, and memory is allocated by
all of them together.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from tokenferry.errors import TokenferryError

PACKAGE = "nvidia-nvshmem-cu13"
LIBRARY_VARIABLE = "NVSHMEM_LIB_DIR"
"""The folder of the library, as torch reads it."""
_HOST, _DEVICE = "libnvshmem_host.so.3", "libnvshmem_device.bc"
_WITH_UNIQUE_ID = 1 << 3  # NVSHMEMX_INIT_WITH_UNIQUEID
_IS_INITIALISED = 2  # NVSHMEM_STATUS_IS_INITIALIZED; more: likewise, and GPUs are shared
_FIRST_VERSION = 1 << 16
"""Of every structure, beside its size."""


class Files(NamedTuple):
    """Where NVSHMEM lies."""

    host: Path
    """A shared library."""
    device: Path
    """LLVM bitcode that kernels are linked with."""


class Library(Protocol):
    """What is asked of NVSHMEM. Ranks are those that have joined."""

    def is_initialised(self) -> bool:
        """Whether this process has joined already, whoever in it has done that."""

    def unique_id(self) -> bytes:
        """What all ranks join by."""

    def join(self, rank: int, num_ranks: int, unique_id: bytes) -> None:
        """Initialise, with the current device; returns when all ranks have come."""

    def allocate(self, nbytes: int) -> int:
        """The address of new symmetric memory; called by all ranks."""

    def prepare(self, module: int) -> None:
        """Let the kernels of a module that has been loaded call NVSHMEM."""


def find() -> Files | None:
    """Where NVSHMEM lies, if it is there: in ``NVSHMEM_LIB_DIR``, among Python's packages, in the usual folders."""
    given = os.environ.get(LIBRARY_VARIABLE)
    folders = [Path(given)] if given else []
    if importlib.util.find_spec("nvidia") and (package := importlib.util.find_spec("nvidia.nvshmem")):
        folders += [Path(folder, "lib") for folder in package.submodule_search_locations or ()]
    folders += [Path("/usr/local/lib"), Path("/usr/lib"), Path("/opt/nvidia/nvshmem/lib")]
    for folder in folders:
        files = Files(folder / _HOST, folder / _DEVICE)
        if files.host.exists() and files.device.exists():
            return files
    return None


class _UniqueId(ctypes.Structure):
    _fields_ = [("version", ctypes.c_int), ("internal", ctypes.c_char * 124)]


class _UniqueIdArguments(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int),
        ("id", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("num_ranks", ctypes.c_int),
    ]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int),
        ("unique_id", _UniqueIdArguments),
        ("rest", ctypes.c_char * 96),
    ]


class _Attributes(ctypes.Structure):
    _fields_ = [("version", ctypes.c_int), ("mpi", ctypes.c_void_p), ("arguments", _Arguments)]


def _version_of(structure: type[ctypes.Structure]) -> int:
    return _FIRST_VERSION + ctypes.sizeof(structure)


class Nvshmem:
    """See :class:`Library`.

    Raises:
        TokenferryError: it cannot be loaded.
    """

    def __init__(self, files: Files) -> None:
        try:
            library = ctypes.CDLL(str(files.host))
        except OSError as error:
            raise TokenferryError(f"cannot load NVSHMEM: {error}") from error
        library.nvshmemx_get_uniqueid.argtypes = [ctypes.POINTER(_UniqueId)]
        library.nvshmemx_set_attr_uniqueid_args.argtypes = [
            ctypes.c_int, ctypes.c_int, ctypes.POINTER(_UniqueId), ctypes.POINTER(_Attributes),
        ]  # fmt: skip
        library.nvshmemx_hostlib_init_attr.argtypes = [ctypes.c_uint, ctypes.POINTER(_Attributes)]
        library.nvshmem_malloc.argtypes = [ctypes.c_size_t]
        library.nvshmem_malloc.restype = ctypes.c_void_p
        library.nvshmemx_cumodule_init.argtypes = [ctypes.c_void_p]
        self._library = library

    @staticmethod
    def _check(call: str, status: int) -> None:
        if status:
            raise TokenferryError(f"{call} of NVSHMEM failed ({status}); NVSHMEM_DEBUG=INFO tells more")

    def is_initialised(self) -> bool:
        """See :meth:`Library.is_initialised`."""
        return int(self._library.nvshmemx_init_status()) >= _IS_INITIALISED

    def unique_id(self) -> bytes:
        """See :meth:`Library.unique_id`."""
        made = _UniqueId(_version_of(_UniqueId))
        self._check("nvshmemx_get_uniqueid", self._library.nvshmemx_get_uniqueid(ctypes.byref(made)))
        return bytes(made)

    def join(self, rank: int, num_ranks: int, unique_id: bytes) -> None:
        """See :meth:`Library.join`."""
        library, given = self._library, _UniqueId.from_buffer_copy(unique_id)
        attributes = _Attributes(_version_of(_Attributes))
        attributes.arguments.version = _version_of(_Arguments)
        attributes.arguments.unique_id.version = _version_of(_UniqueIdArguments)
        status = library.nvshmemx_set_attr_uniqueid_args(
            rank, num_ranks, ctypes.byref(given), ctypes.byref(attributes)
        )
        self._check("nvshmemx_set_attr_uniqueid_args", status)
        status = library.nvshmemx_hostlib_init_attr(_WITH_UNIQUE_ID, ctypes.byref(attributes))
        self._check("nvshmemx_hostlib_init_attr", status)
        joined = library.nvshmem_my_pe(), library.nvshmem_n_pes()
        if joined != (rank, num_ranks):
            raise TokenferryError(f"NVSHMEM has joined as (rank, ranks) {joined}, not as {(rank, num_ranks)}")

    def allocate(self, nbytes: int) -> int:
        """See :meth:`Library.allocate`."""
        address = self._library.nvshmem_malloc(nbytes)
        if not address:
            raise TokenferryError(
                f"NVSHMEM has not {nbytes} bytes; NVSHMEM_SYMMETRIC_SIZE says how many it has in all"
            )
        return int(address)

    def prepare(self, module: int) -> None:
        """See :meth:`Library.prepare`."""
        self._check("nvshmemx_cumodule_init", self._library.nvshmemx_cumodule_init(module))
