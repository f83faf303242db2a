"""examples/listops.py: the published rules, the model, and the program as a user runs it."""

import functools
import random
import re
import sys

import jax
import numpy as np
import optax
import pytest

from common import ROOT, close

sys.path.insert(0, str(ROOT / "examples"))
import byte_lm  # noqa: E402
import listops  # noqa: E402

TINY = byte_lm.Config(width=16, depth=2, heads=2, mlp=32)
NAMES = listops.SYMBOLS


def text_of(tree):
    return " ".join(NAMES[token] for token in tree)


def value_by_hand(words):
    """The value of a tree's text, by a stack; MED and SM as the Long Range Arena defines them."""
    stack = []
    for word in words:
        if word != "]":
            stack.append(word)
            continue
        values = []
        while stack[-1] not in listops.OPERATORS:
            values.insert(0, int(stack.pop()))
        operator = stack.pop()
        found = {
            "[MIN": min(values),
            "[MAX": max(values),
            "[MED": int(np.median(values)),
            "[SM": sum(values) % 10,
        }
        stack.append(str(found[operator]))
    (value,) = stack
    return int(value)


@pytest.mark.parametrize(
    ("operator", "values", "want"),
    [
        ("[MIN", [4, 7], 4),
        ("[MAX", [4, 7], 7),
        ("[MED", [4, 7], 5),  # 5.5, rounded down
        ("[MED", [9, 1, 3], 3),
        ("[SM", [4, 7], 1),
    ],
)
def test_values_by_hand(operator, values, want):
    assert listops.value_of(operator, values) == want


def test_trees_follow_the_published_rules():
    """A quarter of the arguments are operators, of each kind alike; two to ten arguments."""
    rng = random.Random(0)
    arguments = []
    operators = []
    deepest = 0
    for _ in range(4000):
        tree, value = listops.draw_tree(rng)
        words = text_of(tree).split()
        assert value == value_by_hand(words)
        counts = []
        for word in words:
            if word == "]":
                arguments.append(counts.pop())
                continue
            if counts:
                counts[-1] += 1
            if word in listops.OPERATORS:
                operators.append(word)
                counts.append(0)
                deepest = max(deepest, len(counts))
    assert min(arguments) == 2 and max(arguments) == 10
    assert np.mean(arguments) == pytest.approx(6, abs=0.1)
    for operator in listops.OPERATORS:
        assert operators.count(operator) / len(operators) == pytest.approx(0.25, abs=0.02)
    assert deepest == listops.DEEPEST - 1  # the last level has digits alone
    roots = [len(listops.draw_tree(rng)[0]) > 1 for _ in range(4000)]
    assert np.mean(roots) == pytest.approx(0.25, abs=0.03)


def test_examples_are_different_and_have_the_lengths_asked_for():
    tokens, lengths, values = listops.draw_examples(300, 10, 64, seed=0)
    assert tokens.shape == (300, 64)
    for row, length, value in zip(tokens, lengths, values):
        assert row[0] == listops.CLASS and not row[length:].any()
        tree = row[1:length]
        assert 10 < len(tree) < 64
        assert value == value_by_hand(text_of(tree).split())
    assert {len(row) for row in map(bytes, tokens)} == {64}
    assert len(set(map(bytes, tokens))) == 300
    assert 11 in lengths - 1 and 63 in lengths - 1
    again = listops.draw_examples(300, 10, 64, seed=0)
    assert (again[0] == tokens).all()
    assert (listops.draw_examples(300, 10, 64, seed=1)[0] != tokens).any()


@pytest.mark.parametrize("attention", ["memeff", "performer"])
def test_padding_does_not_count_and_every_token_does(attention):
    config = byte_lm.Config(width=16, depth=2, heads=2, mlp=32, attention=attention)
    params = byte_lm.init_params(jax.random.key(0), config)
    run = jax.jit(functools.partial(listops.forward, config=config))
    tokens, lengths, _ = (x[:2] for x in listops.draw_examples(8, 10, 64, seed=0))
    want = run(params, tokens, lengths)
    assert want.shape == (2, 10)
    padded = tokens.copy()
    padded[0, lengths[0] :] = 3
    close(run(params, padded, lengths), want, 1e-6)
    changed = tokens.copy()
    last = lengths[0] - 2  # before the last bracket
    changed[0, last] = (changed[0, last] + 1) % 10
    other = run(params, changed, lengths)
    assert abs(other[0] - want[0]).max() > 1e-4
    close(other[1], want[1], 1e-6)


def test_the_value_is_read_from_the_class_token():
    """Without attention and MLP it knows of no other token: all trees look alike."""
    params = byte_lm.init_params(jax.random.key(0), TINY)
    for name in ("out", "mlp2"):
        params["blocks"][name] = 0 * params["blocks"][name]
    tokens, lengths, _ = listops.draw_examples(8, 10, 64, seed=0)
    assert len(set(tokens[:, 1])) > 1
    logits = listops.forward(params, tokens, lengths, TINY)
    close(logits, np.tile(logits[:1], (8, 1)), 1e-6)


def test_the_loss_is_the_mean_cross_entropy():
    config = TINY
    params = byte_lm.init_params(jax.random.key(0), config)
    data = listops.draw_examples(6, 10, 64, seed=0)
    logits = np.float64(listops.forward(params, *data[:2], config))
    loss, right = listops.loss_fn(params, *data, config)
    nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), data[2]]
    close(loss, nats.mean(), 1e-5)
    assert int(right) == (logits.argmax(1) == data[2]).sum()


FLAGS = ["--examples", "64", "--steps", "2", "--width", "8", "--depth", "1", "--batch", "16"]
FLAGS += ["--shorter-than", "64"]


def test_program_trains_both(capsys, monkeypatch):
    monkeypatch.setattr(listops, "TEST_COUNT", 40)  # the last batch is not whole
    monkeypatch.setattr(listops, "REPORT", 1)
    assert listops.main(FLAGS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"64 trees to train with, median length \d+", lines[0])
    assert re.fullmatch(r"memeff, step 2: loss \d\.\d{3}, right \d+\.\d%", lines[2])
    for name, line in zip(("memeff", "performer"), (lines[3], lines[6])):
        result = rf"result: {name}: \d+\.\d% of 40 test trees right, \d+ ms a step"
        assert re.fullmatch(result, line)
    assert re.fullmatch(r"the commonest value is right for \d+\.\d%", lines[7])


def test_training_learns_and_tests_on_other_trees(monkeypatch):
    """Two examples, again and again: their values are known afterwards."""
    args = listops.make_parser().parse_args(["--steps", "40", "--learning-rate", "0.01"])
    args.batch = 8
    data = listops.draw_examples(2, 10, 64, seed=0)
    params, seconds = listops.train(TINY, data, args)
    assert listops.accuracy_of(params, TINY, data, 1) == 1 and seconds > 0
    wrong = (*data[:2], (data[2] + 1) % 10)
    assert listops.accuracy_of(params, TINY, wrong, 2) == 0

    seen = []
    monkeypatch.setattr(listops, "train", lambda config, data, args: (seen.append(data), 0.1))
    monkeypatch.setattr(listops, "accuracy_of", lambda *args: seen.append(args[2]) or 0.5)
    monkeypatch.setattr(listops, "TEST_COUNT", 40)
    listops.run(listops.make_parser().parse_args([*FLAGS, "--attention", "memeff"]))
    train_rows, test_rows = (set(map(bytes, data[0])) for data in seen)
    assert len(train_rows) == 64 and len(test_rows) == 40 and not train_rows & test_rows


def test_program_stops_at_a_loss_that_is_not_finite(capsys, monkeypatch):
    monkeypatch.setattr(listops, "TEST_COUNT", 16)
    assert listops.main([*FLAGS, "--steps", "8", "--learning-rate", "1e38"]) == 1
    assert re.fullmatch(
        r"listops.py: memeff, step \d: the loss is (nan|inf)\n", capsys.readouterr().err
    )


def test_the_weights_of_the_last_step_are_looked_at(capsys, monkeypatch):
    """No loss is computed with them: the first step's loss is finite, its update is not."""
    monkeypatch.setattr(listops, "TEST_COUNT", 16)
    monkeypatch.setattr(optax, "warmup_cosine_decay_schedule", lambda *args: np.inf)
    assert listops.main([*FLAGS, "--steps", "1", "--attention", "memeff"]) == 1
    message = "listops.py: memeff, the last step: weights are not finite\n"
    assert capsys.readouterr().err == message


def test_lengths_that_are_too_rare_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(listops, "MOST_MISSES", 1000)
    flags = ["--longer-than", "3000", "--shorter-than", "3002"]
    assert listops.main([*FLAGS, *flags]) == 2
    message = "of 1,000 trees none was new, longer than 3000 and shorter than 3002, when 0 of 2,064"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--examples", "0"], "--examples 0 is not at least 1"),
        (["--batch", "0"], "--batch 0 is not at least 1"),
        (["--steps", "0"], "--steps 0 is not at least 1"),
        (["--longer-than", "99"], "no length is above --longer-than 99 and below --shorter-than"),
        (["--longer-than", "5"], "--longer-than 5 --shorter-than 100 are not at least 10 and 64"),
        (["--shorter-than", "63"], "--shorter-than 63 are not at least 10 and 64: there would be"),
        (["--seed", "-1"], "--seed -1 is not in 0 to 4294967295"),
        (["--learning-rate", "nan"], "--learning-rate nan is not a number of at least 0"),
        (["--weight-decay", "-1"], "--weight-decay -1.0 is not a number of at least 0"),
        (["--width", "6"], "width=6 is not a multiple of 2 x heads=2"),
    ],
)
def test_program_refuses_in_one_line(flags, message, capsys):
    assert listops.main(flags) == 2
    out, error = capsys.readouterr()
    assert error.startswith("listops.py: ") and message in error and error.count("\n") == 1
    assert not out
