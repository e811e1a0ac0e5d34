"""The base of the familiar classes: a rule, and what a class fixes by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Signature
from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from bnbx.optim.base import Optimizer8bit
from bnbx.optim.describe import docstring
from bnbx.optim.signatures import bound, signature_of
from bnbx.optim.values import plain, with_fixed, with_numbers
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import optimizers

DECOUPLED = "decoupled_weight_decay"


class RuleOptimizer(Optimizer8bit):
    """Base of the familiar classes: an optimizer of one rule.

        class Signum8bit(RuleOptimizer, rule="signum", bits=8): ...

    takes (params, *arguments of the rule in its order, *tail, *, all other options).

    Class keywords:
        rule: its name in the registry.
        bits: width of the states; another is refused then. Left out, it is 32 and may be given.
        paged: True if states are always paged.
        tail: what follows the rule's arguments by position.
        decoupled: the rule that `decoupled_weight_decay=True` stands for.
        defaults: of single arguments, where the rule's own are not wanted.
    """

    _spec: ClassVar[OptimizerSpec]
    _fixed: ClassVar[Mapping[str, Any]]
    _ignored: ClassVar[Mapping[str, Any]]
    _defaults: ClassVar[Mapping[str, Any]]
    _decoupled: ClassVar[str | None]
    _tail: ClassVar[Sequence[str]]
    _places: ClassVar[Signature]
    _like: ClassVar[str]
    __signature__: ClassVar[Signature | None]

    def __init_subclass__(
        cls,
        rule: str | None = None,
        bits: int | None = None,
        paged: bool = False,
        tail: Sequence[str] = (),
        decoupled: str | None = None,
        **defaults: Any,
    ) -> None:
        super().__init_subclass__()
        if rule is None:  # a user's subclass of one of these
            if "__init__" in vars(cls):
                cls.__signature__ = None  # is in __init__
            return
        spec = cls._spec = optimizers().get(rule)
        cls._fixed = {**({"bits": bits} if bits else {}), **({"paged": True} if paged else {})}
        # Code that fills every place has to write 32 there: bitsandbytes refuses anything else.
        cls._ignored = {"bits": 32} if bits == 8 and "optim_bits" in tail else {}
        cls._defaults = {"bits": bits or 32, **cls._fixed, **defaults}
        cls._tail = tail
        cls._decoupled = decoupled
        extra = (DECOUPLED,) if decoupled else ()
        cls._like = cls.__name__
        cls._places = cls.__signature__ = signature_of(spec, tail, cls._defaults, extra)
        cls.__doc__ = docstring(spec, cls._places, cls._fixed)

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        label = type(self).__name__
        given = bound(label, self._places, (params, *args), kwargs, self._like)
        params = given.pop("params")
        decoupled = given.pop(DECOUPLED, False)
        values = {**self._defaults, **with_numbers(self._spec, plain(label, given))}
        values = with_fixed(label, values, self._fixed, self._ignored)
        if not decoupled:
            super().__init__(params, self._spec, **values)
            return
        own = {name: self._spec.default(name) for name in self._spec.arguments}
        super().__init__(params, optimizers().get(str(self._decoupled)), **{**own, **values})
