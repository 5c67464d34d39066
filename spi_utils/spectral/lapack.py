"""Eigenvalues of symmetric matrices by LAPACK's ?syevd, in place, in either precision, without Python's lock.

numpy computes float32 eigenvalues in float64, scipy keeps the GIL while LAPACK works, torch's MKL is slower
on AMD. scipy publishes its LAPACK for Cython (`scipy.linalg.cython_lapack`); called through ctypes, which
frees the GIL, it has none of these: layers in threads of one process really run side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.linalg import cython_lapack

ROUTINES = {np.dtype(np.float64): "dsyevd", np.dtype(np.float32): "ssyevd"}


def symmetric_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Eigenvalues, ascending, of a symmetric C-contiguous matrix (n, n), or of a stack (b, n, n) of them.

    Args:
        matrix: float32 or float64; **overwritten**. Only one triangle is read.

    Raises:
        numpy.linalg.LinAlgError: no convergence.
        ValueError: another dtype, shape or memory layout.
    """
    square = matrix.ndim in (2, 3) and matrix.shape[-1] == matrix.shape[-2]
    if matrix.dtype not in ROUTINES or not square or not matrix.flags.c_contiguous:
        raise ValueError(
            f"expected C-contiguous float32 or float64 squares, got {matrix.dtype} {matrix.shape}"
        )
    if matrix.ndim == 3:
        return np.array([symmetric_eigenvalues(one) for one in matrix], matrix.dtype).reshape(
            matrix.shape[:2]
        )
    count = matrix.shape[0]
    values = np.empty(count, matrix.dtype)
    sizes = np.empty(1, matrix.dtype), np.empty(1, np.int32)
    _syevd(matrix, values, *sizes, query=True)
    _syevd(matrix, values, np.empty(int(sizes[0][0]), matrix.dtype), np.empty(int(sizes[1][0]), np.int32))
    return values


def _syevd(
    matrix: np.ndarray, values: np.ndarray, work: np.ndarray, integers: np.ndarray, *, query: bool = False
) -> None:
    """One call of ?syevd for eigenvalues only; a query asks for the sizes of `work` and `integers`."""
    order, info = ctypes.c_int(len(values)), ctypes.c_int(0)
    room = [ctypes.c_int(-1 if query else len(array)) for array in (work, integers)]
    _routine(ROUTINES[matrix.dtype])(
        *(b"N", b"L", ctypes.byref(order), matrix.ctypes.data, ctypes.byref(order), values.ctypes.data),
        *(work.ctypes.data, ctypes.byref(room[0]), integers.ctypes.data, ctypes.byref(room[1])),
        ctypes.byref(info),
    )
    if info.value:
        raise np.linalg.LinAlgError(f"{ROUTINES[matrix.dtype]} returned info = {info.value}")


@cache
def _routine(name: str) -> Callable[..., None]:
    """A LAPACK routine as scipy hands it to Cython: a capsule whose name is the function's C signature."""
    capsule = cython_lapack.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    text, pointer = [ctypes.c_char_p], ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, *text * 2, *[pointer] * 9)(address)
