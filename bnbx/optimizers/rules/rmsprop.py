"""RMSprop: Tieleman and Hinton, Coursera lecture 6.5 (2012), as torch.optim.RMSprop.

centered: arXiv:1308.0850, equations 38 to 45. There the variance is the mean square less the square
of the mean; of two quantized states that difference is rounding, and the update explodes. Here v
is the variance itself, which is never below zero, by the same equations: with d = g - mean,

    mean' = mean + (1 - alpha) d,    v' = alpha v + alpha (1 - alpha) d**2
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
        d = where(centered, g - mean, 0)
        v = alpha * v + where(centered, alpha * (1 - alpha) * d * d, (1 - alpha) * g * g)
        mean = where(centered, alpha * mean + (1 - alpha) * g, 0)
        n = g / (sqrt(v) + eps)
        m = where(momentum, momentum * m + n, n)
        u = m
    """,
    apply_code="""
        p = p - lr * u
    """,
    saved_as={
        "torch.RMSprop": GroupFormat(read_code="v = max(0, v - mean * mean)"),
        "bitsandbytes.RMSprop": GroupFormat(
            keys={"betas": ("alpha", "")},  # momentum has no effect there
            only=dict(momentum=0.0, centered=False),
            nonzero=("alpha", "eps"),
            called="rmsprop",
            betas=("alpha", "momentum"),
        ),
    },
)
