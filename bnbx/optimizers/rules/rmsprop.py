"""RMSprop: Tieleman and Hinton, Coursera lecture 6.5 (2012), as torch.optim.RMSprop.

centered: arXiv:1308.0850, equations 38 to 45; a quantized mean may exceed the root of the mean
square, so the variance is kept from going below zero.
"""

from __future__ import annotations

from bnbx.registry import GroupFormat, Optimizer, State, flag, fraction, rate

rmsprop = Optimizer(
    name="rmsprop",
    summary="gradient over its root mean square, with momentum",
    source="Tieleman and Hinton, lecture 6.5, 2012; torch.optim.RMSprop",
    states=(
        State(name="v", signed=False, saved_as={"torch": "square_avg", "bitsandbytes": "state1"}),
        State(name="m", when="momentum", saved_as={"torch": "momentum_buffer"}),
        State(name="mean", when="centered", saved_as={"torch": "grad_avg"}),
    ),
    hyper=dict(
        lr=rate(1e-2),
        alpha=fraction(0.99),
        eps=rate(1e-8),
        weight_decay=rate(0.0),
        momentum=rate(0.0),
        centered=flag(False),
    ),
    element_code="""
        g = g + weight_decay * p
        v = alpha * v + (1 - alpha) * g * g
        mean = where(centered, alpha * mean + (1 - alpha) * g, 0)
        n = g / (sqrt(where(centered, max(0, v - mean * mean), v)) + eps)
        m = where(momentum, momentum * m + n, n)
        u = m
    """,
    apply_code="""
        p = p - lr * u
    """,
    saved_as={
        "torch.RMSprop": GroupFormat(),
        "bitsandbytes.RMSprop": GroupFormat(
            keys={"betas": ("alpha", "")},  # momentum has no effect there
            only=dict(momentum=0.0, centered=False),
            nonzero=("alpha", "eps"),
            called="rmsprop",
            betas=("alpha", "momentum"),
        ),
    },
)
