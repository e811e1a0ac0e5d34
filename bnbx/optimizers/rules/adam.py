"""Adam: arXiv:1412.6980, algorithm 1; weight decay is L2, added to the gradient, as in torch.

amsgrad: arXiv:1904.09237, algorithm 2, on the uncorrected second moment as torch has it.

The corrections of the moments, m / c1 and sqrt(v) / c2, are gathered as the end of section 2 of
that paper has it: two multiplications less for each element.
"""

from __future__ import annotations

from bnbx.registry import GroupFormat, Optimizer, State, flag, fraction, rate

adam = Optimizer(
    name="adam",
    summary="adaptive moments, L2 weight decay",
    source="arXiv:1412.6980",
    states=(
        State(name="m", saved_as={"torch": "exp_avg", "bitsandbytes": "state1"}),
        State(name="v", signed=False, saved_as={"torch": "exp_avg_sq", "bitsandbytes": "state2"}),
        State(name="vmax", signed=False, when="amsgrad", saved_as={"torch": "max_exp_avg_sq"}),
    ),
    hyper=dict(
        lr=rate(1e-3),
        beta1=fraction(0.9),
        beta2=fraction(0.999),
        eps=rate(1e-8),
        weight_decay=rate(0.0),
        amsgrad=flag(False),
    ),
    packs=dict(betas=("beta1", "beta2")),
    step_code="""
        c1 = 1 - beta1**step
        c2 = sqrt(1 - beta2**step)
    """,
    element_code="""
        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        vmax = where(amsgrad, max(vmax, v), v)
        u = c2 / c1 * m / (sqrt(vmax) + c2 * eps)
    """,
    apply_code="""
        p = p - lr * u
    """,
    saved_as={
        "torch.Adam": GroupFormat(keys={"decoupled_weight_decay": False}),
        "torch.SparseAdam": GroupFormat(only=dict(weight_decay=0.0, amsgrad=False)),
        # Its weight decay is decoupled whatever its name: the same rule only where there is none.
        "bitsandbytes.Adam": GroupFormat(
            keys={"weight_decay": 0.0}, only=dict(weight_decay=0.0, amsgrad=False)
        ),
    },
)
