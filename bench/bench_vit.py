"""vit.py beside a plain flax.linen ViT with the same weights, and beside timm where it is there.

What      Times: forward pass, train step (Adam, state donated), compilation.
          Figures that no noise touches: FLOPs, temporary bytes, lines of StableHLO.
          On a GPU also the model FLOPs utilisation in bfloat16; that part has not yet been run.
How       One process. Each round runs every contender once, in random order; medians over the
          rounds after two that warm up. Before anything is timed, all must give the same logits.
Run       make bench FILE=vit
          python bench/bench_vit.py --batch 8 --pairs 11 --size S/16
          About 6 minutes on two CPU cores. Replaces the section of vit.py in bench/RESULTS.md.
Before    To race an earlier version of vit.py in the same rounds:
          git show COMMIT:vit.py > ../earlier.py
          python bench/bench_vit.py --before ../earlier.py
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import math
import os
import pathlib
import platform
import random
import re
import sys
import time
from collections.abc import Callable

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

# Every run copies this text into RESULTS.md.
TRIED = """
### What was tried

Two CPU cores, S/16, batch 8, float32, JAX 0.10.2. These were measured while vit.py was first
written; later it was rewritten for its readers.

| tried | gave | kept |
| --- | --- | --- |
| heads before tokens, attention alone | forward 10.4 -> 5.6 ms, gradient 17.5 -> 15.3 ms | yes |
| heads before tokens, whole step | from 0.90 to 1.06 times flax's speed | yes |
| jax.checkpoint around attention_reference | the same bytes | no |

Eight smaller optimisations were in the first vit.py together. Each was left out in turn: speed
then, by the lower quartile of 14 interleaved steps, and temporary bytes of the step; the last was
measured before the others were there. The rewrite took four of them out again, because together
they gave 3 % of a step and 7 % of the temporary bytes.

| left out | speed | MB | in vit.py now |
| --- | --- | --- | --- |
| none | 1.00 | 201.3 | |
| no collectives over a mesh axis of one device (they copy) | 0.94 | 205.2 | yes |
| x after attention (Eq. 2) is kept for the backward pass | 0.96 | 189.3 | yes |
| biases are added before the reshape to heads | 0.97 | 201.3 | yes |
| q, k, v as one product instead of three | 0.98 | 201.2 | yes |
| derivative of LayerNorm by hand | 0.99 | 206.1 | taken out |
| jax.checkpoint around GELU | 0.99 | 213.4 | taken out |
| kernel of dense2 stored transposed | 0.99 | 201.3 | taken out |
| softmax divided by its sum after the product with v | 0.99 | 12.5 more | taken out |

These were not kept. Speed is relative to vit.py of that time; differences below 2 % mean nothing.
Without a speed, only bytes were measured.

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
| q, k, v stored as one weight | 0.99 | 201.3 | 201.3 |

1.1 times flax's speed was not found. A step is bound by its products: 264 GFLOP, of which 45 are
computed twice to save bytes, take 1.27 s at the 208 GFLOP/s that a product of [1576,384] and
[384,1536] reaches here alone. Of the 0.3 s beside them, 41 ms pass until the zeros are written into
which lax.scan stacks activations and gradients, and two of the attention products of a block run on
one core. Before the rewrite 104 pairs in five races gave 1.00 times flax's speed, between 0.993 and
1.025, and with JAX 0.12.0.1 on Python 3.13 0.92 to 0.94 (10 pairs).
With JAX 0.12.0.1 on Python 3.13 vit.py takes as long as with 0.10.2, but flax has become faster
there, its forward pass by 12 %: that is why the ratio is lower.

What the rewrite for readers cost, on JAX 0.10.2, is one line above all: attention_weights divides
by the sum of the softmax before the product with v (Eq. 6, then Eq. 7). Divided afterwards, the
forward pass is 1.06 to 1.08 times as fast and the step 1.03 times (4 interleaved rounds of six
variants); with the derivative of LayerNorm by hand too, the step is 1.04 times as fast and needs
211.0 MB. It stays, since two equations of the paper stand there as two functions. On JAX 0.12 the
earlier version, which divided afterwards, is no faster by more than 2 %.
"""

OPTIMIZER = optax.adam(1e-3)

# ==== Contenders: vit.py and earlier versions of it ===============================================


@dataclasses.dataclass(frozen=True)
class Contender:
    """A network and its train step: step(*state, *batch) -> (*state, loss). State is donated."""

    init: Callable  # () -> state, a tuple
    params_of: Callable  # state -> weights
    from_official: Callable  # weights under their released names -> weights
    forward: Callable  # (weights, images) -> logits [B,N]
    loss: Callable  # (weights, *batch) -> a number
    step: Callable
    images: jax.Array
    batch: tuple


def present_interface(module, config, mesh, images, labels) -> Contender:
    """A vit.py whose train step takes a State and a batch."""
    key = jax.random.key(0)

    def init():
        state = module.init_state(key, config, OPTIMIZER, mesh)
        return (state,)

    def params_of(state):
        return state[0].params

    def loss(params, batch, key):
        value, _ = module.loss_fn(params, batch, None, config)  # no key, since nothing is dropped
        return value

    return Contender(
        init=init,
        params_of=params_of,
        from_official=functools.partial(module.from_official, config=config),
        forward=jax.jit(functools.partial(module.forward, config=config)),
        loss=loss,
        step=module.make_train_step(config, OPTIMIZER, mesh),
        images=images,
        batch=({"images": images, "labels": labels}, key),
    )


def earlier_interface(module, config, mesh, images, labels) -> Contender:
    """A vit.py whose train step takes weights, optimizer state, images and labels."""
    key = jax.random.key(0)

    def init():
        return module.init_state(key, config, OPTIMIZER, mesh)

    def params_of(state):
        return state[0]

    def loss(params, images, labels, key):
        return module.loss_fn(params, images, labels, config)

    return Contender(
        init=init,
        params_of=params_of,
        from_official=functools.partial(module.from_official, config=config),
        forward=jax.jit(functools.partial(module.forward, config=config)),
        loss=loss,
        step=module.make_train_step(config, OPTIMIZER, mesh),
        images=images,
        batch=(images, labels, key),
    )


def make_vit(module, config, images, labels) -> Contender:
    """vit.py, or an earlier version of it, on a mesh of one device, as its demo runs it."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    images, labels = jax.device_put((images, labels), NamedSharding(mesh, P("data")))
    if hasattr(module, "State"):
        return present_interface(module, config, mesh, images, labels)
    return earlier_interface(module, config, mesh, images, labels)


def import_earlier(path):
    """The module in a file, under a name that leaves vit.py its own."""
    name = "earlier_vit"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being run
    spec.loader.exec_module(module)
    return module


# ==== Contenders: the peers =======================================================================

RENAMED = {  # part of a released name -> what stands in its place in the flax peer
    "Transformer/": "",
    "posembed_input/pos_embedding": "position",
    "encoder_norm": "norm",
    "MlpBlock_3/": "",
    "LayerNorm_2": "LayerNorm_1",
    "Attention_1": "Attention_0",
}


class Block(nn.Module):
    """A block of the flax peer."""

    config: vit.Config

    @nn.compact
    def __call__(self, x):  # [B,T,D] -> [B,T,D]
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.config.heads, deterministic=True)(y, y)
        y = nn.LayerNorm()(x)
        y = nn.Dense(self.config.mlp)(y)
        y = nn.gelu(y)
        return x + nn.Dense(self.config.width)(y)


class Peer(nn.Module):
    """A ViT as one writes it in flax.linen: class token, learned positions, pre-norm, tanh GELU."""

    config: vit.Config

    @nn.compact
    def __call__(self, images):  # [B,H,W,C] -> [B,N]
        D = self.config.width
        patch = self.config.patch_size
        x = nn.Conv(D, patch, strides=patch, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, D)
        token = self.param("cls", nn.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], D))
        for i in range(self.config.depth):
            x = Block(self.config, name=f"encoderblock_{i}")(x)
        x = nn.LayerNorm(name="norm")(x)[:, 0]
        return nn.Dense(self.config.classes, kernel_init=nn.initializers.zeros, name="head")(x)


def flax_contender(model, from_official, images, labels) -> Contender:
    """A flax model as its users write it: initialisation and step jitted, optimizer.init not.

    from_official: weights under their released names -> the model's tree.
    """
    images, labels = jax.device_put((images, labels))

    def init():
        params = jax.jit(model.init)(jax.random.key(0), images)["params"]
        return params, OPTIMIZER.init(params)

    def params_of(state):
        return state[0]

    def forward(params, images):
        return model.apply({"params": params}, images)

    def loss(params, images, labels):
        logits = forward(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, opt_state, images, labels):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, value

    return Contender(
        init=init,
        params_of=params_of,
        from_official=from_official,
        forward=jax.jit(forward),
        loss=loss,
        step=jax.jit(step, donate_argnums=(0, 1)),
        images=images,
        batch=(images, labels),
    )


def make_flax(config, images, labels) -> Contender:
    """The peer."""

    def from_official(flat):
        renamed = {}
        for name, array in flat.items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            renamed[name] = array
        return flax.traverse_util.unflatten_dict(renamed, sep="/")

    return flax_contender(Peer(config), from_official, images, labels)


def check_equal(config, contenders: dict):
    """As many weights in all contenders, and with the same weights the same logits."""
    params = vit.init_params(jax.random.key(0), config)
    flat = vit.to_official(params, config)
    rng = np.random.default_rng(1)
    flat["head/kernel"] = rng.normal(size=flat["head/kernel"].shape).astype(np.float32)
    want = None
    for name, contender in contenders.items():
        weights = contender.from_official(flat)
        initial = contender.params_of(contender.init())
        shapes = jax.tree.map(np.shape, weights)
        assert shapes == jax.tree.map(np.shape, initial), f"{name} has other weights"
        got = np.asarray(contender.forward(weights, contender.images))
        if want is None:
            want = got
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error < 1e-4, f"the logits of {name} differ by {error:.1e} of the largest"


def prepare_torchvision(torch):
    """Declares two operators that torchvision expects and that torch for CPUs does not have."""
    if torch.version.cuda is not None:
        return
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there already
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


def timm_name(size):
    """timm's name of a ViT: S/16 -> vit_small_patch16_224."""
    letter, patch = size.split("/")
    names = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
    return f"vit_{names[letter]}_patch{patch}_224"


def make_timm(name, images, labels, gpu=False) -> dict:
    """A model of timm in PyTorch: functions that run a forward pass, a train step, a product.

    With gpu it is compiled and computes in bfloat16. NOT YET RUN on a GPU.
    """
    import torch

    prepare_torchvision(torch)
    import timm

    model = timm.create_model(name)
    device = "cpu"
    if gpu:
        device = "cuda"
        model = torch.compile(model.to(device))
    images = torch.tensor(np.moveaxis(images, -1, 1), device=device)
    labels = torch.tensor(labels, dtype=torch.int64, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    matrix = torch.ones(2048, 2048)

    def logits():
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            return model(images)

    def forward():
        with torch.no_grad():
            return logits()

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits().float(), labels)
        loss.backward()
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()

    def product():
        return matrix @ matrix

    return {"forward": forward, "step": step, "product": product}


# ==== Measures ====================================================================================


def equation_flops(eqn) -> int:
    """FLOPs of a matrix product or a convolution; 0 for any other equation."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * summed * eqn.outvars[0].aval.size
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outputs = eqn.params["dimension_numbers"].rhs_spec[0]
        summed = kernel.size // kernel.shape[outputs]
        return 2 * summed * eqn.outvars[0].aval.size
    return 0


def flops(jaxpr) -> int:
    """FLOPs of a jaxpr, loop bodies times their trips."""
    total = 0
    for eqn in jaxpr.eqns:
        total += equation_flops(eqn)
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += trips * flops(inner)
    return total


def temporary_bytes(lowered) -> int:
    """What a compiled program needs beside its arguments and results."""
    return lowered.compile().memory_analysis().temp_size_in_bytes


def exact_figures(contender: Contender) -> dict:
    """What repeats exactly: FLOPs, temporary bytes, lines of StableHLO."""
    state = contender.init()
    params = contender.params_of(state)
    batch = contender.batch
    gradient = jax.jit(jax.value_and_grad(contender.loss))
    forward_jaxpr = jax.make_jaxpr(contender.forward)(params, contender.images)
    gradient_jaxpr = jax.make_jaxpr(gradient)(params, *batch)
    lowered = contender.step.lower(*state, *batch)
    return {
        "forward FLOPs": flops(forward_jaxpr.jaxpr),
        "gradient FLOPs": flops(gradient_jaxpr.jaxpr),
        "step bytes": temporary_bytes(lowered),
        "gradient bytes": temporary_bytes(gradient.lower(params, *batch)),
        "step lines": lowered.as_text().count("\n"),
    }


def interleave(functions: dict, rounds: int) -> dict:
    """Seconds of each function in so many rounds, in random order, after two that warm up."""
    seconds = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(2 + rounds):
        for name in order.sample(list(functions), len(functions)):
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def forward_of(contender: Contender):
    """A function that runs the forward pass once."""
    params = contender.params_of(contender.init())

    def forward():
        return contender.forward(params, contender.images)

    return forward


def step_of(contender: Contender):
    """A function that does one train step and returns what is to be waited for."""
    state = contender.init()

    def step():
        nonlocal state
        *state, _ = contender.step(*state, *contender.batch)
        return state

    return step


def product_of(dtype, side):
    """A function that multiplies two matrices [side,side] in XLA."""
    matrix = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)

    def product():
        return multiply(matrix, matrix)

    return product


def compile_seconds(make) -> dict:
    """Seconds of tracing, lowering and compiling: of "init", of "step" and of "forward".

    Step and forward pass run twice: a step compiles again if its outputs are placed unlike its
    inputs were.
    """
    jax.clear_caches()
    contender = make()
    seconds = collections.Counter()
    phase = "init"

    def listen(name, duration, **_):
        if name.startswith("/jax/core/compile/"):
            seconds[phase] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    step = step_of(contender)
    phase = "step"
    step()
    step()
    phase = "not counted"
    forward = forward_of(contender)
    phase = "forward"
    forward()
    forward()
    jax.monitoring.unregister_event_duration_listener(listen)
    return seconds


def measure_compilation(makers: dict, rounds=5) -> dict:
    """Name -> {"compile step": seconds of each round, ...}, interleaved as all times are."""
    measured = {name: collections.defaultdict(list) for name in makers}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(makers), len(makers)):
            for phase, seconds in compile_seconds(makers[name]).items():
                measured[name][f"compile {phase}"].append(seconds)
    return measured


def measure(contenders: dict, pairs) -> dict:
    """Name -> {"forward": seconds of each round, "step": the same, "step bytes": [bytes], ...}."""
    measured = {}
    for name, contender in contenders.items():
        figures = exact_figures(contender)
        measured[name] = {what: [value] for what, value in figures.items()}
    forwards = {name: forward_of(contender) for name, contender in contenders.items()}
    for name, seconds in interleave(forwards, pairs).items():
        measured[name]["forward"] = seconds
    steps = {name: step_of(contender) for name, contender in contenders.items()}
    for name, seconds in interleave(steps, pairs).items():
        measured[name]["step"] = seconds
    return measured


# ==== Report ======================================================================================


def make_batch(config, rows):
    """Random pictures float32 [B,H,W,C] in [-1, 1] and labels int32 [B]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(config.classes, size=rows, dtype=np.int32)
    images = rng.uniform(-1, 1, (rows, *config.image_size, config.channels))
    return images.astype(np.float32), labels


def machine() -> str:
    """Processor, cores, memory, versions and date."""
    processor = platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        found = re.search("model name.*: (.*)", info.read_text())
        if found:
            processor = found[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"JAX on {jax.devices()[0].device_kind}, Python {platform.python_version()}, "
        f"jax {jax.__version__}, flax {flax.__version__}, {datetime.date.today()}"
    )


def show(number) -> str:
    """Four digits, or all of those before the point."""
    if number >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}"


def table_row(name, ours, peer, ratio, ratios, unit, goal="") -> str:
    """A line of a table. ratio: of the medians; ratios: of each pair."""
    span = ""
    if len(ratios) > 1:
        span = f" ({min(ratios):.2f} to {max(ratios):.2f})"
    ours = show(np.median(ours) / unit)
    peer = show(np.median(peer) / unit)
    return f"| {name} | {ours} | {peer} | {ratio:.3f}{span} | {goal} |"


def verdict(met) -> str:
    return "met" if met else "not met"


def speed_row(name, ours, peer, goal=None) -> str:
    """Lists of seconds, shown in ms. Ratio: peer / ours, above 1 ours is faster."""
    ratio = np.median(peer) / np.median(ours)
    ratios = [b / a for a, b in zip(ours, peer)]
    text = ""
    if goal:
        text = f"at least {goal}: {verdict(ratio >= goal)}"
    return table_row(name, ours, peer, ratio, ratios, 1e-3, text)


def cost_row(name, ours, peer, unit=1, goal=None) -> str:
    """Lists of what should be little. Ratio: ours / peer, below 1 ours needs less."""
    ratio = np.median(ours) / np.median(peer)
    ratios = [a / b for a, b in zip(ours, peer)]
    text = ""
    if goal:
        text = f"at most {goal}: {verdict(ratio <= goal)}"
    return table_row(name, ours, peer, ratio, ratios, unit, text)


def beside_flax(ours, peer) -> list[str]:
    """The table of vit.py and the flax peer, from what was measured of each."""

    def speed(name, what, goal=None):
        return speed_row(name, ours[what], peer[what], goal)

    def cost(name, what, unit=1, goal=None):
        return cost_row(name, ours[what], peer[what], unit, goal)

    return [
        "| | vit.py | flax | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        speed("forward pass, ms", "forward", 1.0),
        speed("train step, ms", "step", 1.0),
        speed("train step, ms, the next goal", "step", 1.1),
        cost("compiling the train step, s", "compile step", goal=0.6),
        cost("compiling the forward pass, s", "compile forward"),
        cost("compiling the initialisation, s", "compile init"),
        cost("temporary bytes of the train step, MB", "step bytes", 1e6, 0.2),
        cost("temporary bytes of value_and_grad, MB", "gradient bytes", 1e6, 0.2),
        cost("FLOPs of the forward pass, 1e9", "forward FLOPs", 1e9),
        cost("FLOPs of value_and_grad, 1e9", "gradient FLOPs", 1e9),
        cost("lines of StableHLO, train step", "step lines"),
    ]


def beside_earlier(ours, earlier) -> list[str]:
    """The table of vit.py and an earlier version, from what was measured of each."""
    return [
        "vit.py and an earlier version of itself, in the same rounds as flax above. Ratio of the",
        "times: earlier / now, above 1 the present one is faster; of the bytes: now / earlier.",
        "",
        "| | now | earlier | ratio | |",
        "| --- | --- | --- | --- | --- |",
        speed_row("forward pass, ms", ours["forward"], earlier["forward"]),
        speed_row("train step, ms", ours["step"], earlier["step"]),
        cost_row(
            "temporary bytes of the train step, MB", ours["step bytes"], earlier["step bytes"], 1e6
        ),
    ]


def beside_timm(args, config) -> list[str]:
    """The table of vit.py and timm on a CPU, with what a matrix product takes in either library."""
    batch = make_batch(config, args.batch)
    try:
        timm = make_timm(timm_name(args.size), *batch)
    except ImportError as error:
        return [f"timm was absent: {error}."]
    return timm_table("vit.py", make_vit(vit, config, *batch), timm, args.pairs)


def timm_table(file, contender, timm, pairs) -> list[str]:
    """The table of one of our files and what make_timm returned."""
    ours = {
        "forward": forward_of(contender),
        "step": step_of(contender),
        "product": product_of(jnp.float32, 2048),
    }
    rows = []
    for what, name in [
        ("forward", "forward pass, ms"),
        ("step", "train step, ms"),
        ("product", "product of [2048,2048], ms"),
    ]:
        seconds = interleave({"ours": ours[what], "timm": timm[what]}, pairs)
        rows.append(speed_row(name, seconds["ours"], seconds["timm"]))
    peers = ", ".join(f"{name} {sys.modules[name].__version__}" for name in ("timm", "torch"))
    return [
        "A bare product of matrices is listed too: its ratio is due to the library, not to the",
        "model's code.",
        "",
        f"| | {file} | {peers}, eager | ratio | |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]


def on_gpu(pairs) -> list[str]:
    """Model FLOPs utilisation of the train step of B/16 in bfloat16. NOT YET RUN on a GPU."""
    rows = 128
    side = 8192
    config = dataclasses.replace(vit.SIZES["B/16"], dtype="bfloat16")
    batch = make_batch(config, rows)
    functions = {"product": product_of(jnp.bfloat16, side)}
    absent = []
    for attention in vit.CHOICES["attention"]:
        contender = make_vit(vit, dataclasses.replace(config, attention=attention), *batch)
        step = step_of(contender)
        try:
            jax.block_until_ready(step())
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            absent.append(f"attention={attention!r} did not run: {error}")
        else:
            functions[f"vit.py, attention={attention!r}"] = step
    try:
        functions["timm, torch.compile, autocast"] = make_timm(timm_name("B/16"), *batch, gpu=True)[
            "step"
        ]
    except ImportError as error:
        absent.append(f"timm was absent: {error}.")
    times = interleave(functions, pairs)
    seconds = {name: float(np.median(each)) for name, each in times.items()}

    # FLOPs of one gradient without remat: what is computed twice does not count.
    plain = make_vit(vit, dataclasses.replace(config, remat=False), *batch)
    params = plain.params_of(jax.eval_shape(plain.init))
    needed = flops(jax.make_jaxpr(jax.grad(plain.loss))(params, *plain.batch).jaxpr)

    peak = 2 * side**3 / seconds.pop("product")
    lines = []
    for name, s in seconds.items():
        lines.append(f"| {name} | {s * 1e3:.1f} | {rows / s:,.0f} | {needed / s / peak:.0%} |")
    return [
        f"Train step of B/16, bfloat16, batch {rows}. "
        f"A product of [{side},{side}]: {peak / 1e12:.0f} TFLOP/s.",
        *absent,
        "",
        "| | ms | images/s | of that product's FLOP/s |",
        "| --- | --- | --- | --- |",
        *lines,
    ]


def write_section(path, file, lines):
    """Puts lines in the place of the section of a file in a Markdown file."""
    text = "# Results"
    if path.exists():
        text = path.read_text()
    head, *sections = text.strip().split("\n\n## ")
    sections = [section for section in sections if not section.startswith(f"{file}\n")]
    sections.append("\n".join([file, "", *lines]))
    path.write_text("\n\n## ".join([head, *sorted(sections)]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=11, help="rounds that count")
    parser.add_argument("--size", choices=vit.SIZES, default="S/16")
    parser.add_argument("--before", metavar="FILE", help="an earlier version of vit.py, to race")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU: memory for torch
    jax.config.update("jax_enable_compilation_cache", False)

    config = vit.SIZES[args.size]
    batch = make_batch(config, args.batch)
    makers = {
        "vit.py": functools.partial(make_vit, vit, config, *batch),
        "flax": functools.partial(make_flax, config, *batch),
    }
    contenders = {name: make() for name, make in makers.items()}
    flags = f"--batch {args.batch} --pairs {args.pairs} --size {args.size}"
    if args.before:
        earlier = import_earlier(args.before)
        contenders["earlier"] = make_vit(earlier, earlier.SIZES[args.size], *batch)
        flags += f" --before {pathlib.Path(args.before).name}"

    check_equal(config, contenders)
    compilation = measure_compilation(makers)
    measured = measure(contenders, args.pairs)
    for name, seconds in compilation.items():
        measured[name].update(seconds)

    lines = [
        f"`python bench/bench_vit.py {flags}` on {machine()}; load {load:.1f} at the start.",
        "",
        f"Float32, {config.image_size[0]} pixels. Medians of {args.pairs} interleaved pairs, of 5",
        "for compilation; in brackets the range of the ratio over the pairs. Ratio of forward pass",
        "and train step: peer / vit.py, above 1 vit.py is faster. Every other ratio:",
        "vit.py / peer, below 1 vit.py needs less.",
        "",
        *beside_flax(measured["vit.py"], measured["flax"]),
        "",
    ]
    if args.before:
        lines += [*beside_earlier(measured["vit.py"], measured["earlier"]), ""]
    if jax.default_backend() == "gpu":
        lines += on_gpu(args.pairs)
    else:
        lines += beside_timm(args, config)
    lines += ["", TRIED.strip()]
    path = ROOT / "bench/RESULTS.md"
    write_section(path, "vit.py", lines)
    print("\n".join([*lines, "", f"wrote {path}"]))


if __name__ == "__main__":
    main()
