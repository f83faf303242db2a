"""vit.py beside a plain flax.linen ViT with the same weights, and beside timm where it can be imported.

What      Times: forward pass, train step (Adam, donated), compilation. Figures that no noise touches: FLOPs,
          temporary bytes, lines of StableHLO. On a GPU also model FLOPs utilisation in bfloat16.
How       One process; each round runs every contender once, in random order; medians over the rounds after
          two that warm up. The logits of the two networks are compared before anything is timed.
Run       make bench FILE=vit   or   python bench/bench_vit.py --batch 8 --pairs 11 --size S/16
          About 5 minutes on two CPU cores. Replaces the section of vit.py in bench/RESULTS.md.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import math
import os
import pathlib
import platform
import random
import re
import sys
import time

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `import vit`, started from any folder
import vit  # noqa: E402

# Copied into RESULTS.md by every run.
TRIED = """
### What was tried

Two CPU cores, S/16, batch 8, float32, JAX 0.10.2. These were measured while vit.py was written.

| tried | gave | kept |
| --- | --- | --- |
| heads before tokens, attention alone | forward 10.4 -> 5.6 ms, and gradient 17.5 -> 15.3 ms | yes |
| heads before tokens, whole step | from 0.90 to 1.06 times flax's speed | yes |
| jax.checkpoint around GELU | 9.7 MB less temporaries at equal speed | yes |
| jax.checkpoint around attention_reference | the same bytes | no |
| softmax divided by its sum after the product with v | 1.01 times the speed, 12.5 MB less | yes |

The next six are in vit.py together; before them it had 193.4 MB and 0.94 to 0.99 of flax's speed. Each was
left out in turn: speed then, by the lower quartile of 14 interleaved steps, and temporary bytes of the step.

| left out | speed | MB |
| --- | --- | --- |
| none | 1.00 | 201.3 |
| no collectives over a mesh axis of one device (they copy) | 0.94 | 205.2 |
| x after attention (Eq. 2) is kept for the backward pass | 0.96 | 189.3 |
| biases are added before the reshape to heads | 0.97 | 201.3 |
| q, k, v as one product instead of three | 0.98 | 201.2 |
| derivative of LayerNorm by hand | 0.99 | 206.1 |
| kernel of mlp2 stored transposed | 0.99 | 201.3 |

These were not kept. Speed is relative to vit.py of that time; differences below 2 % mean nothing. Without a
speed, only bytes were measured.

| tried | speed | MB | then |
| --- | --- | --- | --- |
| lax.scan with unroll=2 | 0.97 | 281.4 | 205.9 |
| B and H flattened before both attention products | 1.00 | 205.9 | 205.9 |
| attention output in [B,T,H,K] straight from the product | 0.98, forward 0.92 | 205.9 | 205.9 |
| variance as E[x^2] - E[x]^2 | 1.00 | 205.9 | 205.9 |
| 1/sqrt(K) on the query weights | 1.01 | 205.9 | 205.9 |
| 1/sqrt(K) on the scores | | 213.3 | 205.9 |
| patch embedding as a convolution | | 205.9 | 205.9 |
| checkpoint policy: keep the attention output | | 229.8 | 205.9 |
| checkpoint policy: keep q, k, v | | 293.0 | 205.9 |
| checkpoint policy: dots_with_no_batch_dims_saveable | | 421.3 | 205.9 |
| jax.checkpoint around each half of a block | 0.99 | 207.7 | 193.4 |
| derivative of the softmax's division from the quotient | 1.00 | 201.3 | 201.3 |
| no jax.checkpoint around GELU | 0.99 | 213.4 | 201.3 |
| q, k, v stored as one weight | 0.99 | 201.3 | 201.3 |

1.1 times flax's speed was not found. A step is bound by its products: 264 GFLOP, of which 45 are computed
twice to save bytes, at the 208 GFLOP/s that a product of [1576,384] and [384,1536] reaches here alone take
1.27 s. What the profiler shows beside them, per step of 1.58 s: 41 ms until the zeros are written into which
lax.scan stacks activations and gradients; two of the attention products of a block run on one core (2.7 ms
each), and two need 5.4 ms of processor time where 2.6 would do, since their left operand is transposed.
This code was measured five times beside flax: in one run of this script 1.025 times its speed (15 pairs), in
a second run 0.993 (15), in races of the two steps alone 1.012, 1.014 (12 each) and 0.993 (50). Over all 104
pairs that is 1.00: the two are equal within the noise of this machine.
With JAX 0.12.0.1 on Python 3.13 the step reached 0.92 to 0.94 of flax's speed (10 pairs), with 211.0 MB.
"""

# ==== Contenders ============================================================================================

# init() -> (params, opt_state); forward(params, images) -> [B,N]; loss(params, *batch) -> scalar
# step(params, opt_state, *batch) -> (params, opt_state, loss); batch: images, labels, and for ours a key
Contender = collections.namedtuple("Contender", "init forward loss step batch")
OPTIMIZER = optax.adam(1e-3)

# released name -> name in the peer below
RENAMED = {"Transformer/": "", "posembed_input/pos_embedding": "position", "encoder_norm": "norm"}
RENAMED |= {"MlpBlock_3/": "", "LayerNorm_2": "LayerNorm_1", "Attention_1": "Attention_0"}


class Block(nn.Module):
    config: vit.Config

    @nn.compact
    def __call__(self, x):  # [B,T,D] -> [B,T,D]
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.config.heads, deterministic=True)(y, y)
        y = nn.gelu(nn.Dense(self.config.mlp)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.config.width)(y)


class Peer(nn.Module):
    """A ViT as one writes it in flax.linen: class token, learned positions, pre-norm, tanh GELU."""

    config: vit.Config

    @nn.compact
    def __call__(self, images):  # [B,H,W,C] -> [B,N]
        D, patch = self.config.width, self.config.patch_size
        x = nn.Conv(D, patch, strides=patch, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, D)
        token = self.param("cls", nn.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], D))
        for i in range(self.config.depth):
            x = Block(self.config, name=f"encoderblock_{i}")(x)
        x = nn.LayerNorm(name="norm")(x)[:, 0]
        return nn.Dense(self.config.classes, kernel_init=nn.initializers.zeros, name="head")(x)


def make_ours(config, images, labels) -> Contender:
    """vit.py on a mesh of one device, as its demo runs it."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    images, labels = jax.device_put((images, labels), NamedSharding(mesh, P("data")))
    init = lambda: vit.init_state(jax.random.key(0), config, OPTIMIZER, mesh)
    forward = jax.jit(lambda params, images: vit.forward(params, images, config))
    loss = lambda params, images, labels, key: vit.loss_fn(params, images, labels, config)
    step = vit.make_train_step(config, OPTIMIZER, mesh)
    return Contender(init, forward, loss, step, (images, labels, jax.random.key(0)))


def make_flax(config, images, labels) -> Contender:
    """The peer as its users write it: jitted initialisation, optimizer.init outside, jitted step, donated."""
    model, batch = Peer(config), jax.device_put((images, labels))

    def init():
        params = jax.jit(model.init)(jax.random.key(0), images)["params"]
        return params, OPTIMIZER.init(params)

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, opt_state, images, labels):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    forward = jax.jit(lambda params, images: model.apply({"params": params}, images))
    return Contender(init, forward, loss, jax.jit(step, donate_argnums=(0, 1)), batch)


def check_equal(config, ours: Contender, peer: Contender):
    """As many parameters in both, and with the same weights the same logits."""
    params, theirs = ours.init()[0], peer.init()[0]
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in jax.tree.leaves(theirs))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    theirs = {}
    for name, array in vit.to_official(params, config).items():
        for old in RENAMED:
            name = name.replace(old, RENAMED[old])
        theirs[name] = array
    theirs = flax.traverse_util.unflatten_dict(theirs, sep="/")
    got, want = ours.forward(params, ours.batch[0]), peer.forward(theirs, peer.batch[0])
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()  # jnp's max loses a NaN on a CPU


def make_timm(size, images, labels, gpu=False) -> dict:
    """timm's ViT in PyTorch: functions that run a forward pass, a train step, a product of matrices."""
    import torch

    with contextlib.suppress(RuntimeError):  # torchvision needs these two, which torch for CPUs does not have
        for name in ("nms", "qnms") if torch.version.cuda is None else ():
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    import timm

    letter, patch = size.split("/")
    letter = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}[letter]
    model = timm.create_model(f"vit_{letter}_patch{patch}_224").to("cuda" if gpu else "cpu")
    model = torch.compile(model) if gpu else model
    images = torch.tensor(np.moveaxis(images, -1, 1)).to("cuda" if gpu else "cpu")
    labels = torch.tensor(labels, dtype=torch.int64, device=images.device)
    optimizer, matrix = torch.optim.Adam(model.parameters(), lr=1e-3), torch.ones(2048, 2048)

    def forward():
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            return model(images)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward().float(), labels).backward()
        optimizer.step()
        return torch.cuda.synchronize() if gpu else None

    return {"forward": torch.no_grad()(forward), "step": step, "product": lambda: matrix @ matrix}


# ==== Measures ==============================================================================================


def flops(jaxpr) -> int:
    """Of the matrix products and convolutions of a jaxpr, loops with their trip counts."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * eqn.outvars[0].aval.size
        if eqn.primitive.name == "conv_general_dilated":
            kernel, out_channels = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2 * kernel.size // kernel.shape[out_channels] * eqn.outvars[0].aval.size
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            value = getattr(value, "jaxpr", value)
            total += flops(value) * eqn.params.get("length", 1) if hasattr(value, "eqns") else 0
    return total


def figures(contender: Contender) -> dict:
    """What repeats exactly: FLOPs, temporary bytes, lines of StableHLO."""
    forward, loss, step, batch = contender.forward, contender.loss, contender.step, contender.batch
    (params, opt_state), gradient = contender.init(), jax.jit(jax.value_and_grad(loss))
    lowered, temporary = step.lower(params, opt_state, *batch), lambda x: x.compile().memory_analysis()
    return {
        "forward FLOPs": flops(jax.make_jaxpr(forward)(params, batch[0]).jaxpr),
        "gradient FLOPs": flops(jax.make_jaxpr(gradient)(params, *batch).jaxpr),
        "step bytes": temporary(lowered).temp_size_in_bytes,
        "gradient bytes": temporary(gradient.lower(params, *batch)).temp_size_in_bytes,
        "step lines": lowered.as_text().count("\n"),
    }


def interleave(functions: dict, pairs: int) -> dict:
    """Seconds of each function in so many rounds, in random order, after two rounds that warm up."""
    seconds, order = {name: [] for name in functions}, random.Random(0)
    for _ in range(2 + pairs):
        for name in order.sample(list(functions), len(functions)):
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def forward_of(contender: Contender):
    """A function that runs the forward pass once."""
    params = contender.init()[0]
    return lambda: contender.forward(params, contender.batch[0])


def step_of(contender: Contender):
    """A function that does one train step and returns what is to be waited for."""
    state = list(contender.init())

    def step():
        state[:] = contender.step(*state, *contender.batch)[:2]
        return state

    return step


def product_of(dtype, side):
    """A function that multiplies two matrices [side,side] in XLA."""
    matrix, multiply = jnp.ones((side, side), dtype), jax.jit(jnp.matmul)
    return lambda: multiply(matrix, matrix)


def compile_seconds(make) -> dict:
    """Seconds of tracing, lowering and compiling: of "init", two calls of "step", two of "forward"."""
    jax.clear_caches()
    contender, seconds = make(), collections.Counter()

    def listen(name, duration, **_):
        seconds[now] += duration if name.startswith("/jax/core/compile/") else 0

    jax.monitoring.register_event_duration_secs_listener(listen)
    now = "init"
    step = step_of(contender)
    now = "step"
    step(), step()  # if its outputs are placed unlike its inputs were, the second call compiles again
    now = "not counted"
    forward = forward_of(contender)
    now = "forward"
    forward(), forward()
    jax.monitoring.unregister_event_duration_listener(listen)
    return seconds


# ==== Report ================================================================================================


def batch_of(config, batch):
    """Random pictures float32 [B,H,W,C] in [-1, 1] and labels int32 [B]."""
    rng, shape = np.random.default_rng(0), (batch, *config.image_size, config.channels)
    labels = rng.integers(config.classes, size=batch, dtype=np.int32)
    return rng.uniform(-1, 1, shape).astype(np.float32), labels


def machine() -> str:
    """Processor, cores, memory, versions and date."""
    info = pathlib.Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
    return f"{machine}, JAX on {jax.devices()[0].device_kind}, {versions}, {datetime.date.today()}"


def row(name, ours, peer, unit, goal=None, speed=False) -> str:
    """A line of the table from lists [pairs]. speed: the ratio is peer / ours, more is better."""
    divide = lambda a, b: b / a if speed else a / b
    ours, peer, pairs = np.median(ours), np.median(peer), [divide(a, b) for a, b in zip(ours, peer)]
    ratio, span = divide(ours, peer), f" ({min(pairs):.2f} to {max(pairs):.2f})" if len(pairs) > 1 else ""
    met = "met" if goal and (ratio >= goal if speed else ratio <= goal) else "not met"
    goal = f"{'at least' if speed else 'at most'} {goal}: {met}" if goal else ""
    show = lambda x: f"{x / unit:,.0f}" if x / unit >= 1000 else f"{x / unit:.4g}"
    return f"| {name} | {show(ours)} | {show(peer)} | {ratio:.3f}{span} | {goal} |"


def beside_flax(args, config) -> list[str]:
    """The table of vit.py and the flax peer."""
    batch = batch_of(config, args.batch)
    makers = {"ours": lambda: make_ours(config, *batch), "flax": lambda: make_flax(config, *batch)}
    compiling, order = {name: [] for name in makers}, random.Random(0)
    for _ in range(5):
        for name in order.sample(list(makers), 2):
            compiling[name].append(compile_seconds(makers[name]))
    both = [make() for make in makers.values()]
    check_equal(config, *both)
    exact = [figures(contender) for contender in both]
    forward = interleave(dict(enumerate(map(forward_of, both))), args.pairs).values()
    step = interleave(dict(enumerate(map(step_of, both))), args.pairs).values()
    compiled = lambda what: [[seconds[what] for seconds in each] for each in compiling.values()]
    exactly = lambda what: [[each[what]] for each in exact]
    return [
        "| | vit.py | flax | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        row("forward pass, ms", *forward, 1e-3, 1.0, True),
        row("train step, ms", *step, 1e-3, 1.0, True),
        row("train step, ms, the next goal", *step, 1e-3, 1.1, True),
        row("compiling the train step, s", *compiled("step"), 1, 0.6),
        row("compiling the forward pass, s", *compiled("forward"), 1),
        row("compiling the initialisation, s", *compiled("init"), 1),
        row("temporary bytes of the train step, MB", *exactly("step bytes"), 1e6, 0.2),
        row("temporary bytes of value_and_grad, MB", *exactly("gradient bytes"), 1e6, 0.2),
        row("FLOPs of the forward pass, 1e9", *exactly("forward FLOPs"), 1e9),
        row("FLOPs of value_and_grad, 1e9", *exactly("gradient FLOPs"), 1e9),
        row("lines of StableHLO, train step", *exactly("step lines"), 1),
    ]


def beside_timm(args, config) -> list[str]:
    """The table of vit.py and timm on a CPU, with what a product of matrices takes in either library."""
    batch = batch_of(config, args.batch)
    try:
        timm = make_timm(args.size, *batch)
    except ImportError as error:
        return [f"timm was absent: {error}."]
    ours = make_ours(config, *batch)
    ours = {"forward": forward_of(ours), "step": step_of(ours), "product": product_of(jnp.float32, 2048)}
    times = [interleave({"ours": ours[what], "timm": timm[what]}, args.pairs).values() for what in ours]
    names = "forward pass, ms", "train step, ms", "product of [2048,2048], ms"
    peers = ", ".join(f"{name} {sys.modules[name].__version__}" for name in ("timm", "torch"))
    return [
        "A bare product of matrices is listed too: its ratio is due to the library, not to the model's code.",
        "",
        f"| | vit.py | {peers}, eager | ratio | |",
        "| --- | --- | --- | --- | --- |",
        *(row(name, *pair, 1e-3, speed=True) for name, pair in zip(names, times)),
    ]


def on_gpu(pairs) -> list[str]:
    """Model FLOPs utilisation of the train step of B/16 in bfloat16, batch 128. NOT YET RUN on a GPU."""
    config, side, B = dataclasses.replace(vit.SIZES["B/16"], dtype="bfloat16"), 8192, 128
    batch, functions, lines = batch_of(config, B), {"product": product_of(jnp.bfloat16, side)}, []
    for attention in vit.ATTENTION:
        step = step_of(make_ours(dataclasses.replace(config, attention=attention), *batch))
        try:
            functions[f"vit.py, attention={attention!r}"] = (jax.block_until_ready(step()), step)[1]
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            lines.append(f"attention={attention!r} did not run: {error}")
    try:
        functions["timm, torch.compile, autocast"] = make_timm("B/16", *batch, gpu=True)["step"]
    except ImportError as error:
        lines.append(f"timm was absent: {error}.")
    seconds = {name: float(np.median(times)) for name, times in interleave(functions, pairs).items()}
    ours = make_ours(dataclasses.replace(config, remat=False), *batch)  # what is recomputed does not count
    needed = flops(jax.make_jaxpr(jax.grad(ours.loss))(jax.eval_shape(ours.init)[0], *ours.batch).jaxpr)
    peak = 2 * side**3 / seconds.pop("product")
    return [
        f"Train step of B/16, bfloat16, batch {B}. A product of [{side},{side}]: {peak / 1e12:.0f} TFLOP/s.",
        *lines,
        "",
        "| | ms | images/s | of that product's FLOP/s |",
        "| --- | --- | --- | --- |",
        *(f"| {n} | {s * 1e3:.1f} | {B / s:,.0f} | {needed / s / peak:.0%} |" for n, s in seconds.items()),
    ]


def main():
    add = (parser := argparse.ArgumentParser(description=__doc__.partition("\n")[0])).add_argument
    add("--batch", type=int, default=8)
    add("--pairs", type=int, default=11, help="rounds that count")
    add("--size", choices=vit.SIZES, default="S/16")
    args, load = parser.parse_args(), os.getloadavg()[0]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU: leaves memory to torch
    jax.config.update("jax_enable_compilation_cache", False)
    flags = f"--batch {args.batch} --pairs {args.pairs} --size {args.size}"
    gpu, config = jax.default_backend() == "gpu", vit.SIZES[args.size]
    lines = [
        f"`python bench/bench_vit.py {flags}` on {machine()}; load {load:.1f} at the start.",
        "",
        f"Float32, {config.image_size[0]} pixels. Medians of {args.pairs} interleaved pairs, of 5 for",
        "compilation; in brackets the range of the ratio over the pairs. Ratio of times: peer / vit.py,",
        "above 1 vit.py is faster. Every other ratio: vit.py / peer, below 1 vit.py needs less.",
        "",
        *beside_flax(args, config),
        "",
        *(on_gpu(args.pairs) if gpu else beside_timm(args, config)),
        "",
        TRIED.strip(),
    ]
    path = ROOT / "bench/RESULTS.md"
    head, *sections = (path.read_text() if path.exists() else "# Results").strip().split("\n\n## ")
    sections = [section for section in sections if not section.startswith("vit.py\n")]
    sections = sorted([*sections, "\n".join(["vit.py", "", *lines])])
    path.write_text("\n\n## ".join([head, *sections]) + "\n")
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
