"""Real English prose that every CPython ships: its language reference, as pydoc prints it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

SOURCE = "pydoc_data/topics.py, the Python language reference as CPython ships it for help()"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")
_MARKUP = re.compile(r"[*\"`]|\s*\[\d+\]")


def topics() -> Mapping[str, str]:
    """Topic -> text. Raises ImportError where a distribution of Python left the module out."""
    from pydoc_data.topics import topics

    return topics


def paragraphs(text: str) -> list[str]:
    """The paragraphs that are prose: no tables, headings, listings, or grammar productions."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        prose = (
            len(lines) > 1
            and all(line and not line.startswith((" ", "+", "|", "-", "*", "=")) for line in lines)
            and not re.search(r"::=|>>>|-- |^[=*-]{4,}$", block, re.MULTILINE)
            and block.rstrip().endswith((".", "!", "?"))
        )
        if prose:
            found.append(_MARKUP.sub("", " ".join(lines)))
    return found


def sentence_pairs(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Consecutive sentences of the same paragraph, 6 to 60 words each, in order, none twice."""
    pairs = []
    for topic in sorted(texts):
        for paragraph in paragraphs(texts[topic]):
            sentences = _SENTENCE_END.split(paragraph)
            pairs += [
                pair
                for pair in itertools.pairwise(sentences)
                if all(6 <= len(sentence.split()) <= 60 for sentence in pair)
            ]
    return list(dict.fromkeys(pairs))
