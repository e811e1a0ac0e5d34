"""A read-only collection of specs of one kind, found by name.

Only the plugin manager adds to a catalog; a name is taken once. A miss asks the plugin manager for
more (entry points load one by one), then fails with the nearest name and the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from bnbx.errors import DuplicateNameError, UnknownNameError
from bnbx.registry.names import nearest
from bnbx.registry.spec import Spec

S = TypeVar("S", bound=Spec)


class Catalog(Generic[S]):
    """Specs by name.

    Args:
        kind: what the specs are, for messages ("optimizer").
        more: called on a miss; loads the next plugin, False when there is none left.
        absent: what to know of plugins that are not in it, in lines for the message of a miss.
    """

    def __init__(
        self, kind: str, more: Callable[[], bool], absent: Callable[[], Iterable[str]]
    ) -> None:
        self.kind = kind
        self._more = more
        self._absent = absent
        self._specs: dict[str, S] = {}
        self._packages: dict[str, str] = {}

    def add(self, spec: S, package: str) -> None:
        """Register `spec`, from `package`.

        Raises:
            DuplicateNameError: naming both packages.
        """
        if spec.name in self._specs:
            raise DuplicateNameError(
                f"{self.kind} {spec.name!r} is registered by both "
                f"{self._packages[spec.name]} and {package}; one of them must rename it"
            )
        self._specs[spec.name] = spec
        self._packages[spec.name] = package

    def discard(self, package: str) -> None:
        """Forget what `package` added: a plugin that fails half-way leaves nothing behind."""
        owners = list(self._packages.items())
        for name in [name for name, owner in owners if owner == package]:
            del self._specs[name], self._packages[name]

    def get(self, name: str) -> S:
        """The spec of this name.

        Raises:
            UnknownNameError: with the nearest name, the list, and the plugins that are missing.
        """
        if name not in self:
            raise UnknownNameError(self._miss(name))
        return self._specs[name]

    def find(self, wanted: Callable[[S], bool], *, loading: bool = True) -> S | None:
        """The first spec that `wanted` accepts, loading plugins only while there is none.

        Without `loading`, it is among those that are loaded.
        """
        while True:
            specs = list(self._specs.values())  # other threads may add some meanwhile
            for spec in specs:
                if wanted(spec):
                    return spec
            if not loading or (not self._more() and len(specs) == len(self._specs)):
                return None

    def holds(self, spec: S) -> bool:
        """Whether this very spec is registered so far; loads nothing."""
        return self._specs.get(spec.name) == spec

    def names(self) -> tuple[str, ...]:
        """All names, sorted; loads every plugin."""
        while self._more():
            pass
        return tuple(sorted(self._specs))

    def package(self, name: str) -> str:
        """The package that registered `name`."""
        self.get(name)
        return self._packages[name]

    def __iter__(self) -> Iterator[S]:
        return iter([self._specs[name] for name in self.names()])

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        """Whether there is a spec of this name, loading plugins only while there is none."""
        if not isinstance(name, str):
            return False
        while name not in self._specs and self._more():
            pass
        return name in self._specs

    def _miss(self, name: object) -> str:
        known = self.names()
        message = f"there is no {self.kind} {name!r}{nearest(str(name), known)}"
        message += f"; available: {', '.join(known) or '(none)'}"
        return "\n".join([message, *self._absent()])
