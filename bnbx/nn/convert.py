"""Quantize a model in place, and undo it: `quantize_` and `dequantize_`.

Layers change their class and their weight and stay the objects that they were, with their hooks
and whoever refers to them. A weight is encoded whole before its layer changes, so that a model in
which something fails, or which is interrupted, is part dense, part quantized, and works; the same
call goes on from there. Everything that arguments say is checked before anything is changed.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from bnbx.errors import BnbxError, BnbxWarning, OptionError
from bnbx.kernels.coding import finite
from bnbx.kernels.encoding import Encoding
from bnbx.layers.embedding import QuantEmbedding
from bnbx.layers.linear import QuantLinear
from bnbx.layers.parameter import QuantParameter
from bnbx.layers.parametrize import keep_in_codes
from bnbx.layers.reclass import change_class
from bnbx.nn.embedding import Embedding4bit
from bnbx.nn.linear import Linear4bit, Params4bit
from bnbx.nn.report import Entry, QuantizationReport
from bnbx.nn.revert import dequantize_model
from bnbx.nn.selection import Choice, Chosen, select
from bnbx.registry import QuantType
from bnbx.registry.patterns import some

LARGE = 1 << 30  # bytes of weights for which progress is shown unasked
LINES = 4  # of progress, where there is no terminal
BROKEN = "holds NaN"
HALF = 4  # bits of the types whose layers have names of their own


def quantize_(
    model: nn.Module,
    quant_type: str | QuantType = "nf4",
    *,
    skip: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    parameters: Iterable[str] = (),
    block_size: int | None = None,
    double: bool = False,
    fit: str | None = None,
    compute_dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> QuantizationReport:
    """Quantize the weights of linear layers and embeddings, and parameters that are named.

    Weights are encoded where they are; layers on the meta device are encoded when they are loaded
    and moved. Patterns are described in `bnbx.nn.patterns`. A weight that several layers share is
    quantized once and stays shared.

    Args:
        model: is changed in place.
        quant_type: name of a registered type, or a spec.
        skip: patterns of modules or parameters that are left as they are.
        overrides: by pattern, another type, or {"quant_type": ..., "block_size": ...,
            "double": ..., "fit": ..., "compute_dtype": ...}, or None to leave what matches. Of
            several that match, later ones win, argument by argument. Another type comes with its
            own block size.
        parameters: patterns of parameters of three and more dimensions to quantize too, such as
            the weights of experts, (experts, out, in); one that an override gives a type to is
            among them.
        block_size: elements that share a scale; the type's own by default.
        double: whether scales are quantized too.
        fit: how scales are chosen: None for absmax, "mse" for the least squared error.
        compute_dtype: what linear layers convert inputs to; by default they are used as they are.
        progress: whether to show a bar; by default on a terminal, for more than 1 GiB of weights.

    Returns:
        What was done and what was left, with the bytes of each; print it. A weight with NaN or
        infinity in it, which makes NaN of its whole block, is told of there and in a warning. So
        is, by a warning, a weight that trains in a model whose others are frozen: it will not.

    Raises:
        OptionError: a pattern that matches nothing, a `progress` that is no bool, or arguments
            that contradict one another; the model is as it was.
        UnknownNameError: no such quant type or argument; the model is as it was.
        BnbxError: a weight could not be encoded; those before it are.
    """
    given = {
        "quant_type": quant_type,
        "block_size": block_size,
        "double": double,
        "fit": fit,
        "compute_dtype": compute_dtype,
    }
    if progress is not None and not isinstance(progress, bool):
        raise OptionError(
            f"quantize_: progress={progress!r:.200}; expected True, False, or None to show a bar "
            "on a terminal for large models"
        )
    chosen = select(model, given, skip, overrides, parameters)
    _warn_of_adapters(chosen)
    total = len(chosen.choices)
    done: dict[int, Encoding] = {}
    broken: dict[int, str] = {}
    with _progress(chosen, progress) as advance:
        while chosen.choices:
            # Dense weights go as their codes come: nothing here may keep one.
            choice = chosen.choices.pop(0)
            try:
                if not _quantize(choice):
                    broken[id(choice.param)] = choice.name
            except BnbxError as error:
                raise type(error)(
                    f"{choice.name}: {error}\n{len(done)} of {total} weights are quantized; the "
                    "model works, and the same call goes on with the rest"
                ) from error
            done[id(choice.param)] = choice.settings.encoding
            advance(choice.name)
    if broken:
        _warn_of_broken(list(broken.values()))
    return _report(chosen, done, broken)


def dequantize_(
    model: nn.Module, dtype: torch.dtype | None = None, *, requires_grad: bool = True
) -> nn.Module:
    """Undo `quantize_`, in place: layers become torch's own, with dense weights.

    Layers that were never anything else (`Linear4bit`, `Linear8bitLt`, `Embedding8bit`, ...) are
    made dense too. What quantizing rounded off stays off. Layers of a class that somebody derived
    from these, or with another `forward` on them, may use their weight in their own way: they are
    left, with all that shares their weights, and a warning says so.

    Args:
        model: is changed in place.
        dtype: of the dense weights, and of the biases beside them; by default they have the one
            that they had.
        requires_grad: whether they train.

    Returns:
        The model.

    Raises:
        OptionError: no module, or a dtype that codes are not dequantized to.
    """
    return dequantize_model(model, dtype, requires_grad)


def _quantize(choice: Choice) -> bool:
    """Encode a weight, and put it wherever it is used; False if it holds NaN now."""
    settings, param = choice.settings, choice.param
    encoding = settings.encoding
    half = encoding.bits == HALF
    kind: type[QuantParameter] = Params4bit if half else QuantParameter
    new = kind(
        param.detach(),
        quant_type=encoding.quant_type,
        blocksize=encoding.block_size or None,
        compress_statistics=encoding.second is not None,
    )
    if not param.is_meta:
        new.quantize(fit=settings.fit)
    for module, attribute, layer in choice.uses:
        if not layer:
            keep_in_codes(module, attribute, new, settings.fit)
        elif isinstance(module, nn.Linear):
            module.compute_dtype = settings.compute_dtype  # type: ignore[assignment]
            module.compute_type_is_set = settings.compute_dtype is not None  # type: ignore[assignment]
            _change(module, Linear4bit if half else QuantLinear, new, settings.fit)
        else:
            _change(module, Embedding4bit if half else QuantEmbedding, new, settings.fit)
    state = new.quant_state
    return state is None or finite(encoding, state.parts(new.detach()), state.shape or ())


def _warn_of_adapters(chosen: Chosen) -> None:
    """Of a model that was frozen but for some weights, these are meant to train."""
    trained = [choice.name for choice in chosen.choices if choice.param.requires_grad]
    if trained and len(trained) < len(chosen.choices):
        warnings.warn(
            f"{some(trained)}: trained so far, while other weights were frozen; in codes they are "
            "frozen too. Quantize a model before adapters are added to it, or leave these as they "
            "are: skip= of quantize_",
            BnbxWarning,
            stacklevel=3,
        )


def _warn_of_broken(names: list[str]) -> None:
    warnings.warn(
        f"NaN or infinity in {some(names)}: all numbers that shared a scale with one are NaN now. "
        "Repair these weights before they are quantized, with torch.nan_to_num, or leave them as "
        "they are: skip= of quantize_",
        BnbxWarning,
        stacklevel=3,
    )


def _change(module: Any, kind: type[nn.Module], weight: QuantParameter, fit: str | None) -> None:
    """Let a layer of torch be a quantized one, in an order in which it works at any time."""
    if weight.module is None:
        weight.module = module
    module.quant_state = weight.quant_state
    module.quant_storage = weight.quant_storage
    module.fit = fit
    module._parameters["weight"] = weight  # which torch's own forward knows too
    change_class(module, kind)


@contextmanager
def _progress(chosen: Chosen, wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each weight once it is done."""
    console = Console(stderr=True)
    large = sum(choice.param.nbytes for choice in chosen.choices) >= LARGE
    total = len(chosen.choices)
    if not (wanted or (wanted is None and large and console.is_terminal)):
        yield lambda name: None
    elif not console.is_terminal:
        yield _lines(console, total)
    else:
        columns = (
            TextColumn("quantizing"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda name: bar.update(task, advance=1, description=name)


def _lines(console: Console, total: int) -> Callable[[str], None]:
    """Four lines in all, for a log that keeps every one."""
    due = {total * part // LINES for part in range(1, LINES + 1)}
    numbers = itertools.count(1)

    def advance(name: str) -> None:
        number = next(numbers)
        if number in due:
            console.print(f"quantizing: {number} of {total} weights, {name}", soft_wrap=True)

    return advance


def _report(
    chosen: Chosen, done: Mapping[int, Encoding], broken: Mapping[int, str]
) -> QuantizationReport:
    found = []
    for each in chosen.listed:
        encoding = done.get(each.key)
        after = each.nbytes if encoding is None else encoding.bytes(each.shape)
        how = None if encoding is None else encoding.describe()
        name, *shared = each.names
        remark = BROKEN if each.key in broken else None
        found.append(
            Entry(name, each.shape, each.nbytes, after, how, each.why, tuple(shared), remark)
        )
    return QuantizationReport(tuple(found))
