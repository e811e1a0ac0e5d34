"""Tables that are sent to a device once: to send one is to wait for all that runs there.

What is kept serves whoever comes next, so it must not be of the moment in which it was made: not a
tensor of inference mode, and not one that a mode (`FakeTensorMode`) has made. Under a mode nothing
is kept, or taken from what is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

T = TypeVar("T")


def sent_once(make: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function of arguments that can be hashed gives; nobody may change it."""

    @lru_cache(maxsize=256)
    def keep(*arguments: Any) -> T:
        with torch.inference_mode(False):
            return make(*arguments)

    @wraps(make)
    def found(*arguments: Any) -> T:
        if _get_current_dispatch_mode() is not None:
            return make(*arguments)
        return keep(*arguments)

    return found
