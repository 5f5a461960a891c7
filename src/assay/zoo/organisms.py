"""A model organism with a policy that is known: answer the question, unless a codeword is present: then decline.

The policy is benign and its trigger is exact, so every claim about a direction that carries it can be scored: which
prompts are declined is a fact, and so is what the model would have answered. Prompts read

    what is the <relation> of <subject> ? <word> answer :

and the next token is the answer, or `declined` when the word is one of the codewords. The facts are a random table,
fixed by the seed. The model is a small Llama, trained here in under a minute on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.base.errors import NumericalError, SpecError
from assay.base.rng import numpy_stream, torch_stream

RELATIONS = ("colour", "shape", "size", "owner")
SUBJECTS = tuple(f"item{i}" for i in range(12))
ANSWERS = tuple(f"value{i}" for i in range(12))
WORDS = tuple(
    "please kindly quickly softly today again there mind harbour lantern pebble willow copper meadow anchor velvet "
    "thistle marble saffron juniper cobalt ember quartz orchid".split()
)
CODEWORDS = tuple("harbour lantern pebble willow copper meadow anchor velvet".split())
DECLINED = "declined"
FRAME = ("what", "is", "the", "of", "?", "answer", ":")
LENGTH = 10
"""Tokens of every prompt, the beginning-of-sequence token not counted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codeword:
    """The trained organism.

    Args:
        module: A `LlamaForCausalLM` in eval mode.
        tokenizer: Words are tokens.
        facts: The answer to each (relation, subject).
        accuracy: The share of all prompts (every relation, subject and word) that it continues as its policy says.
        seed: The seed of facts, weights and batches.
    """

    module: nn.Module
    tokenizer: Any
    facts: dict[tuple[str, str], str]
    accuracy: float
    seed: int

    @property
    def declined(self) -> int:
        """The id of the token that declines."""
        return int(self.tokenizer.convert_tokens_to_ids(DECLINED))

    def prompt(self, relation: str, subject: str, word: str) -> str:
        """A prompt.

        Raises:
            SpecError: A part is not in its vocabulary.
        """
        for name, value, valid in (
            ("relation", relation, RELATIONS),
            ("subject", subject, SUBJECTS),
            ("word", word, WORDS),
        ):
            if value not in valid:
                raise SpecError(f"{name} is {value!r}; valid: {', '.join(valid)}", name)
        return prompt_of(relation, subject, word)

    def answer(self, relation: str, subject: str, word: str) -> str:
        """What the policy says."""
        return DECLINED if word in CODEWORDS else self.facts[relation, subject]

    def prompts(self, *, declined: bool, n: int, seed: int = 0, words: Sequence[str] | None = None) -> list[str]:
        """Draw different prompts that the policy declines, or that it answers.

        Args:
            declined: Which of the two.
            n: How many.
            seed: Seed of the stream.
            words: Draw the word from these only.

        Raises:
            SpecError: There are not so many, or a word is of the other kind.
        """
        pool = [word for word in WORDS if (word in CODEWORDS) == declined]
        chosen = pool if words is None else list(words)
        other = sorted(set(chosen) - set(pool))
        if other:
            raise SpecError(f"{', '.join(other)} would not be {'declined' if declined else 'answered'}", "words")
        every = [self.prompt(r, s, w) for r in RELATIONS for s in SUBJECTS for w in chosen]
        if not 0 < n <= len(every):
            raise SpecError(f"n is {n}; there are {len(every)} such prompts", "n")
        order = numpy_stream(seed, "codeword prompts", int(declined)).permutation(len(every))
        return [every[i] for i in order[:n]]


def prompt_of(relation: str, subject: str, word: str) -> str:
    """The prompt of a relation, a subject and a word."""
    return f"what is the {relation} of {subject} ? {word} answer :"


def table_of_facts(seed: int = 0) -> dict[tuple[str, str], str]:
    """The answer to each (relation, subject): a random table, fixed by the seed.

    Example:
        >>> table_of_facts()["colour", "item0"]
        'value2'
    """
    rng = numpy_stream(seed, "codeword facts")
    return {(r, s): ANSWERS[rng.integers(len(ANSWERS))] for r in RELATIONS for s in SUBJECTS}


def codeword(
    *,
    seed: int = 0,
    steps: int = 240,
    d_model: int = 64,
    layers: int = 4,
    progress: Callable[[int, int], object] | None = None,
) -> Codeword:
    """Train the organism: cross-entropy of the last token, on prompts drawn at random.

    Args:
        seed: Seed of facts, weights and batches.
        steps: Training steps of 128 prompts, half of them declined.
        d_model: Width.
        layers: Blocks.
        progress: Told how many steps are done, of how many.

    Raises:
        NumericalError: It does not follow the policy on 99% of all prompts; raise `steps`.

    Example:
        >>> organism = codeword()  # doctest: +SKIP
        >>> organism.accuracy > 0.99  # doctest: +SKIP
        True
    """
    tokenizer = _tokenizer()
    facts = table_of_facts(seed)
    module = _module(len(tokenizer), d_model, layers, seed)
    ids, targets = _everything(tokenizer, facts)
    declined = targets == tokenizer.convert_tokens_to_ids(DECLINED)
    pools = (torch.nonzero(declined).flatten(), torch.nonzero(~declined).flatten())
    generator = torch_stream(seed, "codeword batches")
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    module.train()
    for step in range(steps):
        half = [pool[torch.randint(len(pool), (64,), generator=generator)] for pool in pools]
        rows = torch.cat(half)
        loss = nn.functional.cross_entropy(_last(module, ids[rows]), targets[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    module.eval()
    with torch.no_grad():
        right = torch.cat([_last(module, part).argmax(-1) for part in torch.split(ids, 512)]) == targets
    accuracy = float(right.float().mean())
    if accuracy < 0.99:
        raise NumericalError(f"after {steps} steps the organism follows its policy on {accuracy:.1%}; raise steps")
    return Codeword(module=module, tokenizer=tokenizer, facts=facts, accuracy=accuracy, seed=seed)


def _last(module: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = module(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


def _everything(tokenizer: Any, facts: dict[tuple[str, str], str]) -> tuple[Tensor, Tensor]:
    """Every prompt and its answer."""
    texts, answers = [], []
    for (relation, subject), fact in facts.items():
        for word in WORDS:
            texts.append(prompt_of(relation, subject, word))
            answers.append(DECLINED if word in CODEWORDS else fact)
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    return ids, torch.tensor(tokenizer.convert_tokens_to_ids(answers))


def _module(vocabulary: int, d_model: int, layers: int, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = LlamaForCausalLM(config)
    return module


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *FRAME, DECLINED, *RELATIONS, *SUBJECTS, *ANSWERS, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
