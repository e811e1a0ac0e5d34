"""SGD with momentum, as torch.optim.SGD: the first momentum is the gradient itself."""

from __future__ import annotations

from bnbx.registry import Constraint, GroupFormat, Optimizer, State, flag, number, rate

sgd = Optimizer(
    name="sgd",
    summary="stochastic gradient descent, with (Nesterov) momentum",
    source="Sutskever et al., ICML 2013; torch.optim.SGD",
    states=(
        State(
            name="m",
            when="momentum",
            saved_as={"torch": "momentum_buffer", "bitsandbytes": "state1"},
        ),
    ),
    hyper=dict(
        lr=rate(1e-3),
        momentum=rate(0.0),
        dampening=number(0.0),
        weight_decay=rate(0.0),
        nesterov=flag(False),
    ),
    constraints=(
        Constraint(
            condition="where(nesterov, where(momentum > 0, where(dampening == 0, 1, 0), 0), 1)",
            message="nesterov needs momentum > 0 and dampening = 0",
        ),
    ),
    element_code="""
        g = g + weight_decay * p
        m = where(momentum, where(step == 1, g, momentum * m + (1 - dampening) * g), g)
        u = where(nesterov, g + momentum * m, m)
    """,
    apply_code="""
        p = p - lr * u
    """,
    saved_as={
        "torch.SGD": GroupFormat(counts=False),
        # Dampening has no effect there; where it is zero, Lion's betas are told apart.
        "bitsandbytes.SGD": GroupFormat(
            keys={"betas": ("momentum", 0.0)},
            only=dict(dampening=0.0, nesterov=False),
            called="momentum",
            betas=("momentum", "dampening"),
        ),
    },
)
