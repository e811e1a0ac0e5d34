"""Adagrad: Duchi et al., JMLR 12 (2011), as torch.optim.Adagrad."""

from __future__ import annotations

from bnbx.registry import GroupFormat, Optimizer, State, rate

adagrad = Optimizer(
    name="adagrad",
    summary="gradient over the root of the sum of its squares",
    source="Duchi et al., JMLR 12, 2011; torch.optim.Adagrad",
    states=(
        State(
            name="v",
            signed=False,
            initial="initial_accumulator_value",
            saved_as={"torch": "sum", "bitsandbytes": "state1"},
        ),
    ),
    hyper=dict(
        lr=rate(1e-2),
        lr_decay=rate(0.0),
        weight_decay=rate(0.0),
        initial_accumulator_value=rate(0.0),
        eps=rate(1e-10),
    ),
    step_code="""
        decayed = lr / (1 + (step - 1) * lr_decay)
    """,
    element_code="""
        g = g + weight_decay * p
        v = v + g * g
        u = g / (sqrt(v) + eps)
    """,
    apply_code="""
        p = p - decayed * u
    """,
    saved_as={
        "torch.Adagrad": GroupFormat(),
        "bitsandbytes.Adagrad": GroupFormat(
            keys={"betas": (0.0, 0.0)},
            only=dict(lr_decay=0.0, initial_accumulator_value=0.0),
            called="adagrad",
        ),
    },
)
