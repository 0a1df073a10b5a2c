"""The continual bench's own logic on hand-made text and matrices, and a tiny run end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import __main__ as cli
from bench import (
    continual,
    continual_cost,
    continual_plot,
    continual_rows,
    continual_run,
    continual_tasks,
    minilm,
    mrr_sweep,
    redundancy,
    report,
)
from bench.continual_methods import (
    COMPARED,
    INPUT_ENERGY,
    METHODS,
    Plain,
    Tokens,
    linear_weights,
)
from bench.continual_rows import Row
from bench.continual_run import Encoded, EncodedTask, Setting
from bench.continual_tasks import SPLITS, TASKS, Fact, Split

SMALL = minilm.Config(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=16,
)
COUNTS: dict[Split, int] = {"train": 60, "validation": 12, "test": 30}


def small_encoder(seed: int = 0) -> minilm.SentenceEncoder:
    torch.manual_seed(seed)
    return minilm.SentenceEncoder(SMALL).eval()


def small_tasks(count: int, seed: int = 0) -> list[EncodedTask]:
    """Three classes, told apart by the first token; the same token means another class later."""
    generator = torch.Generator().manual_seed(seed)

    def examples(size: int, task: int) -> Encoded:
        labels = torch.arange(size) % 3
        ids = torch.randint(20, SMALL.vocab_size, (size, 6), generator=generator)
        ids[:, 0] = (labels + task) % 3 + 1
        mask = torch.arange(6)[None, :] < torch.randint(3, 7, (size, 1), generator=generator)
        return Encoded(ids, mask, labels)

    return [
        EncodedTask(f"t{i}", 3, {split: examples(COUNTS[split], i) for split in SPLITS})
        for i in range(count)
    ]


def sequences(tasks: int = 2, steps: int = 2, **options: object) -> continual.Sequences:
    setting = Setting(steps=steps, batch=4)
    return continual.Sequences(small_encoder(), small_tasks(tasks), setting, text="made", **options)  # type: ignore[arg-type]


# text and splits


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


def test_figures_of_a_matrix() -> None:
    R = [[0.9], [0.6, 0.8], [0.5, 0.9, 0.7]]
    assert continual_run.average_accuracy(R) == pytest.approx(0.7)
    assert continual_run.learned(R) == pytest.approx(0.8)
    assert continual_run.forgetting(R) == pytest.approx([0.4, -0.1])  # the second one gained
    assert continual_run.mean_forgetting(R) == pytest.approx(0.15)
    assert continual_run.mean_forgetting([[0.9]]) == 0.0


def test_spread_is_mean_and_sample_deviation() -> None:
    spread = continual_rows.Spread.over([0.1, 0.2, 0.3])
    assert (spread.mean, spread.deviation) == pytest.approx((0.2, 0.1))
    assert str(continual_rows.Spread.over([0.5])) == "50.0 ± 0.0"


def summary(method: str, average: float, forgotten: float) -> continual_rows.Summary:
    R = [[average + forgotten], [average, average]]
    run = continual_rows.Run(method, 0, 1e-3, R, ("a", "b"))
    return continual_rows.summarise([run, run])


def judge(summaries: dict[str, continual_rows.Summary]) -> str:
    return continual_rows.verdict(summaries, "complement", "ours")


def test_verdict_says_yes_and_no_from_the_figures() -> None:
    plain, osf = summary("plain", 0.6, 0.15), summary("peft-osf", 0.65, 0.02)
    good = {"plain": plain, "peft-osf": osf, "complement": summary("complement", 0.66, 0.04)}
    assert judge(good).count("yes") == 3
    bad = good | {"complement": summary("complement", 0.59, 0.06)}
    assert judge(bad).count("NO") == 3
    mixed = judge(good | {"complement": summary("complement", 0.62, 0.04)})
    assert (mixed.count("yes"), mixed.count("NO")) == (2, 1)
    assert "peft-osf did not run" in judge({"plain": plain, "complement": plain})


# training


@pytest.mark.parametrize("steps", [1, 7, 80])
def test_rate_warms_up_and_ends_near_zero(steps: int) -> None:
    factors = [continual_run.slope(i, steps) for i in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[-1] == pytest.approx(1 / steps)
    assert continual_run.slope(steps, steps) == 0


def test_ranks_grow_over_the_sequence() -> None:
    setting = Setting(ranks=(0.3, 0.7))
    assert [setting.rank(i, 5) for i in range(5)] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert setting.rank(0, 1) == 0.3


def test_order_shows_every_example_before_any_again() -> None:
    order = continual_run.order_of(7, 17, torch.Generator().manual_seed(3))
    assert len(order) == 17
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == list(range(7))


def test_accuracy_counts_by_example_whatever_the_lengths() -> None:
    examples = small_tasks(1)[0].splits["test"]
    encoder = small_encoder()
    head = continual_run.new_head(24, 3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        one_by_one = [
            int(continual_run.logits(encoder, head, examples.batch(i[None])).argmax())
            for i in torch.arange(30)
        ]
    wanted = (torch.tensor(one_by_one) == examples.labels).double().mean()
    assert continual_run.accuracy(encoder, head, examples) == pytest.approx(float(wanted))


PEFT = ("lora", "peft-osf")


def require_peer(method: str) -> None:
    if method in PEFT:
        pytest.importorskip("peft", reason="the method is peft's")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_train_linear_weights_alone(method: str) -> None:
    require_peer(method)
    encoder = small_encoder()
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    learner = METHODS[method].build(encoder)
    tokens = small_tasks(1)[0].splits["train"].batch(torch.arange(8))
    for task in range(2):
        model = learner.begin(task, 0.5, [tokens])
        head = continual_run.new_head(24, 3, torch.Generator().manual_seed(1))
        optimizer = continual_run.trainer(model, head, 1e-2)
        learner.protect(optimizer)
        continual_run.step(model, head, optimizer, tokens, torch.arange(8) % 3)
        learner.end()
    if method == "lora":  # merged here to look at; the sequence goes on with the adapter
        learner.encoder = learner.encoder.merge_and_unload()  # type: ignore[operator]
    after = dict(learner.encoder.named_parameters())
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    linear = set(linear_weights(small_encoder()))
    if method == "everything":
        assert moved > linear
    else:
        assert moved == linear


@pytest.mark.parametrize(("method", "pinned"), [("complement", True), ("no-restore", False)])
def test_ours_pins_the_protected_part(method: str, pinned: bool) -> None:
    encoder = small_encoder()
    weights = linear_weights(encoder)
    before = {name: w.detach().double().clone() for name, w in weights.items()}
    run_a_task(METHODS[method].build, encoder, 0.5)

    def moved(name: str) -> float:
        U, _, Vh = torch.linalg.svd(before[name], full_matrices=False)
        r = min(before[name].shape) // 2
        change = weights[name].detach().double() - before[name]
        inside = (U[:, :r].mT @ change).norm() + (change @ Vh[:r].mT).norm()
        return float(inside / change.norm())

    worst = max(map(moved, weights))
    assert (worst < 1e-3) == pinned


def test_ours_with_inputs_keeps_later_updates_off_earlier_inputs() -> None:
    encoder = small_encoder()
    learner = METHODS["inputs"].build(encoder)
    first, second = (task.splits["train"] for task in small_tasks(2))
    a_task(learner, first)
    seen = inputs_of(encoder, first.batch(torch.arange(8)))
    before = {name: w.detach().double().clone() for name, w in linear_weights(encoder).items()}
    a_task(learner, second)
    for name, W in linear_weights(encoder).items():
        change = W.detach().double() - before[name]
        share = (change @ seen[name]).norm() / (seen[name].norm() * torch.linalg.norm(change, 2))
        assert 0 < share <= (1 - INPUT_ENERGY) ** 0.5 + 1e-3, name


def inputs_of(encoder: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
    """Columns that each linear weight is multiplied with, padding left out."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({f"{name}.weight": args[0][tokens[1]].mT})
        )
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        encoder(*tokens)
    for handle in handles:
        handle.remove()
    return {name: x.double() for name, x in seen.items()}


def a_task(learner: Plain, examples: Encoded, rank: float = 0.5) -> None:
    tokens = examples.batch(torch.arange(8))
    model = learner.begin(0, rank, [tokens])
    head = continual_run.new_head(24, 3, torch.Generator().manual_seed(1))
    optimizer = continual_run.trainer(model, head, 1e-2)
    learner.protect(optimizer)
    for _ in range(4):
        continual_run.step(model, head, optimizer, tokens, torch.arange(8) % 3)
    learner.end()


def run_a_task(build: Callable[[nn.Module], Plain], encoder: nn.Module, rank: float) -> None:
    a_task(build(encoder), small_tasks(1)[0].splits["train"], rank)


def test_sequence_learns_and_leaves_the_encoder_alone() -> None:
    encoder, tasks = small_encoder(), small_tasks(2)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    asked = (METHODS["plain"].build, encoder, tasks, Setting(steps=40, batch=12))
    R = continual_run.train_sequence(*asked, learning_rate=3e-3, seed=0)
    assert [len(line) for line in R] == [1, 2]
    assert continual_run.learned(R) > 0.6  # of three classes
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
    assert continual_run.train_sequence(*asked, learning_rate=3e-3, seed=0) == R


def test_loss_that_overflows_is_an_error_that_names_the_task() -> None:
    asked = (METHODS["plain"].build, small_encoder(), small_tasks(1), Setting(steps=3, batch=4))
    with pytest.raises(FloatingPointError, match=r"task 't0' is (nan|inf)"):
        continual_run.train_sequence(*asked, learning_rate=math.inf, seed=0)


# rows, resuming, tuning


def test_finished_runs_are_read_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = tmp_path / "deep" / "rows.csv"
    said: list[str] = []
    found = sequences(say=said.append)
    first = found.run(csv, "plain", 0, 1e-3)
    assert [len(line) for line in first.matrix] == [1, 2]
    assert first.names == ("t0", "t1")
    assert len(said) == 4

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(continual, "train_sequence", refuse)
    again = sequences(say=said.append).run(csv, "plain", 0, 1e-3)
    assert again == first
    assert len(said) == 8  # the bar goes on all the same
    for other in (("plain", 1, 1e-3), ("plain", 0, 2e-3), ("complement", 0, 1e-3)):
        with pytest.raises(AssertionError, match="trained again"):
            sequences().run(csv, *other)
    for changed in (sequences(steps=3), sequences(model="another")):
        with pytest.raises(AssertionError, match="trained again"):
            changed.run(csv, "plain", 0, 1e-3)


def test_a_run_cut_short_in_the_file_is_not_taken_for_one(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    found = sequences()
    whole = found.run(csv, "plain", 0, 1e-3)
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(lines[:-1]))
    assert continual_rows.read(csv) == {}
    assert found.run(csv, "plain", 0, 1e-3) == whole
    assert len(continual_rows.read(csv)) == 1
    csv.write_text("".join(lines) + lines[-1][:20])  # killed in the middle of a line
    assert list(continual_rows.read(csv).values()) == [whole]


def scored(
    monkeypatch: pytest.MonkeyPatch, scores: dict[float, float]
) -> tuple[continual.Sequences, list[float]]:
    """Sequences whose validation accuracy is given by the learning rate."""
    asked: list[float] = []

    def train(*_: object, learning_rate: float, split: str, **__: object) -> list[list[float]]:
        assert split == "validation"
        asked.append(learning_rate)
        if math.isnan(scores[learning_rate]):
            raise FloatingPointError("overflow")
        value = scores[learning_rate]
        return [[value], [value, value]]

    monkeypatch.setattr(continual, "train_sequence", train)
    return sequences(), asked


@pytest.mark.parametrize(
    ("values", "tried", "best"),
    [
        ((0.9, 0.7, 0.6, 0.5, 0.4), [3e-4, 1e-4, 3e-5], 3e-5),
        ((0.4, 0.7, 0.6, 0.5, 0.9), [3e-4, 1e-4, 3e-5], 1e-4),
        ((0.9, 0.5, 0.6, 0.5, 0.9), [3e-4, 1e-3, 1e-4], 3e-4),
        ((0.0, 0.1, 0.2, 0.3, 0.4), [3e-4, 1e-3, 3e-3, 1e-4], 3e-3),
        ((0.0, 0.1, 0.2, 0.3, math.nan), [3e-4, 1e-3, 3e-3, 1e-4], 1e-3),
        ((0.2, 0.2, 0.2, 0.2, 0.2), [3e-4, 3e-5, 1e-4], 3e-5),
    ],
)
def test_tuning_climbs_the_grid(
    values: tuple[float, ...],
    tried: list[float],
    best: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, asked = scored(monkeypatch, dict(zip(continual.GRID, values, strict=True)))
    csv = tmp_path / "rates.csv"
    scores = found.tune(csv, "plain")
    assert sorted(asked) == sorted(tried) == sorted(scores)
    assert continual.rates_for(["plain"], csv, found) == {"plain": best}
    asked.clear()
    found.tune(csv, "plain")
    assert all(math.isnan(dict(zip(continual.GRID, values, strict=True))[rate]) for rate in asked)
    with pytest.raises(ValueError, match=r"no learning rate of lora for 2 steps .* --tune"):
        continual.rates_for(["plain", "lora"], csv, found)


def test_variants_of_ours_take_its_rate(tmp_path: Path) -> None:
    found = sequences()
    csv = tmp_path / "rates.csv"
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x")
    row = found.asked("complement", 0, 3e-4, "validation")
    report.append_csv(csv, continual_rows.rows_of(row, [[0.5], [0.5, 0.5]], "ab", 1.0), where, Row)
    assert continual.rates_for(["core", "adaptive"], csv, found) == {"core": 3e-4, "adaptive": 3e-4}
    with pytest.raises(ValueError, match=r"no learning rate of lora for"):
        continual.rates_for(["core", "lora"], csv, found)


def test_rates_of_another_setting_or_seed_do_not_count(tmp_path: Path) -> None:
    found = sequences()
    csv = tmp_path / "rates.csv"
    where = dict.fromkeys(report.ENVIRONMENT_FIELDS, "x")
    matrix = [[0.5], [0.5, 0.5]]
    right = found.asked("plain", 0, 1e-3, "validation")
    for other in ({"steps": 9}, {"seed": 1}, {"split": "test"}, {"text": "other"}):
        wrong = dataclasses.replace(right, learning_rate=1e-4, **other)
        better = [[0.9], [0.9, 0.9]]
        report.append_csv(csv, continual_rows.rows_of(wrong, better, "ab", 1.0), where, Row)
    report.append_csv(csv, continual_rows.rows_of(right, matrix, "ab", 1.0), where, Row)
    assert continual.rates_for(["plain"], csv, found) == {"plain": 1e-3}


# picture, table, cost


def some_runs() -> dict[str, list[continual_rows.Run]]:
    names = ("a", "b", "c")
    R = [[0.9], [0.6, 0.8], [0.5, 0.9, 0.7]]
    S = [[0.7], [0.8, 0.8], [0.7, 0.7, 0.7]]
    return {
        method: [continual_rows.Run(method, i, 1e-3, m, names) for i, m in enumerate((R, S))]
        for method in METHODS
    }


def test_course_of_a_task_is_its_mean_from_its_own_on() -> None:
    runs = some_runs()["plain"]
    assert continual_plot.course(runs, 0) == pytest.approx([0.8, 0.7, 0.6])
    assert continual_plot.course(runs, 2) == pytest.approx([0.7])


def test_picture_has_a_panel_a_task(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    picture = tmp_path / "deep" / "picture.png"
    continual_plot.draw(some_runs(), picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to plot"):
        continual_plot.draw({"plain": []}, picture)


def test_table_shows_every_method() -> None:
    pytest.importorskip("rich", reason="the table is rich's")
    from rich.console import Console

    from bench import continual_show

    summaries = {name: continual_rows.summarise(runs) for name, runs in some_runs().items()}
    costs = {"plain": continual_cost.Cost("plain", median_step_ms=12.0, times_plain=1.0)}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(continual_show.draw_table(summaries, costs, ["a", "b", "c"]))
    text = shown.get()
    assert all(METHODS[name].title in text for name in METHODS)
    assert "63.3" not in text  # of neither: (0.7 + 0.7)/2 is the average
    assert "70.0 ± 0.0" in text
    tuning = continual_show.tuning_table({"plain": {1e-4: 0.5, 3e-4: 0.6}}, continual.GRID)
    assert tuning.splitlines()[-1].split() == ["plain", "-", "50.0", "60.0", "-", "-", "0.0003"]


@pytest.mark.timing
@pytest.mark.slow
def test_step_times_are_of_every_method() -> None:
    names = ("plain", "complement")
    costs = continual_cost.times(names, small_encoder(), Setting(batch=4), rounds=3)
    assert list(costs) == list(names)
    assert costs["plain"].times_plain == 1.0
    for cost in costs.values():
        assert 0 < cost.p20_ms <= cost.median_step_ms <= cost.p80_ms
        assert cost.rounds == 3


def test_memory_counts_what_a_method_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = continual_cost.memory("plain", small_encoder(), Setting(batch=4))
    loaded, peak = found["loaded_mib"], found["peak_mib"]
    assert loaded is not None
    assert peak is not None
    assert 0 < loaded <= peak
    cost = continual_cost.Cost(loaded_mib=loaded, peak_mib=peak)
    assert cost.added_mib == peak - loaded
    assert continual_cost.Cost(peak_mib=peak).added_mib is None
    held: list[Tensor] = []

    def heavy(name: str, *_: object) -> tuple[Callable[[], object], float]:
        held.append(torch.ones(32 * 2**20))  # 128 MiB
        return (lambda: None), 0.0

    monkeypatch.setattr(continual_cost, "prepared", heavy)
    more = continual_cost.memory("plain", small_encoder(), Setting(batch=4))
    assert more["peak_mib"] is not None
    assert more["loaded_mib"] is not None
    assert more["peak_mib"] - more["loaded_mib"] > 100


def test_memory_in_a_process_of_its_own_reads_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"loaded_mib": 1.0, "peak_mib": 2.0, "steps_peak_mib": None}

    def answer(command: list[str], **_: object) -> object:
        assert command[1:4] == ["-m", "bench.continual_cost", "plain"]
        failed = "--batch" not in command or command[-1] != "4"
        return type(
            "Done", (), {"returncode": failed, "stdout": json.dumps(figures), "stderr": "why"}
        )

    monkeypatch.setattr(continual_cost.subprocess, "run", answer)
    assert continual_cost.memory_apart("plain", Setting(batch=4)) == figures
    with pytest.raises(RuntimeError, match="memory of plain: why"):
        continual_cost.memory_apart("plain", Setting(batch=5))


# redundancy


@pytest.mark.parametrize(("end", "share"), [("bottom", 0.5), ("top", 0.25), ("bottom", 0.0)])
def test_cut_zeroes_singular_directions(end: redundancy.End, share: float) -> None:
    encoder = small_encoder()
    found, energy = redundancy.cut(encoder, end, share)
    kept = whole = 0.0
    for name, weight in linear_weights(encoder).items():
        U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        zeroed = round(share * len(S))
        T = S.clone()
        T[len(S) - zeroed :] *= end == "top"
        T[:zeroed] *= end == "bottom"
        wanted = (U * T) @ Vh
        kept, whole = kept + float(T.square().sum()), whole + float(S.square().sum())
        got = linear_weights(found)[name].detach().double()
        assert (got - wanted).norm() <= 1e-5 * weight.norm()
    assert energy == pytest.approx(kept / whole, rel=1e-5)


def test_redundancy_of_nothing_zeroed_is_the_whole_model() -> None:
    rows = redundancy.measure(
        small_encoder(), small_tasks(2), (("bottom", 0.0), ("bottom", 0.5), ("top", 0.5))
    )
    assert rows[0].agreement == pytest.approx(1.0, abs=1e-6)
    assert rows[0].energy == 1.0
    assert rows[1].energy > 0.5 > rows[2].energy
    assert rows[1].agreement > rows[2].agreement
    text = redundancy.sentence(rows)
    assert f"{100 * rows[1].accuracy:.1f}%" in text
    assert redundancy.sentence(rows[:2]) == ""
    assert redundancy.table(rows).splitlines()[2].startswith("nothing")
    with pytest.raises(ValueError, match="share in"):
        redundancy.cut(small_encoder(), "top", 1.0)


def test_classifier_separates_what_is_separable() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(90) % 3
    features = 5 * torch.eye(3)[labels] + torch.randn(90, 3, generator=generator)
    assert redundancy.accuracy(features, labels, redundancy.classifier(features, labels, 3)) > 0.9


# command line


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands on the small encoder and made tasks."""

    def opened(
        setting: Setting, say: Callable[[str], object], *, quick: bool = False
    ) -> tuple[continual.Sequences, list[continual_tasks.Task]]:
        say("reading")
        names = list(TASKS)[:2]
        tasks = [
            continual_tasks.Task(name, ("a", "b", "c"), dict.fromkeys(SPLITS, ())) for name in names
        ]
        made = [
            dataclasses.replace(task, name=name)
            for task, name in zip(small_tasks(2), names, strict=True)
        ]
        found = continual.Sequences(small_encoder(), made, setting, model="small", text="made")
        return found, tasks

    monkeypatch.setattr(continual_tasks, "sources", lambda: "made up")
    for module in (continual, mrr_sweep, redundancy):
        monkeypatch.setattr(module, "opened", opened)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_tune_then_run_writes_rows_costs_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich", "matplotlib", "peft"):
        pytest.importorskip(module, reason="what the command draws with and compares to")
    csv, rates = tmp_path / "out.csv", tmp_path / "rates.csv"
    common = ["continual", "--steps", "6", "--batch", "8", "--csv", str(csv), "--rates", str(rates)]
    methods = ["--methods", "plain,peft-osf,complement"]
    assert cli.main([*common, *methods]) == 2
    assert "has no learning rate of plain, peft-osf, complement" in capsys.readouterr().err
    assert cli.main([*common, *methods, "--tune"]) == 0
    assert not csv.exists()
    assert "peft-osf" in capsys.readouterr().out
    rest = ["--seeds", "2", "--rounds", "0"]
    assert cli.main([*common, *methods, *rest]) == 0
    out = capsys.readouterr().out
    assert "Over 2 seeds, 'ours' forgets" in out
    assert len(continual_rows.read(csv)) == 6
    assert csv.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    written = csv.read_bytes()
    assert cli.main([*common, *methods, *rest]) == 0
    assert csv.read_bytes() == written


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_quick_run_takes_one_seed_and_two_steps(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the table is rich's")
    csv = tmp_path / "quick.csv"
    command = ["continual", "--quick", "--methods", "plain,complement", "--csv", str(csv)]
    assert cli.main([*command, "--rounds", "1"]) == 0
    assert {(r.seed, r.learning_rate) for r in continual_rows.read(csv).values()} == {(0, 1e-3)}
    assert {row["steps"] for row in report.read_csv(csv)} == {"2"}
    assert [row["method"] for row in report.read_csv(tmp_path / "quick_cost.csv")] == [
        "plain",
        "complement",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_mrr_sweep_and_redundancy_print_and_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="the bar is rich's")
    csv = tmp_path / "mrr.csv"
    command = ["mrr", "--mrr", "0.1,0.5", "--trr", "0.5", "--steps", "3", "--csv", str(csv)]
    assert cli.main(command) == 0
    assert {run.method for run in continual_rows.read(csv).values()} == {
        "adaptive mrr=0.1",
        "adaptive mrr=0.5",
    }
    assert cli.main(["mrr", "--mrr", "0.9", "--trr", "0.5", "--csv", str(csv)]) == 2
    assert "mrr <= trr" in capsys.readouterr().err
    assert cli.main(["redundancy", "--csv", str(tmp_path / "redundancy.csv")]) == 0
    assert "Without the bottom half" in capsys.readouterr().out
    assert len(report.read_csv(tmp_path / "redundancy.csv")) == len(redundancy.CUTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds to be at least 1"),
        (["--steps", "0"], "--steps to be at least 1"),
        (["--batch", "-1"], "--batch to be at least 1"),
        (["--ranks", "0.5"], "--ranks to be two shares in (0, 1), got 0.5"),
        (["--ranks", "0.5,1.5"], "--ranks to be two shares in (0, 1)"),
    ],
)
def test_numbers_that_make_no_run_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="the command draws with rich")
    assert cli.main(["continual", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="the command draws with rich")
    assert cli.main(["continual", "--methods", "plain,nothing"]) == 2
    assert "got nothing" in capsys.readouterr().err
    assert set(COMPARED) < set(METHODS)
