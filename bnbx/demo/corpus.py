"""Text to learn from that every machine has: the source of Python's own standard library.

Nothing is downloaded, and the same Python gives the same bytes. Files, not bytes, are dealt out to
training and validation, each by a hash of its name, so that no validation text was trained on and
a file's side does not depend on which other files exist.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bnbx.errors import BnbxError

SKIPPED_FOLDERS = frozenset(
    {
        # Installed packages and compiled files: not the standard library.
        "__pycache__",
        "dist-packages",
        "site-packages",
        # Tests and applications that many distributions leave out.
        "idle_test",
        "idlelib",
        "lib2to3",
        "test",
        "tests",
        "turtledemo",
        # Long tables rather than programs.
        "encodings",
        "pydoc_data",
    }
)
GENERATED_PREFIX = "_sysconfigdata"
"""Build settings of one machine: its paths would be learned, and differ on the next machine."""

VALIDATION_SHARE = 0.1

DOCUMENTATION = Path("pydoc_data", "topics.py")
"""The other text, which `load_corpus` skips: the language reference, by topic."""


class CorpusError(BnbxError, FileNotFoundError):
    """The standard library's source is missing or too short to train on."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to validate on, from different files."""

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def source_files(root: Path) -> list[Path]:
    """The Python files under `root` that are kept, in the order of their relative names."""
    kept = [path for path in root.rglob("*.py") if _is_kept(path.relative_to(root))]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def is_validation(name: str) -> bool:
    """Whether the file of this relative name is held back from training."""
    first_word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return first_word < VALIDATION_SHARE * 2**32


def load_corpus(root: Path | None = None, *, window: int) -> Corpus:
    """Read the text under `root`, by default the standard library.

    Raises:
        CorpusError: if either side is shorter than one `window` and the byte that follows it.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names: dict[bool, list[str]] = {False: [], True: []}
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        held_back = is_validation(name)
        names[held_back].append(name)
        texts[held_back].append(path.read_bytes())
    corpus = Corpus(
        train=_as_tensor(texts[False]),
        validation=_as_tensor(texts[True]),
        train_files=tuple(names[False]),
        validation_files=tuple(names[True]),
    )
    if min(len(corpus.train), len(corpus.validation)) <= window:
        raise CorpusError(
            f"{root}: {len(corpus.train)} bytes of Python source to train on and "
            f"{len(corpus.validation)} to validate on, but the demo needs more than {window} of "
            "each. It reads the .py files of Python's standard library; run it with a Python that "
            "has them (some embedded and zipped builds do not)."
        )
    return corpus


def load_documentation(path: Path | None = None, *, window: int) -> Corpus:
    """Read the language reference that comes with Python for `help("if")`: English, not programs.

    Topics are dealt out to training and validation as files are. The file is one assignment of a
    dictionary of strings; it is parsed, not run.

    Raises:
        CorpusError: it is missing, has another form, or is too short.
    """
    path = path or Path(sysconfig.get_path("stdlib")) / DOCUMENTATION
    try:
        (statement,) = ast.parse(path.read_bytes()).body
        topics = ast.literal_eval(statement.value) if isinstance(statement, ast.Assign) else {}
    except (OSError, SyntaxError, ValueError) as error:
        raise CorpusError(
            f"{path}: {error}. The demo adapts its model to the language reference that comes with "
            "Python; run it with a Python that has it (some minimal builds do not)."
        ) from None
    sides: dict[bool, list[str]] = {False: [], True: []}
    for name in sorted(topics):
        sides[is_validation(name)].append(name)
    texts = {side: [topics[name].encode() for name in names] for side, names in sides.items()}
    corpus = Corpus(
        train=_as_tensor(texts[False]),
        validation=_as_tensor(texts[True]),
        train_files=tuple(sides[False]),
        validation_files=tuple(sides[True]),
    )
    if min(len(corpus.train), len(corpus.validation)) <= window:
        raise CorpusError(
            f"{path}: {len(topics)} topics, {len(corpus.train)} bytes to train on and "
            f"{len(corpus.validation)} to validate on; the demo needs more than {window} of each"
        )
    return corpus


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, one row a start: the targets are the inputs one byte later."""
    rows = text[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def training_starts(text: Tensor, length: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """Where each window of each batch starts, drawn once so that every run sees the same text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(text) - length, (steps, batch_size), generator=generator)


def validation_starts(text: Tensor, length: int, total: int) -> Tensor:
    """Evenly spaced windows, `total` bytes of them (at least one), the same for every seed."""
    return torch.linspace(0, len(text) - length - 1, max(1, total // length)).long()


def _is_kept(name: Path) -> bool:
    in_skipped = not SKIPPED_FOLDERS.isdisjoint(name.parts[:-1])
    return not in_skipped and not name.name.startswith(GENERATED_PREFIX)


def _as_tensor(texts: list[bytes]) -> Tensor:
    joined = bytearray(b"".join(texts))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()
