"""Runs one function in a fresh interpreter, with an environment of its own.

A measurement gets its own process so that its thread count holds in every library from the start,
its first step is a first step, and its memory is given back. What libraries print there goes to a
file, whose end is shown if the process dies.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Report = Callable[[str, float], None]  # what goes on, and which fraction of the work is done
LOG_TAIL = 2000  # characters
GRACE_S = 10.0  # for a process to end by itself; libraries stop their helpers then


class ProcessError(Exception):
    """The function raised, or its process died; the message has the reason."""


def call(
    module: str, function: str, argument: Any, environment: Mapping[str, str], report: Report
) -> Any:
    """What `module.function(argument, report)` returns in a fresh process.

    The module is imported there, not here.

    Args:
        module: its dotted name.
        function: a function of it that takes `argument` and a `Report`.
        argument: anything that can be pickled.
        environment: variables to set before anything is imported.
        report: called here with what the function reports there.

    Raises:
        ProcessError: the function raised, or the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as folder:
        log = Path(folder) / "log"
        arguments = (module, function, argument, dict(environment), log, theirs)
        process = context.Process(target=_enter, args=arguments)
        process.start()
        theirs.close()
        try:
            result = _receive(ours, report)
            process.join(GRACE_S)
            return result
        except EOFError:
            process.join()
            tail = log.read_text(errors="replace")[-LOG_TAIL:] if log.exists() else ""
            raise ProcessError(
                f"{module}.{function}({argument}): the process ended with status "
                f"{process.exitcode} and no result. Its last words:\n{tail}"
            ) from None
        finally:
            if process.is_alive():
                process.terminate()
                process.join()


def _receive(connection: Connection, report: Report) -> Any:
    while True:
        kind, *rest = connection.recv()
        if kind == "result":
            return rest[0]
        if kind == "error":
            raise ProcessError(rest[0])
        report(*rest)


def _enter(
    module: str,
    function: str,
    argument: Any,
    environment: dict[str, str],
    log: Path,
    connection: Connection,
) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def report(what: str, fraction: float) -> None:
        connection.send(("report", what, fraction))

    try:
        result = getattr(importlib.import_module(module), function)(argument, report)
    except Exception:  # noqa: BLE001 - whatever it is, it is told to the parent
        connection.send(("error", traceback.format_exc()))
    else:
        connection.send(("result", result))
