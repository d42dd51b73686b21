# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
"""
# From a profile to a score

A notebook in jupytext's percent format: open it in Jupyter with jupytext, or run it with `python examples/notebook.py`.
It takes the demo checkpoint from a routing profile to compressed files and their scores, in less than two minutes on
two cores, and writes into the folder `notebook`. docs/python.md describes what it calls.
"""

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import ditmoe_cli as ditmoe

folder = Path("notebook")
folder.mkdir(exist_ok=True)
original = ditmoe.open_checkpoint("demo:digits")
original  # a table: blocks, experts, widths

# %% [markdown]
"""
## How does it route?

`profile` samples the model and counts. A second call with the same arguments finds the file up to date. In a notebook
the profile shows itself as a table and a heat map of the experts' load.
"""

# %%
profile = ditmoe.profile(original, images=32, steps=10, cfg=1.5, output=folder / "digits.profile.safetensors")
profile

# %% [markdown]
"""
All that was counted is there as arrays with named axes. Here: which expert of the first block takes which step?
"""

# %%
counts = profile.arrays["counts"]
by_step = counts.at(block=0).sum("branch", "position")  # axes: bin, expert
share = np.asarray(by_step) / by_step.values.sum(axis=1, keepdims=True)

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
picture = axis.imshow(share, cmap="RdBu_r", vmin=0, vmax=2 / share.shape[1])
axis.set_xlabel("expert")
axis.set_ylabel("step, from noise to image")
axis.set_title("share of the tokens of a step, block 0")
figure.colorbar(picture)
figure.savefig(folder / "routing.png")

# %% [markdown]
"""
## Three ways to a smaller file

A plan is data: it is chosen by a function, can be looked at, and is carried out by `apply`.
"""

# %%
plans = {
    "half of the experts": ditmoe.plan_prune(original, keep=0.5, profile=profile),
    "half of the neurons": ditmoe.plan_prune(original, neurons=0.5, allocate="global", profile=profile),
    "4 bits": ditmoe.plan_quantize(original, bits=4, uniform=True),
}
results = {
    name: ditmoe.apply(original, plan, profile=profile, output=folder / f"{name.replace(' ', '-')}.safetensors")
    for name, plan in plans.items()
}
results["half of the neurons"]

# %% [markdown]
"""
## The same seeds, before and after
"""

# %%
settings = {"images": 256, "steps": 10, "cfg": 1.5}
samples = {"original": ditmoe.sample(original, output=folder / "original.samples.safetensors", **settings)}
for name, result in results.items():
    samples[name] = ditmoe.sample(result.path, output=result.path.with_suffix(".samples.safetensors"), **settings)

figure, rows = plt.subplots(len(samples), 10, figsize=(8, 4), layout="constrained")
for row, (name, images) in zip(rows, samples.items(), strict=True):
    for column, axis in enumerate(row):
        axis.imshow(images.values[column, :, :, 0], cmap="gray_r")
        axis.set_axis_off()
    row[0].set_title(name, loc="left", fontsize=9)
figure.savefig(folder / "samples.png")

# %% [markdown]
"""
## Damage against bytes

`score` takes checkpoints, or samples that are there already. The paired error is that of images of the same seeds.
"""

# %%
scores = {name: ditmoe.score(samples[name], ref=samples["original"], extractor="pixels") for name in results}
damage = {name: score.paired.mse for name, score in scores.items()}

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for name, result in results.items():
    axis.scatter(result.bytes / 1e6, damage[name])
    axis.annotate(name, (result.bytes / 1e6, damage[name]), textcoords="offset points", xytext=(5, 5))
axis.set_xlabel("MB")
axis.set_ylabel("mean squared error of paired images")
axis.set_xlim(1, 3)
axis.set_ylim(0)
figure.savefig(folder / "damage.png")

# %% [markdown]
"""
`compare` looks closer: the error of the prediction on the original's own trajectory, and where routing changed.
"""

# %%
comparison = ditmoe.compare(original, results["half of the neurons"].path, images=32, steps=10, cfg=1.5)
comparison

# %% [markdown]
"""
## What does the profile say about the paper's claims?
"""

# %%
ditmoe.report(profile, replicates=50)
