"""The native module, as far as it joins ranks; importing this where it was not built says so."""

from headrace.errors import BackendUnavailable

try:
    from headrace import _native
except ImportError as error:
    raise BackendUnavailable(f"ranks on CPUs exchange tensors through the native module, but {error}") from error

__all__ = ["_native"]
