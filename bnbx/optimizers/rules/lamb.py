"""LAMB: arXiv:1904.00962, algorithm 2, with a bound on the trust ratio.

The step is as long as the parameter, times lr: trust = |p| / |u|, where u includes the weight
decay (adam_w_mode; else it is L2, in the gradient). With max_unorm > 0 the ratio only shortens
steps, to max_unorm times the parameter's norm, as in bitsandbytes; max_unorm=0 is the paper's.
Where an update has no norm, since one gradient is no number, nothing else of the parameter moves.

The corrections of the moments, m / c1 and sqrt(v) / c2, are gathered as the end of section 2 of
arXiv:1412.6980 has it: one multiplication less for each element.
"""

from __future__ import annotations

from bnbx.registry import GroupFormat, Optimizer, State, flag, fraction, rate

lamb = Optimizer(
    name="lamb",
    summary="Adam with steps as long as the parameter allows",
    source="arXiv:1904.00962",
    states=(
        State(name="m", saved_as={"bitsandbytes": "state1"}),
        State(name="v", signed=False, saved_as={"bitsandbytes": "state2"}),
        State(name="vmax", signed=False, when="amsgrad"),
    ),
    hyper=dict(
        lr=rate(1e-3),
        bias_correction=flag(True),
        beta1=fraction(0.9),
        beta2=fraction(0.999),
        eps=rate(1e-8),
        weight_decay=rate(0.0),
        amsgrad=flag(False),
        adam_w_mode=flag(True),
        max_unorm=rate(1.0),
    ),
    packs=dict(betas=("beta1", "beta2")),
    step_code="""
        c1 = where(bias_correction, 1 - beta1**step, 1)
        c2 = where(bias_correction, sqrt(1 - beta2**step), 1)
    """,
    element_code="""
        g = where(adam_w_mode, g, g + weight_decay * p)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        vmax = where(amsgrad, max(vmax, v), v)
        u = c2 / c1 * m / (sqrt(vmax) + c2 * eps)
        u = where(adam_w_mode, u + weight_decay * p, u)
    """,
    tensor_code="""
        ratio = where(max_unorm, min(max_unorm * norm_p / norm_u, 1), norm_p / norm_u)
        trust = where(norm_p > 0, where(norm_u > 0, ratio, 1), 1)
        trust = where(norm_u >= 0, trust, 0)
    """,
    apply_code="""
        p = p - lr * trust * u
    """,
    saved_as={
        "bitsandbytes.LAMB": GroupFormat(
            only=dict(bias_correction=True, amsgrad=False, adam_w_mode=True), called="lamb"
        ),
    },
)
