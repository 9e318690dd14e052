"""Ranks that `mpiexec` or `srun` has started, which exchange tensors through MPI.

mpi4py finds and starts the library; messages go from native code to its functions directly, with neither Python nor
mpi4py in between.
"""

import atexit
import ctypes
from typing import Any

from headrace.errors import BackendUnavailable
from headrace.parallel.native import _native

_FUNCTIONS = {
    "isend": "MPI_Isend",
    "irecv": "MPI_Irecv",
    "test": "MPI_Test",
    "iprobe": "MPI_Iprobe",
    "get_count": "MPI_Get_count",
    "cancel": "MPI_Cancel",
    "error_string": "MPI_Error_string",
}


def make_communicator() -> _native.Communicator:
    """This process's end of MPI's world; rank and world_size are MPI's. All ranks call this, once.

    It starts MPI if nobody has. The communicator is private to Headrace: messages of the program's own do not meet it.

    Raises:
        BackendUnavailable: there is no mpi4py, no MPI library, or one that cannot serve several threads.
    """
    mpi = import_mpi()
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise BackendUnavailable(
            "MPI was started without MPI_THREAD_MULTIPLE; let Headrace or mpi4py start it, "
            "or ask for that level in the program that does"
        )
    world = mpi.COMM_WORLD.Dup()
    world.Set_errhandler(mpi.ERRORS_RETURN)
    communicator = _native.Communicator.over_mpi(_library(mpi, world), world.Get_rank(), world.Get_size())
    # Messages under way leave before mpi4py ends MPI, which it does after Python's own exit handlers.
    atexit.register(communicator.close)
    return communicator


def import_mpi() -> Any:
    """mpi4py's module, with MPI started.

    Not by mpi4py, which holds the interpreter's lock until all ranks have come: no other thread could give up on them.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailable(
            f"ranks of mpiexec and srun need mpi4py and an MPI library (pip install mpi4py mpich): {error}"
        ) from error
    if not MPI.Is_initialized():
        _start(MPI)
    return MPI


def _start(mpi: Any) -> None:
    provided = ctypes.c_int()
    loaded = ctypes.CDLL(mpi.__file__)
    if loaded.MPI_Init_thread(None, None, ctypes.c_int(mpi.THREAD_MULTIPLE), ctypes.byref(provided)):
        raise BackendUnavailable("MPI does not start; does a small program of its own run under this launcher?")
    mpi.COMM_WORLD.Set_errhandler(mpi.ERRORS_RETURN)  # as mpi4py would have
    atexit.register(_end, mpi)


def _end(mpi: Any) -> None:
    if not mpi.Is_finalized():
        mpi.Finalize()


def _library(mpi: Any, world: Any) -> _native.MpiLibrary:
    """The functions of the library that mpi4py has loaded: found through the module that is linked against it."""
    library = _native.MpiLibrary()
    loaded = ctypes.CDLL(mpi.__file__)
    for field, name in _FUNCTIONS.items():
        if (function := getattr(loaded, name, None)) is None:
            raise BackendUnavailable(f"the MPI library that mpi4py has loaded has no {name}")
        setattr(library, field, ctypes.cast(function, ctypes.c_void_p).value)
    sizes = {mpi._sizeof(kind) for kind in (mpi.Comm, mpi.Datatype, mpi.Request)}
    if len(sizes) != 1:
        raise BackendUnavailable(f"MPI's handles differ in size, which no known library's do: {sorted(sizes)} bytes")
    library.handle_bytes = sizes.pop()
    library.status_bytes = mpi._sizeof(mpi.Status)
    library.communicator = mpi._handleof(world)
    library.byte_type = mpi._handleof(mpi.BYTE)
    return library
