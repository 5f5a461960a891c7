"""The five tasks of docs/coming-from.md in nnsight 0.8: `python tasks_nnsight.py FOLDER NUMBERS.pt`."""

# ruff: noqa: D103, E402

import sys

folder = sys.argv[1]  # of any transformers model of the Llama family

# --8<-- [start:setup]
import nnsight
import torch
from nnsight import TransformersModel

model = TransformersModel(folder, task="text-generation", attn_implementation="eager", dispatch=True)
layers, n_heads = model.model.layers, model.config.num_attention_heads
clean = model.tokenizer("When Mary and John went to the store, John gave a drink to", return_tensors="pt").input_ids
corrupt = model.tokenizer("When Mary and John went to the store, Mary gave a drink to", return_tensors="pt").input_ids
mary, john = (model.tokenizer(name).input_ids[0] for name in (" Mary", " John"))


def metric(logits):
    return logits[:, -1, mary] - logits[:, -1, john]


# --8<-- [end:setup]

# --8<-- [start:read]
with torch.no_grad(), model.trace(clean):
    pattern = layers[5].self_attn.output[1].save()  # None unless attention is "eager"
    residual = layers[12].output.save()
# --8<-- [end:read]

# --8<-- [start:steer]
with torch.no_grad(), model.trace(corrupt):
    other = layers[12].output.save()
direction = residual[0, -1] - other[0, -1]

with model.generate(clean, max_new_tokens=8, do_sample=False) as tracer:
    for _ in tracer.iter[:8]:
        layers[12].output += 4 * direction
    tokens = tracer.result.save()
text = model.tokenizer.decode(tokens[0])
# --8<-- [end:steer]

# --8<-- [start:sweep]
with torch.no_grad(), model.trace(clean):
    donor = nnsight.save([])
    for layer in layers:
        donor.append(layer.input)

n_positions = clean.shape[1]
grid = torch.zeros(len(layers), n_positions)
for i, layer in enumerate(layers):
    with torch.no_grad(), model.trace() as tracer:  # one forward, one row for each position
        found = nnsight.save([])
        for p in range(n_positions):
            with tracer.invoke(corrupt):
                layer.input[:, p] = donor[i][:, p]
                found.append(metric(model.lm_head.output))
    grid[i] = torch.cat(found)
# --8<-- [end:sweep]

# --8<-- [start:gradients]
with torch.no_grad(), model.trace(clean):
    z_clean = nnsight.save([])
    for layer in layers:
        z_clean.append(layer.self_attn.o_proj.input)

with model.trace(corrupt):
    z, gradient = nnsight.save([]), nnsight.save([])
    for layer in layers:
        z.append(layer.self_attn.o_proj.input)
    with metric(model.lm_head.output).sum().backward():
        for value in reversed(z):  # the last layer's gradient comes first
            gradient.insert(0, value.grad)

estimates = [((a - b) * g).detach() for a, b, g in zip(z_clean, z, gradient, strict=True)]
attribution = torch.stack([e.unflatten(-1, (n_heads, -1)).sum((0, 1, 3)) for e in estimates])  # [layer, head]
# --8<-- [end:gradients]

# --8<-- [start:ablate]
with torch.no_grad(), model.trace(clean):
    plain = metric(model.lm_head.output).save()

effect = torch.zeros(len(layers), n_heads)
for i, layer in enumerate(layers):
    with torch.no_grad(), model.trace() as tracer:
        found = nnsight.save([])
        for head in range(n_heads):
            with tracer.invoke(clean):
                heads = layer.self_attn.o_proj.input.unflatten(-1, (n_heads, -1))
                heads[:, :, head] = z_clean[i].unflatten(-1, (n_heads, -1))[:, :, head].mean((0, 1))
                layer.self_attn.o_proj.input = heads.flatten(-2)
                found.append(metric(model.lm_head.output))
    effect[i] = torch.cat(found) - plain
# --8<-- [end:ablate]

numbers = {"residual": residual, "pattern": pattern, "tokens": tokens, "grid": grid}
torch.save({**numbers, "attribution": attribution, "effect": effect}, sys.argv[2])
