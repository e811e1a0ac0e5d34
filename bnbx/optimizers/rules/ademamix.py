"""AdEMAMix: arXiv:2409.03137, algorithm 1; decoupled weight decay, before the update.

alpha grows linearly over t_alpha steps; beta3 goes from beta1 to its value over t_beta3 steps so
that the half-life of the slow average grows linearly (section 3 and appendix A.1).

The corrections of the moments, m1 / c1 and sqrt(v) / c2, are gathered as the end of section 2 of
arXiv:1412.6980 has it: two multiplications less for each element.
"""

from __future__ import annotations

from bnbx.registry import GroupFormat, Optimizer, State, fraction, rate, steps

ademamix = Optimizer(
    name="ademamix",
    summary="AdamW with a second, slow average of the gradients",
    source="arXiv:2409.03137",
    states=(
        State(name="m1", saved_as={"bitsandbytes": "state1[0]"}),
        State(name="m2", saved_as={"bitsandbytes": "state1[1]"}),
        State(name="v", signed=False, saved_as={"bitsandbytes": "state2"}),
    ),
    hyper=dict(
        lr=rate(1e-3),
        beta1=fraction(0.9),
        beta2=fraction(0.999),
        beta3=fraction(0.9999),
        alpha=rate(5.0),
        t_alpha=steps(),
        t_beta3=steps(),
        eps=rate(1e-8),
        weight_decay=rate(1e-2),
    ),
    packs=dict(betas=("beta1", "beta2", "beta3")),
    step_code="""
        c1 = 1 - beta1**step
        c2 = sqrt(1 - beta2**step)
        a = where(t_alpha, min(alpha * step / t_alpha, alpha), alpha)
        done = step / t_beta3
        log3 = log(beta1) * log(beta3) / ((1 - done) * log(beta3) + done * log(beta1))
        b3 = where(t_beta3, min(exp(log3), beta3), beta3)
    """,
    element_code="""
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = b3 * m2 + (1 - b3) * g
        v = beta2 * v + (1 - beta2) * g * g
        u = c2 / c1 * (m1 + c1 * a * m2) / (sqrt(v) + c2 * eps)
    """,
    apply_code="""
        p = p * (1 - lr * weight_decay)
        p = p - lr * u
    """,
    saved_as={"bitsandbytes.AdEMAMix": GroupFormat(called="ademamix")},
)
