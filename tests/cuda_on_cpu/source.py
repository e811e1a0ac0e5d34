"""Makes a C++ translation unit of CUDA kernel text, changing as little of it as possible.

Headers do almost everything. Two things they cannot: declare a dynamic shared array, since
`extern __shared__` names memory of a size known at launch only, and find the kernels.
"""

import re
from typing import NamedTuple

from cuda_on_cpu.errors import CudaOnCpuError

# The name under which the text appears in error messages and debug information.
FILE_NAME = "kernel.cu"

_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_IDENTIFIER = re.compile(r"\s*([A-Za-z_]\w*)")
_QUALIFIER = r"(?:__align__\s*\([^()]*\)|alignas\s*\([^()]*\)|__shared__)"
_DYNAMIC_SHARED = re.compile(
    rf"\bextern\s+(?:{_QUALIFIER}\s*)+"
    r"(?P<type>[A-Za-z_][\w:]*(?:\s+[A-Za-z_][\w:]*)*?)\s+"
    r"(?P<name>[A-Za-z_]\w*)\s*\[\s*\]\s*;"
)
_EXTERN_SHARED = re.compile(r"\bextern\b[^;{}]*\b__shared__\b")


class KernelDeclaration(NamedTuple):
    """A kernel found in the text, and what stands between the parentheses of its launch bounds."""

    name: str
    launch_bounds: str


def numbered(source: str) -> str:
    """The text with line numbers, for messages about a compilation that failed."""
    lines = source.splitlines()
    width = len(str(len(lines)))
    return "\n".join(f"{number:>{width}} | {line}" for number, line in enumerate(lines, start=1))


def find_kernels(source: str) -> tuple[KernelDeclaration, ...]:
    """The kernels of the text, in order."""
    text = _without_comments(source)
    starts = [match.end() for match in re.finditer(r"\b__global__\b", text)]
    kernels = tuple(_declaration(text, start) for start in starts)
    if not kernels:
        raise CudaOnCpuError(
            'the source defines no kernel; expected `extern "C" __global__ void name(...)`\n'
            + numbered(source)
        )
    return kernels


def translation_unit(source: str, kernels: tuple[KernelDeclaration, ...]) -> str:
    """The text amid what it needs to compile and to be called.

    The anonymous namespace keeps its names from those of the C library, and lets it define types
    that the headers define too.
    """
    registrations = "\n".join(
        f"static const cuda_on_cpu::Registration<&{name}> cuda_on_cpu_registration_{name}("
        f'"{name}", cuda_on_cpu::launch_bound({launch_bounds}));'
        for name, launch_bounds in kernels
    )
    return "\n".join(
        [
            '#include "device.h"',
            "namespace cuda_device { namespace {",
            f'#line 1 "{FILE_NAME}"',
            _with_dynamic_shared(source),
            '#line 1 "registrations"',
            registrations,
            "} }",
            "",
        ]
    )


def _without_comments(source: str) -> str:
    def blank(match: re.Match[str]) -> str:
        text = match.group()
        return text if text.startswith('"') else " "

    return _COMMENT_OR_STRING.sub(blank, source)


def _declaration(text: str, position: int) -> KernelDeclaration:
    """Reads `[void] [__launch_bounds__(...)] [void] name(`, from behind `__global__`."""
    launch_bounds = ""
    while match := _IDENTIFIER.match(text, position):
        word = match.group(1)
        position = match.end()
        opening = re.compile(r"\s*\(").match(text, position)
        if opening is None:
            continue
        if word != "__launch_bounds__":
            return KernelDeclaration(word, launch_bounds)
        end = _closing_parenthesis(text, opening.end())
        launch_bounds = text[opening.end() : end]
        position = end + 1
    raise CudaOnCpuError(f"no kernel name follows __global__ in `{text[position : position + 60]}`")


def _closing_parenthesis(text: str, position: int) -> int:
    depth = 1
    for match in re.compile(r"[()]").finditer(text, position):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise CudaOnCpuError("the parentheses of __launch_bounds__ do not close")


def _with_dynamic_shared(source: str) -> str:
    """`extern __shared__ T x[];` becomes a pointer to the launch's dynamic shared memory."""

    def pointer(match: re.Match[str]) -> str:
        element, name = match["type"], match["name"]
        lines = "\n" * match.group().count("\n")
        return f"{element}* const {name} = ({element}*)cuda_on_cpu::dynamic_shared;{lines}"

    text = _DYNAMIC_SHARED.sub(pointer, source)
    left = _EXTERN_SHARED.search(_without_comments(text))
    if left is not None:
        raise CudaOnCpuError(
            f"cannot read `{left.group()}`; "
            "expected `extern __shared__ [__align__(n)] type name[];`"
        )
    return text
