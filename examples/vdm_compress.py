"""Lossless compression with a variational diffusion model: bits-back coding (Sec. 6.3, App. N).

    python examples/vdm_train.py --data data/digits8x8.npz --levels 17 --out run
    python examples/vdm_compress.py --model run --data data/digits8x8.npz --count 32 --out a.npz
    python examples/vdm_compress.py --model run --restore a.npz --out digits.npz

Idea      Sender and receiver share the model with T steps. The sender takes bits that are on the
          stack already, and reads them as if they were the code of z_T ~ q(z_T | x), then of each
          z_s ~ q(z_s | z_t, x). Then it puts x, z_0, ..., z_T on the stack by the model's own
          distributions. The receiver takes these off in turn, knows x, and puts the bits back that
          the sender took. What a picture adds to the stack is its bound of T steps, on average.
Stack     rANS: each number of a picture has a lane of its own, with a head of 64 bits; the lanes
          share one tail of 32-bit words. A real number becomes one of 2 LIMIT + 1 cells, each WIDTH
          standard deviations wide, around the model's mean. The probability of a symbol is a whole
          number of shares out of 2^SHARE_BITS, and never 0.
Start     The first picture needs bits to take: random ones, which are stored too and come back on
          --restore. The net rate does not count them; it is what each further picture costs. So
          the file of a few pictures is larger than they are, which is printed.
Exact     The receiver must compute the same means to the last bit: on the same machine with the
          same versions, and the same device; with another number of threads that is not certain. A
          checksum tells if it failed: keep the pictures until --restore has succeeded.
Pictures  Of a file that vdm_train.py has trained on, nine tenths were trained on: the rate of
          others is higher.
Needs     examples/requirements.txt (orbax-checkpoint, pillow), through vdm_train.py.
Axes      D numbers of a picture, H x W x C  V levels
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr  # scipy comes with jax

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the imports below, from any folder
import train  # noqa: E402
import vdm_train  # noqa: E402

import vdm  # noqa: E402
from vdm import read_npz, require, run_program, write_npz  # noqa: E402

# With fewer bits probabilities are rounded more; with more the heads, of 64 bits, are.
SHARE_BITS = 20
WIDTH = 1 / 8  # of a cell, in standard deviations
LIMIT = 80  # cells on each side of the mean: 10 deviations
# For Stack.scramble: 2^32 over the golden ratio, which spreads neighbouring numbers. It is odd, so
# that multiplying by it modulo 2^32 can be undone.
FACTOR = 2654435761

# ==== The stack (rANS) ============================================================================


class Stack:
    """A last-in, first-out store of symbols, each coded by its share of 2^SHARE_BITS.

    heads uint64 [D], each from 2^32 up to 2^64, and a tail of uint32 words.
    """

    def __init__(self, heads, tail):
        self.heads = heads
        self.tail = tail  # a list of arrays

    def push(self, start, share):
        """Adds a symbol to each lane: `share` of the 2^SHARE_BITS numbers, from `start` on.

        A head becomes (head // share) 2^SHARE_BITS + head % share + start, which pop inverts.
        """
        start = start.astype(np.uint64)
        share = share.astype(np.uint64)
        limit = share << np.uint64(64 - SHARE_BITS)  # from here on the new head exceeds 64 bits
        full = self.heads >= limit
        if full.any():
            self.tail.append(self.heads[full].astype(np.uint32))  # the lower half
            self.heads[full] >>= np.uint64(32)
        quotient, rest = np.divmod(self.heads, share)
        self.heads = (quotient << np.uint64(SHARE_BITS)) + rest + start

    def peek(self):
        """The number below 2^SHARE_BITS in each lane, which tells the next symbol."""
        return self.heads & np.uint64(2**SHARE_BITS - 1)

    def pop(self, start, share):
        """Takes off the symbol that peek told."""
        low = self.peek()
        share = share.astype(np.uint64)
        self.heads = share * (self.heads >> np.uint64(SHARE_BITS)) + low - start.astype(np.uint64)
        empty = self.heads < np.uint64(2**32)
        if empty.any():
            words = self.take(int(empty.sum()))
            self.heads[empty] = (self.heads[empty] << np.uint64(32)) + words

    def take(self, count):
        """The last words of the tail. Raises ValueError if there are too few."""
        parts = []
        missing = count
        while missing:
            require(self.tail, "the stack is empty: it is damaged, or began with too few bits")
            last = self.tail.pop()
            piece = last[-missing:]
            rest = last[:-missing]
            if len(rest):
                self.tail.append(rest)
            parts.insert(0, piece)
            missing -= len(piece)
        return np.concatenate(parts).astype(np.uint64)

    def scramble(self, factor):
        """Multiplies the lower half of each head by an odd number, modulo 2^32.

        A latent is read from bits that the picture before has written. Unscrambled it would be
        nearly the same one again, picture after picture, and not a fresh draw.
        """
        low = self.heads & np.uint64(2**32 - 1)
        product = low * np.uint64(factor)  # of two numbers below 2^32: below 2^64
        mixed = product & np.uint64(2**32 - 1)
        self.heads = self.heads - low + mixed

    def bits(self):
        """Bits of information on the stack."""
        words = sum(len(part) for part in self.tail)
        return 32 * words + float(np.log2(self.heads.astype(np.float64)).sum())


def new_stack(lanes, words, seed):
    """A stack of random bits."""
    rng = np.random.default_rng(seed)
    heads = rng.integers(2**32, 2**63, lanes, dtype=np.uint64)
    return Stack(heads, [rng.integers(0, 2**32, words, dtype=np.uint32)])


# ==== Distributions in whole shares ===============================================================


def normal_start(cell, shift, scale):
    """The first share of a cell: the cumulative distribution in whole shares. Any shape.

    The distribution is N(shift, scale^2) in units of the grid's standard deviation. cell: from
    -LIMIT to LIMIT + 1, where the last one is the end of all shares.
    """
    edge = (cell - 0.5) * WIDTH
    below = ndtr((edge - shift) / scale)
    below = np.where(cell <= -LIMIT, 0.0, below)
    below = np.where(cell > LIMIT, 1.0, below)
    cells = 2 * LIMIT + 1
    own = cell + LIMIT  # one share for each cell before this one, so that none is impossible
    return np.floor(below * (2**SHARE_BITS - cells)).astype(np.int64) + own


def push_normal(stack, cell, shift, scale):
    """Puts a cell of each lane on the stack, by N(shift, scale^2)."""
    start = normal_start(cell, shift, scale)
    stack.push(start, normal_start(cell + 1, shift, scale) - start)


def pop_normal(stack, shift, scale):
    """Takes a cell of each lane off the stack, by bisection."""
    number = stack.peek().astype(np.int64)
    low = np.full(number.shape, -LIMIT)
    high = np.full(number.shape, LIMIT + 1)
    while (high - low > 1).any():
        middle = (low + high) // 2
        right = normal_start(middle, shift, scale) <= number
        low = np.where(right, middle, low)
        high = np.where(right, high, middle)
    start = normal_start(low, shift, scale)
    stack.pop(start, normal_start(low + 1, shift, scale) - start)
    return low


def level_starts(logits):
    """Where the shares of the levels begin. [D,V] -> [D,V+1]."""
    weights = np.exp(logits - logits.max(1, keepdims=True))
    below = np.cumsum(weights, axis=1) / weights.sum(1, keepdims=True)
    levels = logits.shape[1]
    own = np.arange(1, levels + 1)  # one share for each level, so that none is impossible
    ends = np.floor(below * (2**SHARE_BITS - levels)).astype(np.int64) + own
    ends[:, -1] = 2**SHARE_BITS  # below is not exactly 1 there
    return np.pad(ends, ((0, 0), (1, 0)))


# ==== Bits back ===================================================================================


def take_bits(stack, shift, scale):
    """Reads a cell of each lane from the bits on the stack, as a draw from N(shift, scale^2)."""
    stack.scramble(FACTOR)
    return pop_normal(stack, shift, scale)


def give_bits_back(stack, cell, shift, scale):
    """Undoes take_bits."""
    push_normal(stack, cell, shift, scale)
    stack.scramble(pow(FACTOR, -1, 2**32))


def alpha(gamma):
    """vdm.alpha in float64."""
    return math.sqrt(1 / (1 + math.exp(gamma)))


def sigma(gamma):
    """vdm.sigma in float64."""
    return alpha(-gamma)


def encode(picture, levels):
    """vdm.encode in float64."""
    return 2 * (picture + 0.5) / levels - 1


def posterior(z_t, eps, gamma_s, gamma_t):
    """vdm.posterior in float64, but the mean and the standard deviation (Eq. 31, 32)."""
    ratio_minus_1 = math.expm1(gamma_s - gamma_t)
    mean = alpha(gamma_s) / alpha(gamma_t) * (z_t + sigma(gamma_t) * ratio_minus_1 * eps)
    return mean, sigma(gamma_s) * math.sqrt(-ratio_minus_1)


class Coder:
    """Puts pictures on a stack and takes them off, by a model with T steps."""

    def __init__(self, params, config, T):
        self.config = config
        self.T = T
        gammas = vdm.noise_schedule(params["gamma"], np.arange(T + 1) / T, config)
        self.gammas = np.asarray(gammas, np.float64)  # [T+1]
        network = functools.partial(vdm.score_network, config=config)
        self.score = functools.partial(jax.jit(network), params["score_model"])

    def model_step(self, z_t, i):
        """Mean [D] and deviation of p(z_s | z_t), for t = i / T and s = (i - 1) / T."""
        z = jnp.asarray(z_t.reshape(1, *self.config.shape), jnp.float32)
        gamma_t = jnp.full(1, np.float32(self.gammas[i]))
        eps = np.asarray(self.score(z, gamma_t, jnp.zeros(1)), np.float64).ravel()
        return posterior(z_t, eps, self.gammas[i - 1], self.gammas[i])

    def data_mean(self, z_t, x, i):
        """Mean [D] of q(z_s | z_t, x). Its deviation is that of model_step."""
        gamma_t = self.gammas[i]
        eps = (z_t - alpha(gamma_t) * x) / sigma(gamma_t)
        mean, _ = posterior(z_t, eps, self.gammas[i - 1], gamma_t)
        return mean

    def decoder(self, z_0):
        """Where the shares of the levels begin. [D] -> [D,V+1]."""
        gamma_0 = self.gammas[0]
        values = encode(np.arange(self.config.levels), self.config.levels)
        x = z_0 / alpha(gamma_0)
        return level_starts(-0.5 * math.exp(-gamma_0) * np.square(x[:, None] - values))

    def push(self, stack, picture):
        """Adds a picture, integers [H,W,C]."""
        picture = picture.astype(np.int64).ravel()
        x = encode(picture, self.config.levels)
        gamma_1 = self.gammas[-1]
        first = take_bits(stack, alpha(gamma_1) * x, sigma(gamma_1))
        z = first * WIDTH  # z_T, on a grid around 0 whose deviation is 1
        taken = []
        for i in range(self.T, 0, -1):
            p_mean, deviation = self.model_step(z, i)
            q_mean = self.data_mean(z, x, i)
            cell = take_bits(stack, (q_mean - p_mean) / deviation, 1.0)
            taken.append(cell)
            z = p_mean + cell * WIDTH * deviation
        starts = self.decoder(z)
        lanes = np.arange(len(picture))
        start = starts[lanes, picture]
        stack.push(start, starts[lanes, picture + 1] - start)
        for cell in reversed(taken):  # z_0 first
            push_normal(stack, cell, 0.0, 1.0)
        push_normal(stack, first, 0.0, 1.0)

    def pop(self, stack):
        """Takes off the picture that was added last. -> integers [H,W,C]."""
        first = pop_normal(stack, 0.0, 1.0)
        z = first * WIDTH
        path = []  # each entry: i, z_t, the cell of z_s, mean and deviation of the model
        for i in range(self.T, 0, -1):
            p_mean, deviation = self.model_step(z, i)
            cell = pop_normal(stack, 0.0, 1.0)
            path.append((i, z, cell, p_mean, deviation))
            z = p_mean + cell * WIDTH * deviation
        starts = self.decoder(z)
        number = stack.peek().astype(np.int64)
        picture = (starts[:, 1:] <= number[:, None]).sum(1)  # the levels that end before number
        lanes = np.arange(len(picture))
        start = starts[lanes, picture]
        stack.pop(start, starts[lanes, picture + 1] - start)
        x = encode(picture, self.config.levels)
        for i, z_t, cell, p_mean, deviation in reversed(path):
            q_mean = self.data_mean(z_t, x, i)
            give_bits_back(stack, cell, (q_mean - p_mean) / deviation, 1.0)
        gamma_1 = self.gammas[-1]
        give_bits_back(stack, first, alpha(gamma_1) * x, sigma(gamma_1))
        return picture.reshape(self.config.shape)


def bound_of(params, images, config, steps, key):
    """The bound with T steps on the cost of images, as bits_per_dim returns it."""
    # Config refuses the objective "variance" for a finite number of steps.
    config = dataclasses.replace(config, timesteps=steps, schedule_objective="bound")
    return vdm.bits_per_dim(params, images, key, config, batch=min(64, len(images)), repeats=16)


# ==== Program =====================================================================================


def checksum_of(*arrays) -> int:
    """The CRC-32 of the arrays' bytes, one after the other."""
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum


def compress(args):
    """Writes the first --count pictures as a stack."""
    params, config = vdm_train.load_model(args.model)
    images = vdm_train.read_images(args.data, config.levels)
    vdm.check_images(images, config)
    require(1 <= args.count <= len(images), f"--count {args.count} is not from 1 to {len(images)}")
    images = images[: args.count]
    require(config.levels < 2**SHARE_BITS, f"{config.levels} levels are too many for this program")
    coder = Coder(params, config, args.steps)
    lanes = math.prod(config.shape)
    words = lanes * (args.steps + 8) // 2  # 16 bits for each number and step, of which 5 are used
    stack = new_stack(lanes, words, args.seed)
    before = stack.bits()
    for picture in images:
        coder.push(stack, picture)
    rate = (stack.bits() - before) / images.size
    heads = stack.heads
    tail = np.concatenate(stack.tail)
    arrays = {
        "heads": heads,
        "tail": tail,
        "stack_checksum": np.uint32(checksum_of(heads, tail)),
        "steps": np.int64(args.steps),
        "count": np.int64(args.count),
        "checksum": np.uint32(checksum_of(images.astype(np.int64))),
    }
    write_npz(args.out, arrays)
    size = os.path.getsize(args.out)
    print(f"wrote {args.out}: {size:,} bytes, {before / 8:,.0f} of them to begin with")
    bound = bound_of(params, images, config, args.steps, jax.random.key(args.seed))
    print(f"bits per dimension by the bound with T = {args.steps}: {bound['total']:.3f}")
    print(f"result: net rate {rate:.3f} bits per dimension, {args.count} pictures")


def restore(args):
    """Writes the pictures of a stack as an .npz."""
    params, config = vdm_train.load_model(args.model)
    data = read_npz(args.restore)
    wanted = {"heads": "u8", "tail": "u4", "steps": "i8", "count": "i8"}
    wanted.update(checksum="u4", stack_checksum="u4")
    for name, kind in wanted.items():
        require(
            name in data and data[name].dtype.str[1:] == kind,
            f"{args.restore} is no file of this program: {name} is missing or of another type",
        )
    require(
        checksum_of(data["heads"], data["tail"]) == int(data["stack_checksum"]),
        f"{args.restore} is damaged: its checksum is wrong",
    )
    lanes = math.prod(config.shape)
    require(
        data["heads"].shape == (lanes,),
        f"{args.restore} has {data['heads'].size} lanes, not {lanes}: it belongs to another model",
    )
    coder = Coder(params, config, int(data["steps"]))
    stack = Stack(data["heads"].copy(), [data["tail"]])
    images = []
    for _ in range(int(data["count"])):
        images.append(coder.pop(stack))
    images = np.stack(images[::-1])  # the last one came first
    require(
        checksum_of(images) == int(data["checksum"]),
        f"{args.restore} was written with another model, or on another machine",
    )
    kind = np.uint8 if config.levels <= 256 else np.int32
    write_npz(args.out, {"images": images.astype(kind)})
    print(f"wrote {args.out}: {len(images)} pictures")


def main(argv=None) -> int:
    """Returns the exit status: 0, or 2 for bad input, which is told in one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder that vdm_train.py wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="an .npz with the array images, to compress")
    what.add_argument("--restore", metavar="FILE", help="a file of this program, to restore")
    parser.add_argument("--count", type=int, default=16, help="pictures to compress (--data)")
    parser.add_argument(
        "--steps",
        type=int,
        default=50,
        help="T of the model, in compressing: more come closer to the bound and take longer",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bits to begin with (--data)")
    parser.add_argument("--out", required=True, help="the file to write, .npz")
    args = parser.parse_args(argv)
    try:
        require(args.steps >= 1, f"--steps {args.steps} is not at least 1")
        require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
        folder = pathlib.Path(args.out).parent
        require(os.access(folder, os.W_OK), f"--out {args.out}: its folder cannot be written to")
        if args.restore:
            restore(args)
        else:
            compress(args)
    except ValueError as error:
        print(f"vdm_compress.py: {train.first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
