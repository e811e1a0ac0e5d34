"""Cautious Lion: arXiv:2411.16085; see cautious_adamw."""

from __future__ import annotations

from bnbx.registry import Optimizer, State, fraction, rate

cautious_lion = Optimizer(
    name="cautious_lion",
    summary="Lion without the updates that oppose their gradient",
    source="arXiv:2411.16085",
    states=(State(name="m"),),
    hyper=dict(
        lr=rate(1e-4),
        beta1=fraction(0.9),
        beta2=fraction(0.99),
        weight_decay=rate(0.0),
    ),
    packs=dict(betas=("beta1", "beta2")),
    element_code="""
        s = sign(beta1 * m + (1 - beta1) * g)
        agrees = where(s * sign(g) > 0, 1, 0)
        u = agrees * s
        m = beta2 * m + (1 - beta2) * g
    """,
    tensor_code="""
        share = max(norm_agrees * norm_agrees / numel, 1e-3)
    """,
    apply_code="""
        p = p * (1 - lr * weight_decay)
        p = p - lr / share * u
    """,
)
