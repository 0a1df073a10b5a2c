"""Five classification tasks from text that installed packages and CPython ship.

Docstrings, error messages and signatures come from packages' source files, which are parsed, never
imported; names of characters from ``unicodedata``. A document is a source file, or the characters
of one script. It goes to train, validation or test as a whole, for every task, by a hash of its
name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import random
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Package -> the folders read of it; none: all.
PACKAGES: dict[str, tuple[str, ...]] = {
    "sympy": ("combinatorics", "matrices", "physics", "polys", "stats"),
    "torch": ("ao", "distributed", "fx", "nn", "onnx", "_inductor", "utils"),
    "numpy": (),
    "matplotlib": (),
    "networkx": (),
    "hypothesis": (),
    "peft": (),
}
UNICODE = "unicodedata"
WORDS = range(6, 25)  # of a sentence or message; a signature has at least 3
PER_CLASS: dict[Split, int] = {"train": 200, "validation": 40, "test": 40}  # at most
LEAST: dict[Split, int] = {"train": 60, "validation": 20, "test": 20}

_SKIPPED = {"test", "tests", "testing", "_vendor", "vendor", "__pycache__", "site-packages"}
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\"'(])")
_NO_PROSE = re.compile(r">>>|\.\. |::|^\s*[-=~]{3,}|\|")


class Example(NamedTuple):
    text: str
    label: int
    document: str


class Fact(NamedTuple):
    """A text of a document: a sentence of a docstring, or the message of an exception."""

    text: str
    document: str  # package/path/of/file.py
    kind: Literal["sentence", "message", "signature", "character"]
    about: str  # the exception's class, the type returned, or the character's category


@dataclass(frozen=True)
class Task:
    """A name, what its labels stand for, and the examples of each split, balanced."""

    name: str
    classes: tuple[str, ...]
    examples: Mapping[Split, tuple[Example, ...]]


def package_directory(package: str) -> Path:
    """Raises FileNotFoundError where it isn't installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"bench.continual: the package {package}, whose text the tasks are made of, is not "
            f"installed; pip install {package}"
        )
    return Path(spec.submodule_search_locations[0])


def split_of(document: str) -> Split:
    """60% of documents for training, 20% for validation, 20% for the test, by the name's hash."""
    place = hashlib.sha256(document.encode()).digest()[0] / 256
    return "test" if place < 0.2 else "validation" if place < 0.4 else "train"


def sentences(docstring: str) -> list[str]:
    """The prose sentences of a docstring: no listings, headings, tables or field lists."""
    found = []
    for block in re.split(r"\n\s*\n", docstring):
        lines = block.splitlines()
        if any(_NO_PROSE.search(line) or re.match(r"\s{4,}|\s*:", line) for line in lines):
            continue
        for sentence in _SENTENCE_END.split(" ".join(block.split())):
            if len(sentence.split()) in WORDS:
                found.append(sentence)
    return found


def _message(call: ast.expr) -> str:
    """The literal text of the first argument of an exception's constructor."""
    if not isinstance(call, ast.Call) or not call.args:
        return ""
    parts = [
        node.value
        for node in ast.walk(call.args[0])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return " ".join(" ".join(parts).split())


def facts_of(source: str, document: str) -> Iterator[Fact]:
    """Sentences, messages and signatures of one file; nothing of a file that doesn't parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            for sentence in sentences(docstring) if docstring else ():
                yield Fact(sentence, document, "sentence", "")
        if isinstance(node, ast.FunctionDef) and len(signature(node).split()) >= 3:
            returned = ast.unparse(node.returns) if node.returns else ""
            yield Fact(signature(node), document, "signature", returned)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            message = _message(node.exc)
            if isinstance(node.exc.func, ast.Name) and len(message.split()) in WORDS:
                yield Fact(message, document, "message", node.exc.func.id)


def signature(node: ast.FunctionDef) -> str:
    """A function's name and its arguments' names as words, without annotations."""
    arguments = [argument.arg for argument in node.args.args]
    names = [node.name, *(name for name in arguments if name not in ("self", "cls"))]
    return ", ".join(" ".join(name.split("_")).strip() for name in names)


def read_package(package: str, folders: Sequence[str]) -> list[Fact]:
    """The facts of a package's files in the order of their names."""
    root = package_directory(package)
    found: list[Fact] = []
    paths = [path for folder in folders or (".",) for path in (root / folder).rglob("*.py")]
    for path in sorted(paths):
        parts = path.relative_to(root)
        if not _SKIPPED.intersection(parts.parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            found += facts_of(source, f"{package}/{parts.as_posix()}")
    return found


def read_characters() -> list[Fact]:
    """Names of three words or more without a digit, and their general categories."""
    found = []
    for point in range(0x20000):
        name = unicodedata.name(chr(point), "")
        if len(name.split()) >= 3 and not re.search(r"\d|HANGUL SYLLABLE|CJK", name):
            document = f"{UNICODE}/{name.split()[0]}"
            category = unicodedata.category(chr(point))
            found.append(Fact(name.lower(), document, "character", category))
    return found


# What a task asks: the label of a fact, or None where it isn't one of the task's.


def _area(areas: Sequence[str], fact: Fact) -> str | None:
    parts = PurePosixPath(fact.document).parts
    fits = fact.kind == "sentence" and parts[0] == "sympy" and parts[1] in areas
    return parts[1] if fits else None


def _package(packages: Sequence[str], fact: Fact) -> str | None:
    name = PurePosixPath(fact.document).parts[0]
    return name if fact.kind == "signature" and name in packages else None


def _about(kind: str, abouts: Sequence[str], fact: Fact) -> str | None:
    return fact.about if fact.kind == kind and fact.about in abouts else None


LIBRARIES = ("numpy", "matplotlib", "networkx", "hypothesis", "peft")
EXCEPTIONS = ("TypeError", "ValueError", "RuntimeError", "NotImplementedError")
TYPES = ("None", "bool", "str", "int")
CATEGORIES = ("Lo", "Ll", "Mn", "So", "No", "Po")

TASKS: dict[str, tuple[tuple[str, ...], Callable[[Fact], str | None]]] = {
    "mathematics": (PACKAGES["sympy"], partial(_area, PACKAGES["sympy"])),
    "exception": (EXCEPTIONS, partial(_about, "message", EXCEPTIONS)),
    "library": (LIBRARIES, partial(_package, LIBRARIES)),
    "returns": (TYPES, partial(_about, "signature", TYPES)),
    "character": (CATEGORIES, partial(_about, "character", CATEGORIES)),
}
QUESTIONS = {
    "mathematics": "which part of sympy a docstring's sentence is from",
    "exception": "which exception is raised with a message",
    "library": "which package a function is from, from its name and its arguments' names",
    "returns": "what type a function returns, from its name and its arguments' names",
    "character": "which general category a Unicode character is of, from its name",
}


def build(
    facts: Sequence[Fact],
    per_class: Mapping[Split, int] = PER_CLASS,
    names: Sequence[str] = tuple(TASKS),
) -> list[Task]:
    """The tasks of these names, their classes balanced. A text that two documents share is left out
    of both.

    Raises ValueError where a class of a task has too few examples in a split.
    """
    documents: dict[str, set[str]] = {}
    for fact in facts:
        documents.setdefault(fact.text.lower(), set()).add(fact.document)
    tasks = []
    for name in names:
        classes, label_of = TASKS[name]
        pools: dict[tuple[Split, int], dict[str, Example]] = {}
        for fact in facts:
            label = label_of(fact)
            if label is not None and len(documents[fact.text.lower()]) == 1:
                number = classes.index(label)
                pool = pools.setdefault((split_of(fact.document), number), {})
                pool.setdefault(fact.text, Example(fact.text, number, fact.document))
        examples: dict[Split, tuple[Example, ...]] = {}
        for split in SPLITS:
            found = [list(pools.get((split, i), {}).values()) for i in range(len(classes))]
            size = min(per_class[split], *map(len, found))
            if size < min(LEAST[split], per_class[split]):
                counts = dict(zip(classes, map(len, found), strict=True))
                raise ValueError(
                    f"bench.continual: expected at least {LEAST[split]} examples a class of task "
                    f"{name!r} to {split}, got {counts}; install the packages that the bench pins"
                )
            picked: list[Example] = []
            for i, pool_of in enumerate(found):
                picked += random.Random(f"{name} {split} {i}").sample(pool_of, size)
            examples[split] = tuple(picked)
        tasks.append(Task(name, classes, examples))
    return tasks


def load(
    say: Callable[[str], object] = lambda _: None,
    *,
    names: Sequence[str] = tuple(TASKS),
    packages: Mapping[str, Sequence[str]] = PACKAGES,
) -> list[Task]:
    """The tasks of these names from installed packages, of which the given folders are read.

    Raises:
        FileNotFoundError: one of the packages is missing.
        ValueError: as of ``build``.
    """
    facts: list[Fact] = []
    for package, folders in packages.items():
        say(f"reading {package}")
        facts += read_package(package, folders)
    if "character" in names:
        facts += read_characters()
    return build(facts, names=names)


def fingerprint(tasks: Sequence[Task]) -> str:
    """Twelve hex digits of all texts and labels: other versions of a package, another number."""
    digest = hashlib.sha256()
    for task in tasks:
        for split in SPLITS:
            for example in task.examples[split]:
                digest.update(f"{task.name} {split} {example.label} {example.text}\n".encode())
    return digest.hexdigest()[:12]


def sources() -> str:
    """The packages read, with their versions."""
    packages = (f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return ", ".join([*packages, f"Unicode {unicodedata.unidata_version}"])
