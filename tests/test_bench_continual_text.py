"""The continual bench's texts: facts from sources, classes and splits."""

from __future__ import annotations

import pytest

from bench import continual_tasks
from bench.continual_tasks import SPLITS, TASKS, Fact

SOURCE = '''"""A module of words that stands here for a test. Too short."""
class Sum:
    """Adds what it is given, one number after another.

    >>> Sum(1, 2, 3) and this is a listing with many words
    """
    def total_of(self, first_item, other) -> int:
        if other:
            raise ValueError(f"expected other to be nothing at all, got {other}")
        raise errors.Odd("a message of no plain class that has words enough")
    def short(self): pass
'''


def test_facts_are_sentences_messages_and_signatures() -> None:
    facts = list(continual_tasks.facts_of(SOURCE, "p/a.py"))
    assert {(f.kind, f.about, f.text) for f in facts} == {
        ("sentence", "", "A module of words that stands here for a test."),
        ("sentence", "", "Adds what it is given, one number after another."),
        ("signature", "int", "total of, first item, other"),
        ("message", "ValueError", "expected other to be nothing at all, got"),
    }
    assert list(continual_tasks.facts_of("def broken(:", "p/b.py")) == []


def test_characters_have_their_category_and_script() -> None:
    facts = continual_tasks.read_characters()
    by_name = {fact.text: fact for fact in facts}
    assert by_name["greek small letter alpha with tonos"].about == "Ll"
    assert by_name["greek small letter alpha with tonos"].document == "unicodedata/GREEK"
    assert not any(character.isdigit() for fact in facts for character in fact.text)


def made_facts(per_class: int, rng_documents: int = 60) -> list[Fact]:
    """Facts of every class of every task, spread over documents."""
    facts = []
    for kind, abouts in (
        ("message", continual_tasks.EXCEPTIONS),
        ("character", continual_tasks.CATEGORIES),
        ("signature", continual_tasks.TYPES),
    ):
        for about in abouts:
            for i in range(per_class):
                document = f"d/{kind}{i % rng_documents}.py"
                facts.append(Fact(f"{kind} {about} number {i}", document, kind, about))  # type: ignore[arg-type]
    for package in continual_tasks.LIBRARIES:
        for i in range(per_class):
            document = f"{package}/f{i % rng_documents}.py"
            facts.append(Fact(f"{package} signature {i}", document, "signature", ""))
    for area in continual_tasks.PACKAGES["sympy"]:
        for i in range(per_class):
            document = f"sympy/{area}/f{i % rng_documents}.py"
            facts.append(Fact(f"{area} sentence {i}", document, "sentence", ""))
    return facts


def test_no_document_is_in_two_splits_and_classes_are_balanced() -> None:
    facts = made_facts(600)
    shared = "a text that two documents of different splits both have"
    facts += [Fact(shared, f"d/message{i}.py", "message", "TypeError") for i in range(50)]
    tasks = continual_tasks.build(facts)
    assert [task.name for task in tasks] == list(TASKS)
    splits: dict[str, set[str]] = {}
    for task in tasks:
        for split, examples in task.examples.items():
            counts = [sum(e.label == i for e in examples) for i in range(len(task.classes))]
            assert min(counts) == max(counts) > 0
            assert len({e.text for e in examples}) == len(examples)
            for example in examples:
                splits.setdefault(example.document, set()).add(split)
                assert continual_tasks.split_of(example.document) == split
    assert all(len(found) == 1 for found in splits.values())
    assert shared not in {e.text for task in tasks for s in SPLITS for e in task.examples[s]}
    assert continual_tasks.build(facts) == tasks
    assert continual_tasks.fingerprint(tasks) == continual_tasks.fingerprint(tasks)
    assert continual_tasks.fingerprint(tasks[:4]) != continual_tasks.fingerprint(tasks)


def test_tasks_are_built_by_name() -> None:
    facts = made_facts(600)
    every = {task.name: task for task in continual_tasks.build(facts)}
    some = continual_tasks.build(facts, names=("library", "mathematics"))
    assert some == [every["library"], every["mathematics"]]
    with pytest.raises(ValueError, match="of task 'library'"):
        continual_tasks.load(names=("library",), packages={"networkx": ()})


def test_splits_are_about_as_large_as_they_say() -> None:
    found = [continual_tasks.split_of(f"package/file{i}.py") for i in range(4000)]
    for split, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert abs(found.count(split) / 4000 - share) < 0.03  # type: ignore[arg-type]


def test_too_little_text_is_refused_by_task() -> None:
    with pytest.raises(ValueError, match="at least 60 examples a class of task 'mathematics'"):
        continual_tasks.build(made_facts(30))


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="package no_such_package_here"):
        continual_tasks.package_directory("no_such_package_here")


# figures of an accuracy matrix
