"""The decoding loop that gives its tokens one by one, and draws them from streams of its own.

transformers prepares everything (cache, masks, logits processors, stopping criteria) and hands them to the loop; each
step is its own `prepare_inputs_for_generation` and forward. What differs from its loop is that this one waits between
tokens, and that sampling leaves torch's global generator alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.activations.ablations import row_keys
from assay.base.rng import torch_stream
from assay.subjects.tokens import Batch

Draw = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What one step of decoding gave.

    Args:
        ids: `[batch]`, the new tokens.
        logits: `[batch, vocab]`, float32: what the model gave, before temperature and the like.
        finished: Whether each row has ended; it gets padding from here on.
        sequence: `[batch, pos]`, prompt and new tokens.
    """

    ids: Int[Tensor, " batch"]
    logits: Float[Tensor, "batch vocab"]
    finished: tuple[bool, ...]
    sequence: Int[Tensor, "batch pos"]


def draw_from_streams(batch: Batch, seed: int) -> Draw:
    """A sampler that gives each row a random stream of its own, keyed by the seed and the row's prompt.

    A row's tokens then depend on its own prompt and the seed alone: not on the batch around it, the device, or what
    else draws random numbers. Each token is drawn by inverting the cumulative distribution, in float64 on the CPU.

    Args:
        batch: The prompts.
        seed: The seed.

    Returns:
        From scores `[batch, vocab]` (processed logits) to token ids `[batch]`.
    """
    streams = [torch_stream(seed, "generate", *key) for key in row_keys(batch)]

    def draw(scores: Tensor) -> Tensor:
        cumulative = scores.double().cpu().softmax(-1).cumsum(-1)
        u = torch.stack([torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams])
        found = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
        last = (scores > float("-inf")).cpu().double().cumsum(-1).argmax(-1)  # rounding never goes past the last
        return torch.minimum(found, last).to(scores.device)

    return draw


def draw_globally(scores: Tensor) -> Tensor:
    """Sample from torch's global generator, as transformers does."""
    return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]


def draw_greedily(scores: Tensor) -> Tensor:
    """The token with the highest score."""
    return scores.argmax(-1)


def decoding_loop(draw: Draw | None) -> Callable[..., Iterator[Token]]:
    """A loop for `generate(custom_generate=...)` that yields its tokens.

    Args:
        draw: How tokens are drawn when `do_sample` is set; from torch's global generator when None.
    """

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Iterator[Token]:
        choose = (draw or draw_globally) if generation_config.do_sample else draw_greedily
        pad = generation_config._pad_token_tensor
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        step: dict[str, Any] = {"is_first_iteration": True}
        while bool(unfinished.any()):
            inputs = model.prepare_inputs_for_generation(input_ids, **step, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
            step = {"next_sequence_length": 1 if model_kwargs.get("use_cache") else None}
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
            )
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            del outputs  # the logits of a long prompt are large
            ids = choose(logits_processor(input_ids, logits))
            if ends and pad is not None:
                ids = ids * unfinished + pad.to(ids.device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, ids[:, None]], -1)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            finished = tuple(not left for left in unfinished.tolist())
            yield Token(ids=ids, logits=logits, finished=finished, sequence=input_ids)

    return loop


class TextSoFar:
    """The text of a growing sequence of tokens, given out as its characters become whole.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: The tokens that came before; they give no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-8:])
        self._first, self._read = 0, len(self._ids)

    def add(self, token: int, *, last: bool = False) -> str:
        """Add a token; the text that it completes.

        Args:
            token: The token.
            last: Give out what there is, also half a character.
        """
        self._ids.append(token)
        before = self._decode(self._ids[self._first : self._read])
        whole = self._decode(self._ids[self._first :])
        if whole.endswith("\ufffd") and not last:
            return ""
        self._first, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
