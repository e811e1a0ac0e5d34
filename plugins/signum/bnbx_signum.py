"""Signum for bnbx: the sign of the momentum (arXiv:1802.04434, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable

from bnbx.registry import Optimizer, State, fraction, hookimpl, rate

signum = Optimizer(
    name="signum",
    summary="sign of the momentum",
    source="arXiv:1802.04434",
    states=(State(name="m"),),
    hyper=dict(lr=rate(1e-4), beta=fraction(0.9), weight_decay=rate(0.0)),
    element_code="""
        m = beta * m + (1 - beta) * g
        p = p * (1 - lr * weight_decay)
        p = p - lr * sign(m)
    """,
)


@hookimpl
def register_optimizers(register: Callable[[Optimizer], None]) -> None:
    """Register the rule."""
    register(signum)
