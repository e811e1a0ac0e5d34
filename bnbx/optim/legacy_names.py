"""What bitsandbytes calls each rule, and what its `betas` mean there.

Its optimizers know a rule by one string, and put whatever decay rates the rule has into `betas`.
Both are told by the specs (`GroupFormat.called`, `GroupFormat.betas`), beside what its checkpoints
hold.
"""

from __future__ import annotations

from bnbx.errors import UnknownNameError
from bnbx.registry import GroupFormat, Optimizer, optimizers
from bnbx.registry.names import nearest

LIBRARY = "bitsandbytes"


def format_of(spec: Optimizer) -> GroupFormat | None:
    """The class of bitsandbytes that has this rule and a string for it."""
    forms = (form for name, form in spec.saved_as.items() if name.startswith(f"{LIBRARY}."))
    return next((form for form in forms if form.called), None)


def called_by(spec: Optimizer) -> str:
    """What bitsandbytes calls a rule; "" if it does not have it."""
    form = format_of(spec)
    return form.called if form else ""


def legacy_names() -> dict[str, str]:
    """The rule's name by what bitsandbytes calls it. Its "adam" is AdamW."""
    return {called: spec.name for spec in optimizers() if (called := called_by(spec))}


def rule_of(name: object) -> Optimizer:
    """The rule that bitsandbytes calls `name`, else the registered rule of that name.

    Raises:
        UnknownNameError: there is neither.
    """

    def called(spec: Optimizer) -> bool:
        return called_by(spec) == name

    if isinstance(name, str) and name:
        found = optimizers().find(called, loading=False)
        if found is None and name in optimizers():
            return optimizers().get(name)
        found = found or optimizers().find(called)
        if found is not None:
            return found
    names = legacy_names()
    known = dict.fromkeys([*names, *optimizers().names()])
    raise UnknownNameError(
        f"optimizer_name={name!r}: no rule of this name{nearest(str(name), known)}; "
        f"bitsandbytes' names: {', '.join(names)}; rules: {', '.join(optimizers().names())}"
    )


def name_of(spec: Optimizer) -> str:
    """What bitsandbytes calls a rule; its own name if bitsandbytes does not have it."""
    return called_by(spec) or spec.name


def betas_of(spec: Optimizer) -> tuple[str, ...]:
    """The hyperparameters that `betas` hold for a rule."""
    form = format_of(spec)
    return (form.betas if form else ()) or spec.packs.get("betas", ())
