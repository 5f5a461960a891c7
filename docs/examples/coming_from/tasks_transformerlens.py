"""The five tasks of docs/coming-from.md in TransformerLens 4: `python tasks_transformerlens.py FOLDER NUMBERS.pt`."""

# ruff: noqa: D103, E402

import sys

folder = sys.argv[1]  # of any transformers model

# --8<-- [start:setup]
import torch
from transformer_lens import patching, utilities
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import attribution_patch

torch.set_grad_enabled(False)
model = TransformerBridge.boot_transformers(folder)
clean = model.to_tokens("When Mary and John went to the store, John gave a drink to", prepend_bos=False)
corrupt = model.to_tokens("When Mary and John went to the store, Mary gave a drink to", prepend_bos=False)
mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")


def metric(logits):
    return (logits[:, -1, mary] - logits[:, -1, john]).mean()


# --8<-- [end:setup]

# --8<-- [start:read]
names = [*(f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)), "blocks.5.attn.hook_pattern"]
logits, cache = model.run_with_cache(clean, names_filter=names)
residual = cache["blocks.12.hook_resid_post"]  # [batch, pos, d_model]
pattern = cache["blocks.5.attn.hook_pattern"]  # [batch, head, query, key]
# --8<-- [end:read]

# --8<-- [start:steer]
_, other = model.run_with_cache(corrupt, names_filter="blocks.12.hook_resid_post")
direction = residual[0, -1] - other["blocks.12.hook_resid_post"][0, -1]


def steer(value, hook):
    return value + 4 * direction


with model.hooks(fwd_hooks=[("blocks.12.hook_resid_post", steer)]):
    tokens = model.generate(clean, max_new_tokens=8, do_sample=False, return_type="tokens", verbose=False)
text = model.to_string(tokens[0])
# --8<-- [end:steer]

# --8<-- [start:sweep]
_, donor = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_resid_pre"))
grid = patching.get_act_patch_resid_pre(model, corrupt, donor, metric)  # [layer, pos]
# --8<-- [end:sweep]

# --8<-- [start:gradients]
with torch.enable_grad():
    scores = attribution_patch(model, clean, corrupt, metric).node_scores
attribution = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)  # [layer, head]
for node, score in scores.items():
    if node.kind == "attn_head_out":
        attribution[node.layer, node.head] += score  # summed over positions
# --8<-- [end:gradients]

# --8<-- [start:ablate]
logits, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))
effect = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
for layer in range(model.cfg.n_layers):
    name = utilities.get_act_name("z", layer)
    for head in range(model.cfg.n_heads):

        def ablate(z, hook, name=name, head=head):
            z[:, :, head] = cache[name][:, :, head].mean((0, 1))
            return z

        effect[layer, head] = metric(model.run_with_hooks(clean, fwd_hooks=[(name, ablate)])) - metric(logits)
# --8<-- [end:ablate]

numbers = {"residual": residual, "pattern": pattern, "tokens": tokens, "grid": grid}
torch.save({**numbers, "attribution": attribution, "effect": effect}, sys.argv[2])
