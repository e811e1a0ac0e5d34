"""The structures that Python and a compiled module share: cpp/runtime.h has the same in C++."""

import ctypes


class Index3(ctypes.Structure):
    """Of a block or of a thread."""

    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))

    def __str__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class Failure(ctypes.Structure):
    """Why a launch ended early."""

    _fields_ = (
        ("message", ctypes.c_char * 512),
        ("site", ctypes.c_uint64),
        ("other_site", ctypes.c_uint64),
        ("line", ctypes.c_int32),
        ("block", Index3),
        ("thread", Index3),
    )


class Buffer(ctypes.Structure):
    """Memory that a kernel may touch."""

    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("label", ctypes.c_char_p),
    )


class Launch(ctypes.Structure):
    """All that a launch depends on, the kernel aside."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("schedule", ctypes.c_uint32),
        ("buffer_count", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(Buffer)),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


class Parameter(ctypes.Structure):
    """What a kernel expects at one place."""

    _fields_ = (
        ("kind", ctypes.c_char),
        ("pointee", ctypes.c_char),
        ("size", ctypes.c_uint32),
        ("pointee_size", ctypes.c_uint32),
    )


class KernelRecord(ctypes.Structure):
    """One kernel of a module, in a linked list."""


KernelRecord._fields_ = (
    ("name", ctypes.c_char_p),
    ("call", ctypes.c_void_p),
    ("parameters", ctypes.POINTER(Parameter)),
    ("parameter_count", ctypes.c_uint32),
    ("max_threads", ctypes.c_uint32),
    ("next", ctypes.POINTER(KernelRecord)),
)
