"""LARS: arXiv:1708.03888, in the form of bitsandbytes' PytorchLARS.

SGD with momentum whose update is never longer than max_unorm times the parameter (the paper's
trust coefficient); max_unorm=0 leaves it as it is. A parameter that is zero throughout is not
held back, or it could never leave zero. Where an update has no norm, since one gradient is no
number, nothing else of the parameter moves.
"""

from __future__ import annotations

from bnbx.registry import Constraint, GroupFormat, Optimizer, State, flag, number, rate

lars = Optimizer(
    name="lars",
    summary="SGD with momentum, the norm of updates bound to that of the parameter",
    source="arXiv:1708.03888",
    states=(State(name="m", when="momentum", saved_as={"bitsandbytes": "state1"}),),
    hyper=dict(
        lr=rate(1e-3),
        momentum=rate(0.0),
        dampening=number(0.0),
        weight_decay=rate(0.0),
        nesterov=flag(False),
        max_unorm=rate(0.02),
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
    tensor_code="""
        most = max_unorm * norm_p
        ratio = where(most > 0, where(norm_u > most, most / norm_u, 1), 1)
        ratio = where(norm_u >= 0, ratio, 0)
        trust = where(max_unorm, ratio, 1)
    """,
    apply_code="""
        p = p - lr * trust * u
    """,
    saved_as={
        "bitsandbytes.LARS": GroupFormat(
            keys={"betas": ("momentum", 0.0)},
            only=dict(dampening=0.0, nesterov=False),
            called="lars",
            betas=("momentum", "dampening"),
        ),
    },
)
