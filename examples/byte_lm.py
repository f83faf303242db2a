"""A language model of bytes: trains on a text, measures bits per byte, and continues a text.

    python examples/byte_lm.py --out byte_lm.npz
    python examples/byte_lm.py --checkpoint byte_lm.npz --prompt "Call me" --generate 400
    python examples/byte_lm.py --data my.txt --context 4096 --batch 4 --devices 4 --steps 1000

Model     A causal Transformer with rotary positions; byte t also sees the embedding of byte t - 1.
          --attention memeff (memeff_attention.py), reference (its definition), or performer
          (performer.py: FAVOR+ with 256 positive features, one projection for all blocks).
          --take-over n trains with memeff, then puts the same weights under performer, measures
          them as they are, and trains them on for n steps.
Data      --data is any text, plain or .gz; the last twentieth is held out. Steps take windows of
          --context bytes from anywhere; the held-out text is measured in windows that do not
          overlap, every byte once.
Writes    --out keeps the weights, an .npz; --checkpoint reads one, and then nothing is trained.
          --generate N continues --prompt by N bytes, with a cache of keys and values
          (examples/long_context.py); with performer from a state whose size is fixed.
Scale     --devices n: the windows of a batch over n devices, simulated where there are not enough.
Run       python examples/byte_lm.py
          64 s on two CPU cores: 2.71 bits per held-out byte of Moby Dick
Axes      B windows  T bytes of a window  L blocks  D width  H heads  K size of a head
          F hidden units of the MLP
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import math
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the imports below, from any folder
from long_context import decode_step, init_cache  # noqa: E402

import memeff_attention as memeff  # noqa: E402
import performer  # noqa: E402
from vit import (  # noqa: E402
    check_names,
    named_leaves,
    read_npz,
    require,
    run_program,
    write_npz,
)

ATTENTION = ("memeff", "reference", "performer")
FEATURES = 256  # of performer
REPORT = 20  # steps between lines of progress


@dataclasses.dataclass(frozen=True)
class Config:
    """Raises ValueError for what cannot be built."""

    width: int = 128
    depth: int = 2
    heads: int = 2
    mlp: int = 512
    attention: str = "memeff"

    def __post_init__(self):
        for name in ("width", "depth", "heads", "mlp"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} is not at least 1")
        require(
            self.width % (2 * self.heads) == 0,  # rotary turns pairs of channels
            f"width={self.width} is not a multiple of 2 x heads={self.heads}",
        )
        require(self.attention in ATTENTION, f"attention={self.attention!r} is unknown")


# ==== Model =======================================================================================


def init_params(key, config: Config):
    """Float32 weights, normal with variance 1 / inputs; blocks stacked on a leading axis L."""
    L = config.depth
    D = config.width
    H = config.heads
    F = config.mlp
    K = D // H
    keys = iter(jax.random.split(key, 7))

    def kernel(shape, inputs):
        return jax.random.normal(next(keys), shape) * inputs**-0.5

    return {
        "embed": kernel((256, D), 1),
        "before": kernel((256, D), 1),
        "blocks": {
            "norm1": jnp.ones((L, D)),
            "qkv": kernel((L, D, 3, H, K), D),
            "out": kernel((L, H, K, D), D),
            "norm2": jnp.ones((L, D)),
            "mlp1": kernel((L, D, F), D),
            "mlp2": kernel((L, F, D), F),
        },
        "norm": jnp.ones(D),
        "head": kernel((D, 256), D),
    }


def rms_norm(x, scale):
    """x over the root of its mean square. [...,D] -> [...,D]."""
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def rotary(x, positions):
    """Positions as rotations of pairs of channels. x [B,T,H,K], positions [T] -> [B,T,H,K]."""
    pairs = x.shape[3] // 2
    frequency = 10_000.0 ** -(jnp.arange(pairs) / pairs)
    angle = positions[:, None, None] * frequency  # [T,1,K/2]
    sin = jnp.sin(angle)
    cos = jnp.cos(angle)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def block(x, weights, positions, attend):
    """One block; attend(q, k, v) is its attention. [B,T,D] -> [B,T,D]."""
    q, k, v = jnp.einsum("btd,dchk->cbthk", rms_norm(x, weights["norm1"]), weights["qkv"])
    y = attend(rotary(q, positions), rotary(k, positions), v)
    x = x + jnp.einsum("bthk,hkd->btd", y, weights["out"])

    y = rms_norm(x, weights["norm2"]).reshape(-1, x.shape[-1])  # two axes: fast on a CPU
    y = jax.nn.gelu(y @ weights["mlp1"]) @ weights["mlp2"]
    return x + y.reshape(x.shape)


def embed(params, tokens, before):
    """Each byte together with the one before it. int [B,T], twice -> [B,T,D]."""
    return params["embed"][tokens] + params["before"][before]


def head(params, x):
    """Logits of the next byte. [B,T,D] -> [B,T,256]."""
    return rms_norm(x, params["norm"]) @ params["head"]


def projection_of(config: Config):
    """The random features of performer, the same wherever they are needed. [M,K]."""
    head_size = config.width // config.heads
    return performer.orthogonal_projection(jax.random.key(0), FEATURES, head_size)


def causal_attention(config: Config):
    """The function (q, k, v) -> out that config names, with a causal mask."""
    if config.attention == "performer":
        projection = projection_of(config)
        return functools.partial(performer.favor_attention, projection=projection, causal=True)
    if config.attention == "reference":
        return functools.partial(memeff.attention_by_definition, causal=True)
    return functools.partial(memeff.attention, causal=True)


def forward(params, tokens, config: Config):
    """Logits of the next byte. int [B,T] -> [B,T,256]."""
    attend = causal_attention(config)
    positions = jnp.arange(tokens.shape[1])

    def layer(x, weights):
        return block(x, weights, positions, attend), None

    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    x, _ = lax.scan(layer, embed(params, tokens, before), params["blocks"])
    return head(params, x)


def loss_fn(params, tokens, config: Config, data_axis=None):
    """Mean cross-entropy in bits per byte. int [B,T+1], -1 behind the end of a text -> scalar."""
    targets = tokens[:, 1:]
    logits = forward(params, jnp.maximum(tokens[:, :-1], 0), config)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    counted = targets >= 0
    total = jnp.where(counted, nats, 0).sum()
    count = counted.sum()
    if data_axis:
        total, count = lax.psum((total, count), data_axis)  # over the windows of all devices
    return total / count / math.log(2)


def global_loss(config: Config, mesh):
    """loss_fn of the windows of all devices: f(params, tokens [B,T+1]) -> scalar."""
    local = functools.partial(loss_fn, config=config, data_axis="data")
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())


# ==== Generation ==================================================================================


def init_state(config: Config, length):
    """Nothing read yet: the last byte, how many there were, and what each block keeps of them."""
    K = config.width // config.heads
    if config.attention == "performer":
        kept = performer.init_state(1, config.heads, FEATURES, K)
    else:
        kept = init_cache(1, length, config.heads, K)
    kept = jax.tree.map(lambda x: jnp.stack([x] * config.depth), kept)
    return {"before": jnp.int32(0), "read": jnp.int32(0), "kept": kept}


def read_byte(params, state, byte, config: Config):
    """The state after one more byte, and the logits [256] of the next."""
    position = state["read"][None]
    step = decode_step
    if config.attention == "performer":
        step = functools.partial(performer.decode_step, projection=projection_of(config))

    def layer(x, weights_and_kept):
        weights, kept = weights_and_kept

        def attend(q, k, v):
            nonlocal kept
            kept, out = step(kept, q, k, v)
            return out

        x = block(x, weights, position, attend)
        return x, kept

    x = embed(params, byte[None, None], state["before"][None, None])
    x, kept = lax.scan(layer, x, (params["blocks"], state["kept"]))
    state = {"before": byte, "read": state["read"] + 1, "kept": kept}
    return state, head(params, x)[0, 0]


def generate(params, config: Config, prompt, count, key, temperature):
    """`count` bytes that continue the prompt. uint8 [n] -> uint8 [count]."""

    def read(state, byte):
        return read_byte(params, state, byte, config)

    def write(carry, key):
        state, logits = carry
        byte = jax.random.categorical(key, logits / temperature).astype(jnp.int32)
        return read_byte(params, state, byte, config), byte

    state = init_state(config, len(prompt) + count)
    state, logits = lax.scan(read, state, jnp.asarray(prompt, jnp.int32))
    _, new = lax.scan(write, (state, logits[-1]), jax.random.split(key, count))
    return np.asarray(new, np.uint8)


# ==== Training ====================================================================================


def load_text(path):
    """The bytes of a text, plain or .gz: uint8 [n], for training and held out (a twentieth)."""
    try:
        data = pathlib.Path(path).read_bytes()
        if str(path).endswith(".gz"):
            data = gzip.decompress(data)
    except Exception as error:  # OSError, EOFError, zlib.error
        raise ValueError(f"--data {path} is not a readable text: {error}") from None
    text = np.frombuffer(data, np.uint8)
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def make_mesh(devices):
    """A mesh with axis "data"; CPUs are simulated if this is called before JAX is used."""
    require(devices >= 1, f"--devices {devices} is not at least 1")
    with contextlib.suppress(RuntimeError):  # JAX is in use already; its devices are counted below
        jax.config.update("jax_num_cpu_devices", devices)
    count = jax.device_count()
    require(devices <= count, f"--devices {devices}: there are {count}")
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def make_train_step(config: Config, optimizer, mesh):
    """Jitted (params, opt_state, tokens [B,T+1]) -> (params, opt_state, bits per byte)."""

    def step(params, opt_state, tokens):
        bits, grads = jax.value_and_grad(global_loss(config, mesh))(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, bits

    return jax.jit(step, donate_argnums=(0, 1))


def window(text, rng, batch, context):
    """Random windows of a text. uint8 [n] -> int32 [batch,context+1]."""
    starts = rng.integers(len(text) - context, size=(batch, 1))
    return text[starts + np.arange(context + 1)].astype(np.int32)


def train(config: Config, params, text, args, mesh, steps):
    """Trained weights. Raises FloatingPointError if the loss or a weight is not finite."""
    warmup = steps // 10 + 1
    rate = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))
    rows = NamedSharding(mesh, P("data"))
    # Placed on the mesh, else the step compiles twice.
    state = jax.device_put((params, optimizer.init(params)), NamedSharding(mesh, P()))
    step = make_train_step(config, optimizer, mesh)

    start = time.time()
    for i in range(steps):
        rng = np.random.default_rng((args.seed, i))
        tokens = jax.device_put(window(text, rng, args.batch, args.context), rows)
        *state, bits = step(*state, tokens)
        bits = float(bits)
        if not math.isfinite(bits):
            raise FloatingPointError(f"step {i + 1}: the loss is {bits}")
        if (i + 1) % REPORT == 0 or i + 1 == steps:
            rate = (i + 1) / (time.time() - start)
            speed = f"{args.batch * args.context * rate:,.0f} bytes/s"
            left = f"{(steps - i - 1) / rate:.0f} s left"
            print(f"step {i + 1}/{steps}  {bits:.3f} bits per byte  {speed}  {left}", flush=True)
    params = state[0]
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params)):
        raise FloatingPointError(f"after step {steps} weights are not finite")
    return params


def evaluate(loss, params, text, batch, context, mesh):
    """Bits per byte of a text uint8 [n] but its first byte; what a last batch lacks is -1."""
    rows = NamedSharding(mesh, P("data"))
    windows = math.ceil((len(text) - 1) / context)
    windows = math.ceil(windows / batch) * batch
    padding = windows * context + 1 - len(text)
    tokens = np.pad(text.astype(np.int32), (0, padding), constant_values=-1)
    bits = 0.0
    for first in range(0, windows, batch):
        starts = np.arange(first, first + batch)[:, None] * context
        part = tokens[starts + np.arange(context + 1)]
        count = (part[:, 1:] >= 0).sum()
        if count:
            bits += float(loss(params, jax.device_put(part, rows))) * count
    return bits / (len(text) - 1)


def load_params(path, config: Config):
    """Weights of this config from an .npz that --out has written."""
    flat = read_npz(path)
    shapes = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
    leaves = named_leaves(shapes)
    check_names(flat, leaves, str(path))
    weights = [jnp.asarray(flat[name]) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), weights)


# ==== Program =====================================================================================


def make_parser():
    parser = argparse.ArgumentParser(description="Trains a language model of bytes on a text.")
    text = str(ROOT / "data/moby_dick.txt.gz")
    parser.add_argument("--data", default=text, help="a text, plain or .gz")
    parser.add_argument("--attention", choices=ATTENTION, default="memeff")
    parser.add_argument("--context", type=int, default=2048, help="bytes of a window")
    parser.add_argument("--batch", type=int, default=1, help="windows of a step, over all devices")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="highest of the schedule")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", help=".npz for the weights")
    parser.add_argument("--checkpoint", help=".npz of weights; nothing is trained")
    parser.add_argument("--take-over", type=int, default=0, help="steps with performer, afterwards")
    parser.add_argument("--prompt", default="Call me ", help="text to continue")
    parser.add_argument("--generate", type=int, default=200, help="bytes to write; 0: none")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the samples")
    return parser


def check_flags(args, text, held):
    for name in ("context", "batch", "steps"):
        require(getattr(args, name) >= 1, f"--{name} {getattr(args, name)} is not at least 1")
    for name in ("generate", "take_over"):
        value = getattr(args, name)
        require(value >= 0, f"--{name.replace('_', '-')} {value} is negative")
    require(
        not args.take_over or args.attention != "performer",
        "--take-over starts from --attention memeff or reference",
    )
    require(0 <= args.seed < 2**32, f"--seed {args.seed} is not in 0 to {2**32 - 1}")
    for name in ("learning_rate", "temperature"):
        value = getattr(args, name)
        flag = name.replace("_", "-")
        require(0 < value < math.inf, f"--{flag} {value} is not a positive number")
    require(
        args.batch % args.devices == 0,
        f"--batch {args.batch} is not a multiple of --devices {args.devices}",
    )
    require(
        len(held) > 1 and len(text) > args.context + 1,
        f"--data {args.data}: {len(text)} bytes are too few for --context {args.context}",
    )
    require(args.prompt or not args.generate, "--prompt is empty")
    if args.out:
        require(pathlib.Path(args.out).suffix == ".npz", f"--out {args.out} is not an .npz")
        require(
            pathlib.Path(args.out).parent.is_dir(), f"--out {args.out}: there is no such folder"
        )


def run(args):
    text, held = load_text(args.data)
    mesh = make_mesh(args.devices)
    check_flags(args, text, held)
    config = Config(args.width, args.depth, args.heads, 4 * args.width, args.attention)

    def report(config, params):
        loss = jax.jit(global_loss(config, mesh))
        bits = evaluate(loss, params, held, args.batch, args.context, mesh)
        print(f"held-out bits per byte: {bits:.3f}, of {len(held) - 1:,} bytes, {config.attention}")

    if args.checkpoint:
        params = load_params(args.checkpoint, config)
    else:
        params = init_params(jax.random.key(args.seed), config)
        params = train(config, params, text, args, mesh, args.steps)
    report(config, params)
    if args.take_over:
        config = dataclasses.replace(config, attention="performer")
        report(config, params)
        params = train(config, params, text, args, mesh, args.take_over)
        report(config, params)
    if args.out:
        write_npz(args.out, named_leaves(jax.tree.map(np.asarray, params)))
        print(f"wrote {args.out}")
    if args.generate:
        prompt = np.frombuffer(args.prompt.encode(), np.uint8)
        key = jax.random.key(args.seed)
        new = generate(params, config, prompt, args.generate, key, args.temperature)
        print(args.prompt + new.tobytes().decode(errors="replace"))


def main(argv=None) -> int:
    """Returns the exit status: 1 if the loss is not finite, 2 for bad input, in one line."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, FloatingPointError) as error:
        print(f"byte_lm.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    run_program(main)
