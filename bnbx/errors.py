"""Every error that bnbx raises on purpose, one class per failure.

Each is a `BnbxError` and also the built-in exception a caller would expect (`ValueError`,
`TypeError`, ...), so that code written for `torch.optim` catches it too.
"""

from __future__ import annotations


class BnbxError(Exception):
    """Base class of all errors raised by bnbx."""


class SpecError(BnbxError, ValueError):
    """A spec contradicts itself: a name used twice, a state never written, a bad number."""


class RuleError(SpecError):
    """A rule text uses something that the rule language does not have."""


class UnknownNameError(BnbxError, ValueError):
    """No spec, option or hyperparameter of this name; the message gives the nearest one."""


class DuplicateNameError(BnbxError, ValueError):
    """Two packages register a spec under one name."""


class PluginError(BnbxError, ValueError):
    """What an entry point names has no hooks, and so registers nothing."""


class OptionError(BnbxError, ValueError):
    """A known option or hyperparameter has a value that it cannot take."""


class UnsupportedTensorError(BnbxError, TypeError):
    """A parameter or gradient has a dtype, layout or device that the optimizer cannot update."""


class InputError(UnsupportedTensorError, ValueError):
    """An argument of a function is a tensor of a dtype or shape that the function cannot take."""


class DeviceError(InputError, RuntimeError):
    """Tensors that belong together are on different devices."""


class QuantizedDataError(BnbxError, ValueError):
    """Codes, scales or a saved quantization state do not fit what they should stand for."""


class CheckpointError(BnbxError, ValueError):
    """A state dict does not fit the optimizer it is loaded into."""


class PagingError(BnbxError, OSError):
    """Paged states cannot be kept: no space, no permission, or pages of another process."""


class SingletonError(BnbxError, RuntimeError):
    """A class of which there is one instance was called to make another."""


class NotYetError(BnbxError, NotImplementedError):
    """A documented feature that this version does not have."""


class TargetError(BnbxError, RuntimeError):
    """No kernel target can run a plan on the device at hand; the message says why for each."""


class CompileError(TargetError):
    """The compiler refused a rendered kernel; carries the command, its output and the source."""


class BnbxWarning(UserWarning):
    """A slower or less safe path is taken, once per cause; the message says how to leave it."""
