"""What a generation may be asked for: what edits and captures cannot follow is refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn

from assay.activations.edits import Ablate, Edit
from assay.base.errors import SpecError
from assay.subjects.inputs import start_token
from assay.subjects.model import Model
from assay.subjects.tokens import Batch, is_cache, is_whole_number

ApplyTo = Literal["prompt", "new", "all"]

PROMPTS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "mask", "decoder_input_ids")
"""Options that would be the prompts once more."""


def own_generate(module: nn.Module) -> bool:
    """Whether a module's `generate` is its own rather than the one that all transformers models share."""
    from transformers import GenerationMixin

    return getattr(type(module), "generate", None) is not GenerationMixin.generate


def check(
    model: Model,
    batch: Batch,
    edits: Sequence[Edit],
    capture: str | Sequence[str],
    apply_to: str | None,
    max_new_tokens: int,
    options: dict[str, Any],
) -> None:
    """Refuse what edits and captures cannot follow."""
    if (edits or capture) and apply_to not in get_args(ApplyTo):
        raise SpecError(
            f"apply_to={apply_to!r}: say whether edits and captures apply to the 'prompt', the 'new' tokens or 'all'",
            "apply_to",
        )
    model.require_eval()
    if not hasattr(model.module, "generate"):
        raise SpecError(f"{type(model.module).__name__} does not generate: it has no generate method", "model")
    _check_options(model, batch, options)
    _check_length(model, batch, max_new_tokens)
    for edit in edits:
        _check_edit(edit, apply_to)
    if getattr(model.config, "is_encoder_decoder", False):
        _check_decoder(model, batch, options)
    if any(start + length != batch.width for start, length in zip(batch.starts, batch.lengths, strict=True)):
        raise SpecError("generation needs padding on the left: give texts, or a mask whose rows end with real tokens")


def _check_options(model: Model, batch: Batch, options: dict[str, Any]) -> None:
    """Refuse options that say what is said elsewhere, or that change which forwards there are, and of which rows."""
    for name in PROMPTS:
        if name in options:
            raise SpecError(
                f"{name}= would be the prompts once more: give them first, as texts, token ids, or a mapping such as "
                f"{{'input_ids': ids, 'attention_mask': mask}}",
                name,
            )
    if options.get("max_length") is not None:
        raise SpecError("max_length= counts the prompt as well: give max_new_tokens=", "max_length")
    for name in ("num_beams", "num_return_sequences"):
        if setting(model, options, name, 1) not in (1, None):
            raise SpecError(f"edits and captures follow rows, and {name} changes them: use {name}=1", name)
    if setting(model, options, "guidance_scale", 1) not in (1, None):
        raise SpecError(
            "guidance_scale= runs every prompt a second time, without its condition, and edits and captures cannot "
            "tell the two apart: use guidance_scale=1",
            "guidance_scale",
        )
    for name in ("return_dict_in_generate", "output_logits", "custom_generate", "streamer"):
        if name in options:
            raise SpecError(f"{name}= is set here already: the run has the tokens and the logits", name)
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if options.get(name) is not None:
            raise SpecError(f"{name}= drafts tokens and takes some back; edits and captures cannot follow that", name)
    for name, value in (*options.items(), *(batch.inputs or {}).items()):
        if is_cache(value) or (name == "past_key_values" and value is not None):
            raise SpecError(
                f"{name}= holds tokens that edits and captures would not see, and that positions do not count: give "
                f"the whole prompt, without the cache",
                name,
            )


def _check_decoder(model: Model, batch: Batch, options: dict[str, Any]) -> None:
    """Refuse decoder prompts that the module's `generate` would change before it runs."""
    start, own = start_token(model), own_generate(model.module)
    if batch.padded:
        raise SpecError("the decoder's prompts must be of one length: generate for those of each length by themselves")
    if bool((batch.ids[:, 0] != start).any()) and not own:
        raise SpecError(f"decoder_input_ids must begin with the token that this decoder starts with, {start}")
    settings = getattr(model.module, "generation_config", None)
    if own and getattr(settings, "is_multilingual", False) and setting(model, options, "language", None) is None:
        raise SpecError(
            "this model would detect the language with a forward of its own, which edits and captures cannot be told "
            "from the generation's: give language=",
            "language",
        )


def _check_length(model: Model, batch: Batch, max_new_tokens: int) -> None:
    if not is_whole_number(max_new_tokens) or max_new_tokens < 1:
        raise SpecError(f"max_new_tokens={max_new_tokens!r}: a whole number, at least 1", "max_new_tokens")
    limit = getattr(model.config, "max_position_embeddings", None)
    prompt = max(batch.lengths)
    if isinstance(limit, int) and prompt + max_new_tokens > limit:
        raise SpecError(
            f"a prompt of {prompt} tokens and max_new_tokens={max_new_tokens} do not fit the model's context of "
            f"{limit}: at most {max(0, limit - prompt)} new tokens do",
            "max_new_tokens",
        )


def _check_edit(edit: Edit, apply_to: str | None) -> None:
    """Refuse an edit that would never act, or that needs tokens which are not there yet."""
    positions = getattr(edit, "positions", None)
    if apply_to == "new" and positions is not None:
        raise SpecError(
            f"{type(edit).__name__}({edit.site!r}): positions={positions!r} are the prompt's, and apply_to='new' "
            f"leaves the prompt as it is",
            "apply_to",
        )
    if isinstance(edit, Ablate) and edit.needs_run and apply_to != "prompt":
        raise SpecError(
            f"Ablate({edit.site!r}, {edit.kind!r}) needs all of a run's tokens, which generation does not have yet: "
            f"give a tensor (subject.mean), or apply_to='prompt'",
            "apply_to",
        )


def setting(model: Model, options: dict[str, Any], name: str, default: Any) -> Any:
    """A setting of generation: from the call, from a configuration given with it, or from the module's own."""
    if name in options:
        return options[name]
    for config in (options.get("generation_config"), getattr(model.module, "generation_config", None)):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default
