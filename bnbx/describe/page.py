"""The parts of docs/quant-types.md that come from specs: `python -m bnbx.describe.page` there.

The page is prose with places marked `<!-- name -->` ... `<!-- end -->`; what stands between is
written anew from the registered built-in types, and a test holds the page to it. A mark
`<!-- plot: TYPES -->` before a picture says what the picture shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from bnbx.describe.data import LABELS, data_sets
from bnbx.describe.facts import Facts, facts_of, scale_words
from bnbx.describe.text import percent, short
from bnbx.registry import quant_types

PATH = Path("docs", "quant-types.md")
BUILT_INS = "bnbx.quant_types"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURE = re.compile(r"<!-- plot: ([\w ]+) -->\n!\[[^\]]*\]\(([\w/.-]+)\)")


def refreshed(text: str) -> str:
    """The page with its marked places written anew.

    Raises:
        KeyError: a place of a name that nothing is written for.
    """
    return PLACE.sub(lambda m: f"{m[1]}{WRITERS[m[2]]()}\n{m[3]}", text)


def pictures(text: str) -> Iterator[tuple[list[str], Path]]:
    """The types that each marked picture shows, and its path from the page."""
    for found in PICTURE.finditer(text):
        yield found[1].split(), Path(found[2])


def write(page: Path) -> None:
    """Write the page anew, and its pictures."""
    from bnbx.describe.plot import draw

    text = page.read_text(encoding="utf-8")
    page.write_text(refreshed(text), encoding="utf-8")
    for names, path in pictures(text):
        (page.parent / path).parent.mkdir(exist_ok=True)
        draw([facts_of(name) for name in names], page.parent / path)


@lru_cache(maxsize=1)
def _built_ins() -> tuple[Facts, ...]:
    types = quant_types()
    return tuple(facts_of(name) for name in types.names() if types.package(name) == BUILT_INS)


def _data() -> str:
    return "\n".join(
        f"- **{label}**: {data_sets()[key].numel()} numbers" for key, label in LABELS.items()
    )


def _types() -> str:
    columns = ["type", "bits", "stored", "scale", *LABELS.values(), "smallest", "unsigned"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for facts in _built_ins():
        spec = facts.spec
        cells = [
            f"`{spec.name}`",
            str(spec.bits),
            short(facts.bits_per_element),
            scale_words(spec, facts.encoding.block_size),
            *(percent(facts.errors[key].rms) for key in LABELS),
            f"{facts.smallest:.2g}",
            "own table" if spec.unsigned_values else "",
        ]
        lines.append(("| " + " | ".join(cells) + " |").replace("|  |", "| |"))
    return "\n".join(lines)


def _sources() -> str:
    return "\n".join(
        f"- `{facts.spec.name}`: {facts.spec.summary}. {facts.spec.source}."
        for facts in _built_ins()
    )


WRITERS: Mapping[str, Callable[[], str]] = {
    "data": _data,
    "types": _types,
    "sources": _sources,
}


if __name__ == "__main__":
    write(PATH)
