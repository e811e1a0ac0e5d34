"""Schedule-Free AdamW: arXiv:2405.15682, algorithm 1, with warm-up and weights lr**2.

p holds y, where gradients are taken, while training; `optimizer.eval()` turns it into the average
x, `optimizer.train()` back. The weights' sum has a closed form, since lr does not change after
warm-up: a schedule is what the rule does without.
"""

from __future__ import annotations

from bnbx.registry import Constraint, Optimizer, State, fraction, rate

schedule_free_adamw = Optimizer(
    name="schedule_free_adamw",
    summary="AdamW on an average of its iterates instead of a schedule",
    source="arXiv:2405.15682",
    states=(
        State(name="z", initial="p", quantized=False),
        State(name="v", signed=False),
    ),
    hyper=dict(
        lr=rate(2.5e-3),
        beta1=fraction(0.9),
        beta2=fraction(0.999),
        eps=rate(1e-8),
        weight_decay=rate(0.0),
        warmup_steps=rate(0.0),
    ),
    packs=dict(betas=("beta1", "beta2")),
    constraints=(Constraint(condition="beta1 > 0", message="betas[0] has to be > 0"),),
    step_code="""
        c2 = sqrt(1 - beta2**step)
        warm = where(warmup_steps > 0, min(step / warmup_steps, 1), 1)
        k = min(step, warmup_steps)
        before = where(warmup_steps > 0, k * (k + 1) * (2 * k + 1) / (6 * warmup_steps**2), 0)
        c = warm * warm / (before + max(step - warmup_steps, 0))
        rate = lr * warm
    """,
    element_code="""
        v = beta2 * v + (1 - beta2) * g * g
        n = c2 * g / (sqrt(v) + c2 * eps) + weight_decay * p
        p = p + c * (z - p) - rate * (1 - beta1 * (1 - c)) * n
        z = z - rate * n
    """,
    eval_code="""
        p = p + (1 - 1 / beta1) * (z - p)
    """,
    train_code="""
        p = p + (1 - beta1) * (z - p)
    """,
)
