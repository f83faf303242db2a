"""ListOps of the Long Range Arena: a Transformer learns to work out nested lists of digits.

    python examples/listops.py
    python examples/listops.py --attention performer --longer-than 500 --shorter-than 2000 \\
        --examples 96000 --steps 5000 --width 512 --depth 6 --heads 8 --learning-rate 1e-3

Task      "[MAX 2 9 [MIN 4 7 ] 0 ]" has the value 9: ten classes. The operators are MIN, MAX, MED
          (the median, rounded down) and SM (the sum modulo 10). Trees are drawn by the published
          rules: up to 10 levels, 2 to 10 arguments, each with probability 1/4 an operator. Trees
          that are longer than --longer-than and shorter than --shorter-than are kept, without
          duplicates. The published data have lengths between 500 and 2,000, 96,000 examples to
          train with and 2,000 to test with.
Model     That of examples/byte_lm.py without a causal mask, and a class token in front.
          --attention memeff is exact softmax attention (memeff_attention.py), performer is FAVOR+
          (performer.py) with 256 positive features; both trains a model with each in turn.
Run       python examples/listops.py
          3.5 minutes on two CPU cores: softmax attention gets 45 % of 2,000 test trees right,
          FAVOR+ 40 %; the commonest value alone would be right for 15 %
Axes      B examples  T tokens of the longest tree and a class token
"""

import argparse
import functools
import math
import pathlib
import random
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the imports below, from any folder
import byte_lm  # noqa: E402

import memeff_attention as memeff  # noqa: E402
import performer  # noqa: E402
from vit import require, run_program  # noqa: E402

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = [*"0123456789", *OPERATORS, "]", "class"]  # a token is an index into this list
CLOSE = SYMBOLS.index("]")
CLASS = SYMBOLS.index("class")
DEEPEST = 10  # levels of a tree
TEST_COUNT = 2000  # examples to test with
MOST_MISSES = 100_000  # then there are too few trees of the lengths asked for
REPORT = 100  # steps between lines of progress


# ==== Data ========================================================================================


def value_of(operator, values) -> int:
    """The value of a list of digits."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[MED":
        return int(statistics.median(values))
    return sum(values) % 10


def draw_tree(rng, level=1):
    """A random tree: its tokens and its value."""
    if level == DEEPEST or rng.random() > 0.25:
        digit = rng.randrange(10)
        return [digit], digit
    operator = rng.choice(OPERATORS)
    tokens = [SYMBOLS.index(operator)]
    values = []
    for _ in range(rng.randint(2, 10)):
        part, value = draw_tree(rng, level + 1)
        tokens += part
        values.append(value)
    return [*tokens, CLOSE], value_of(operator, values)


def draw_examples(count, longer_than, shorter_than, seed):
    """Different trees: tokens int8 [count,shorter_than], lengths [count], values [count].

    The class token comes first, and zeros fill each row up. A length counts the class token.
    """
    rng = random.Random(seed)
    tokens = np.zeros((count, shorter_than), np.int8)
    lengths = np.zeros(count, np.int32)
    values = np.zeros(count, np.int32)
    known = set()
    misses = 0  # trees in a row that were of no use
    while len(known) < count:
        tree, value = draw_tree(rng)
        identity = bytes(tree)
        misses += 1
        require(
            misses < MOST_MISSES,
            f"of {misses:,} trees none was new, longer than {longer_than} and shorter than "
            f"{shorter_than}, when {len(known):,} of {count:,} had been found",
        )
        if longer_than < len(tree) < shorter_than and identity not in known:
            misses = 0
            row = len(known)
            known.add(identity)
            tokens[row, : len(tree) + 1] = [CLASS, *tree]
            lengths[row] = len(tree) + 1
            values[row] = value
    return tokens, lengths, values


# ==== Model =======================================================================================


def attention_of(config, mask):
    """The function (q, k, v) -> out that config names. mask bool [B,T]: True for tokens."""
    if config.attention == "performer":
        projection = byte_lm.projection_of(config)
        return functools.partial(performer.favor_attention, projection=projection, mask=mask)
    return functools.partial(memeff.attention, mask=mask[:, None, None, :])


def forward(params, tokens, lengths, config):
    """Logits of the ten values, read from the class token. [B,T], [B] -> [B,10]."""
    positions = jnp.arange(tokens.shape[1])
    attend = attention_of(config, positions < lengths[:, None])

    def layer(x, weights):
        return byte_lm.block(x, weights, positions, attend), None

    tokens = tokens.astype(jnp.int32)
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    x, _ = lax.scan(layer, byte_lm.embed(params, tokens, before), params["blocks"])
    return byte_lm.head(params, x[:, 0])[:, :10]


def loss_fn(params, tokens, lengths, values, config):
    """Mean cross-entropy, in nats, and the number of right answers."""
    logits = forward(params, tokens, lengths, config)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, values)
    return nats.mean(), (logits.argmax(-1) == values).sum()


# ==== Training ====================================================================================


def train(config, data, args):
    """Weights and the seconds of a step. data: as from draw_examples."""
    schedule = optax.warmup_cosine_decay_schedule(
        0, args.learning_rate, args.steps // 10 + 1, args.steps + 1
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=args.weight_decay)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, *batch):
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, right), grads = value_and_grad(params, *batch, config)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, right

    params = jax.jit(functools.partial(byte_lm.init_params, config=config))(
        jax.random.key(args.seed)
    )
    state = params, optimizer.init(params)
    total_right = 0
    for i in range(args.steps):
        rng = np.random.default_rng((args.seed, i))
        rows = rng.integers(len(data[0]), size=args.batch)
        *state, loss, right = step(*state, *(x[rows] for x in data))
        loss = float(loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{config.attention}, step {i + 1}: the loss is {loss}")
        if i == 0:
            start = time.time()  # after compilation
        total_right += int(right)
        if (i + 1) % REPORT == 0:
            accuracy = total_right / (REPORT * args.batch)
            total_right = 0
            print(f"{config.attention}, step {i + 1}: loss {loss:.3f}, right {accuracy:.1%}")
            sys.stdout.flush()
    seconds = (time.time() - start) / max(args.steps - 1, 1)
    params, _ = state
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise FloatingPointError(f"{config.attention}, the last step: weights are not finite")
    return params, seconds


def accuracy_of(params, config, data, batch):
    """The share of right answers."""

    @jax.jit
    def count_right(params, *batch):
        _, right = loss_fn(params, *batch, config)
        return right

    total = 0
    for first in range(0, len(data[0]), batch):
        total += int(count_right(params, *(x[first : first + batch] for x in data)))
    return total / len(data[0])


# ==== Program =====================================================================================


def make_parser():
    parser = argparse.ArgumentParser(description="Trains a Transformer on ListOps.")
    parser.add_argument("--attention", choices=("both", "memeff", "performer"), default="both")
    parser.add_argument("--longer-than", type=int, default=10, help="tokens of a tree")
    parser.add_argument("--shorter-than", type=int, default=100, help="tokens of a tree")
    parser.add_argument("--examples", type=int, default=10_000, help="to train with")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="highest of the schedule")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check_flags(args):
    for name in ("examples", "batch", "steps"):
        require(getattr(args, name) >= 1, f"--{name} {getattr(args, name)} is not at least 1")
    require(
        args.longer_than < args.shorter_than - 1,
        f"no length is above --longer-than {args.longer_than} and below --shorter-than "
        f"{args.shorter_than}",
    )
    require(
        args.longer_than >= 10 and args.shorter_than >= 64,
        f"--longer-than {args.longer_than} --shorter-than {args.shorter_than} are not at least 10 "
        "and 64: there would be too few different trees",
    )
    require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
    for name in ("learning_rate", "weight_decay"):
        value = getattr(args, name)
        flag = name.replace("_", "-")
        require(0 <= value < math.inf, f"--{flag} {value} is not a number of at least 0")


def run(args):
    check_flags(args)
    kinds = ("memeff", "performer") if args.attention == "both" else (args.attention,)
    configs = [
        byte_lm.Config(
            width=args.width,
            depth=args.depth,
            heads=args.heads,
            mlp=4 * args.width,
            attention=kind,
        )
        for kind in kinds
    ]
    bounds = args.longer_than, args.shorter_than
    data = draw_examples(args.examples + TEST_COUNT, *bounds, args.seed)
    train_data = [x[TEST_COUNT:] for x in data]
    test_data = [x[:TEST_COUNT] for x in data]
    _, lengths, values = test_data
    commonest = np.bincount(values).max() / TEST_COUNT
    median = np.median(lengths) - 1  # without the class token
    print(f"{args.examples:,} trees to train with, median length {median:.0f}", flush=True)
    for config in configs:
        params, seconds = train(config, train_data, args)
        accuracy = accuracy_of(params, config, test_data, args.batch)
        print(
            f"result: {config.attention}: {accuracy:.1%} of {TEST_COUNT:,} test trees right, "
            f"{seconds * 1e3:.0f} ms a step",
            flush=True,
        )
    print(f"the commonest value is right for {commonest:.1%}")


def main(argv=None) -> int:
    """Returns the exit status: 1 if the loss is not finite, 2 for bad input, in one line."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, FloatingPointError) as error:
        print(f"listops.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    run_program(main)
