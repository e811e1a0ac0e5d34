"""The optimizers of bnbx, but for `Adam` and its kin: by these names bitsandbytes means AdamW.

They are subclasses with this module's name in theirs: where the Trainer of transformers reads
"bitsandbytes" in a class, it keeps the states of embeddings in 32 bits.
"""

from __future__ import annotations

from types import new_class
from typing import Any

from bnbx import optim
from bnbx.optim import RuleOptimizer

RULES = {"adam": "adamw"}  # what bitsandbytes means by classes of a rule, where it is another


def _renamed(own: type[RuleOptimizer]) -> type[Any]:
    """The class of this library that has the name of one of ours."""
    base: type[Any] = own
    keywords: dict[str, Any] = {}
    if own._spec.name in RULES:
        base = RuleOptimizer
        rule = RULES[own._spec.name]
        keywords = dict(rule=rule, tail=own._tail, weight_decay=0.0, **own._fixed)
    place = {"__module__": __name__, "__qualname__": own.__name__}
    return new_class(own.__name__, (base,), keywords, lambda names: names.update(place))


globals().update({name: getattr(optim, name) for name in ["__all__", *optim.__all__]})
FAMILIAR: list[type[RuleOptimizer]] = [
    own
    for own in map(vars(optim).get, optim.__all__)
    if isinstance(own, type) and issubclass(own, RuleOptimizer) and own is not RuleOptimizer
]
globals().update({own.__name__: _renamed(own) for own in FAMILIAR})
