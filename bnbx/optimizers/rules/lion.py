"""Lion: arXiv:2302.06675, algorithm 2; decoupled weight decay."""

from __future__ import annotations

from bnbx.registry import GroupFormat, Optimizer, State, fraction, rate

lion = Optimizer(
    name="lion",
    summary="sign of an interpolated momentum",
    source="arXiv:2302.06675",
    states=(State(name="m", saved_as={"bitsandbytes": "state1"}),),
    hyper=dict(
        lr=rate(1e-4),
        beta1=fraction(0.9),
        beta2=fraction(0.99),
        weight_decay=rate(0.0),
    ),
    packs=dict(betas=("beta1", "beta2")),
    element_code="""
        u = sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
    """,
    apply_code="""
        p = p * (1 - lr * weight_decay)
        p = p - lr * u
    """,
    saved_as={
        "bitsandbytes.Lion": GroupFormat(
            keys={"betas": ("beta1", "beta2")}, nonzero=("beta1", "beta2"), called="lion"
        )
    },
)
