"""SGD, SAM and GSAM on wrong labels, at equal steps and at equal gradient evaluations; their cost.

What      Test accuracy of the demo's network, 5 seeds; SGD also with twice the steps, since SAM and
          GSAM evaluate two gradients a step. FLOPs and temporary bytes of one compiled gradient of
          ViT-S/16, plain, SAM and GSAM.
Run       make bench FILE=gsam
          python bench/bench_gsam.py
          About a minute on two CPU cores. Replaces the section of gsam.py in bench/RESULTS.md.
"""

import argparse
import functools
import os

import jax
import numpy as np
from bench_vit import ROOT, flops, machine, make_batch, write_section

import gsam
import vit


def accuracy_rows(data, seed) -> list[str]:
    """Mean and range of held-out accuracy over the seeds, for each gradient and number of steps."""
    plain = gsam.mlp_gradient
    runs = [
        ("SGD, half the steps", plain, gsam.STEPS // 2, 1),
        ("SGD", plain, gsam.STEPS, 1),
        ("SGD, twice the steps", plain, 2 * gsam.STEPS, 1),
        ("SAM", gsam.gsam(plain, gsam.RHO), gsam.STEPS, 2),
        ("GSAM", gsam.gsam(plain, gsam.RHO, gsam.ALPHA), gsam.STEPS, 2),
        ("GSAM, half the steps", gsam.gsam(plain, gsam.RHO, gsam.ALPHA), gsam.STEPS // 2, 2),
    ]
    rows = []
    for name, gradient, steps, gradients in runs:
        _, _, found, _ = gsam.train(name, gradient, data, steps, seed)
        last = {key: np.asarray(values)[-1] for key, values in found.items()}
        accuracy = last["accuracy"]
        rows.append(
            f"| {name} | {steps} | {steps * gradients} | {accuracy.mean():.1f} "
            f"({accuracy.min():.1f} to {accuracy.max():.1f}) | {last['gap'].mean():.4f} |"
        )
    return rows


def cost_rows() -> list[str]:
    """FLOPs of the products and temporary bytes of one gradient of ViT-S/16 at batch 8."""
    config = vit.SIZES["S/16"]
    images, labels = make_batch(config, 8)
    batch = {"images": images, "labels": labels}
    shapes = jax.eval_shape(functools.partial(vit.init_params, config=config), jax.random.key(0))
    value_and_grad = jax.value_and_grad(vit.loss_fn, has_aux=True)

    def plain(params, batch, key, step):
        return value_and_grad(params, batch, key, config)

    rows = []
    for name, gradient in (
        ("plain", plain),
        ("SAM", gsam.gsam(plain, 0.1)),
        ("GSAM", gsam.gsam(plain, 0.1, 0.4)),
    ):
        run = functools.partial(gradient, key=None, step=0)
        products = flops(jax.make_jaxpr(run)(shapes, batch).jaxpr)
        compiled = jax.jit(run).lower(shapes, batch).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        rows.append(f"| {name} | {products / 1e9:.1f} | {temporary / 1e6:.0f} |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    data = gsam.read_data(ROOT / "data/mnist5k.npz")
    share = f"{100 * gsam.WRONG:.0f} %"
    lines = [
        f"`python bench/bench_gsam.py` on {machine()}; load {load:.1f} at the start.",
        "",
        f"{len(data.labels)} digits with {share} wrong labels, {gsam.SEEDS} seeds, mean and range; "
        f"rho {gsam.RHO}, alpha {gsam.ALPHA}.",
        "",
        "| | steps | gradients | held-out accuracy, % | gap, nats |",
        "| --- | --- | --- | --- | --- |",
        *accuracy_rows(data, args.seed),
        "",
        "One gradient of ViT-S/16, batch 8, float32, remat:",
        "",
        "| | GFLOP of the products | temporary MB |",
        "| --- | --- | --- |",
        *cost_rows(),
    ]
    write_section(ROOT / "bench" / "RESULTS.md", "gsam.py", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
