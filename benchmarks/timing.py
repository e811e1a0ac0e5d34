"""How steps are timed against each other: in rounds, interleaved, so that all meet the same noise.

A round runs the contenders one after another and then renews the gradients, untimed. Contenders
much slower than the rest take part in every k-th round only, or they would leave no time for the
others. Nothing here knows what is timed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from time import perf_counter

Clock = Callable[[], float]
Times = dict[int, float]  # seconds by round
COST_STEPS = 5
COST_SECONDS = 0.5
MIN_TIMES = 3
"""Of every contender, even where the time budget is spent."""


def timed(function: Callable[[], object], clock: Clock = perf_counter) -> float:
    """Seconds that one call takes."""
    began = clock()
    function()
    return clock() - began


def cost(step: Callable[[], object], clock: Clock = perf_counter) -> float:
    """Seconds that a step takes, about: the least of a few, of one where it is slow."""
    found: list[float] = []
    while len(found) < COST_STEPS and sum(found) < COST_SECONDS:
        found.append(timed(step, clock))
    return min(found)


def periods(costs: Mapping[str, float], pause: float, reference: str) -> dict[str, int]:
    """In which rounds each contender runs: every one for 1, every k-th for k.

    A contender may take as much of the time, averaged over the rounds, as the two fastest and the
    renewal of gradients (`pause`) take together. The reference runs in every round, because a
    ratio needs it.

    Args:
        costs: seconds that a step of each contender takes, about.
        pause: seconds between rounds.
        reference: the contender that others are compared with; need not be in `costs`.
    """
    base = sum(sorted(costs.values())[:2]) + pause
    return {
        name: 1 if name == reference else max(1, math.ceil(cost / base))
        for name, cost in costs.items()
    }


def run_rounds(
    steps: Mapping[str, Callable[[], object]],
    periods: Mapping[str, int],
    renew: Callable[[], object],
    seconds: float,
    progress: Callable[[float], object],
    clock: Clock = perf_counter,
) -> dict[str, Times]:
    """Time `steps` in rounds until `seconds` are over and each was timed a few times.

    Args:
        steps: what to call, by contender, in the order of calling.
        periods: from `periods`.
        renew: called after every round, untimed.
        seconds: the budget; only whole rounds are run.
        progress: told after every round which fraction of the work is done.
        clock: as `perf_counter`.

    Returns:
        For each contender, the seconds of its step by the number of the round.
    """
    times: dict[str, Times] = {name: {} for name in steps}
    least = (MIN_TIMES - 1) * max(periods[name] for name in steps) + 1
    began, number = clock(), 0
    gc.collect()
    gc.disable()
    try:
        while number < least or clock() - began < seconds:
            for name, step in steps.items():
                if number % periods[name] == 0:
                    times[name][number] = timed(step, clock)
            renew()
            number += 1
            progress(min(number / least, (clock() - began) / seconds, 1.0))
    finally:
        gc.enable()
    return times


def ratios(times: Times, reference: Times) -> list[float]:
    """Time over the reference's time, for each round that both ran in."""
    return [seconds / reference[number] for number, seconds in times.items() if number in reference]
