"""Selection: every number is what single runs say, every filter does what it says, and a planted direction is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import assay
from assay import Add, Subject
from assay.base.errors import SpecError, TokenError
from assay.directions.steering.behaviour import (
    Ends,
    answer_ids,
    behaves,
    divergence,
    opener_ids,
    opener_score,
)
from assay.directions.steering.select import Candidate, Filters, mean_differences, select_direction
from assay.directions.steering.weights import ablate_everywhere

LOOSE = Filters(kl=float("inf"), induce=-float("inf"))
OPENERS = (7, 9)
SHOWN = ("When Mary went", "When John and Mary", "the store gave a drink", "When milk gave")
ABSENT = ("When Paris is France", "the capital of milk", "When Mary is")
VALIDATION = (("When John went", "the store and milk"), ("When France is Paris", "When a drink went", "When of"))


def test_every_candidate_is_what_single_runs_say(gpt2: Subject) -> None:
    found = select_direction(
        gpt2,
        SHOWN,
        ABSENT,
        validation=VALIDATION,
        openers=OPENERS,
        positions=(-1, -2),
        filters=LOOSE,
        only_clear=False,
    )
    assert {(row.block, row.position) for row in found.candidates} == {(b, p) for b in range(3) for p in (-1, -2)}
    vectors = mean_differences(gpt2, SHOWN, ABSENT, (-1, -2), (0, 1))
    for row in found.candidates:
        if row.block == 2:
            assert row.dropped == "the last 20% of blocks"
            continue
        raw = vectors[row.block, (-1, -2).index(row.position)].float()
        edits = ablate_everywhere(gpt2, raw)
        bypass = [score(gpt2, text, edits) for text in VALIDATION[0]]
        add = [Add(f"blocks.{row.block}.resid_pre", raw)]
        induce = [score(gpt2, text, add) for text in VALIDATION[1]]
        kls = [
            float(divergence(gpt2.run(text).logits[0, -1], gpt2.run(text, edits=edits).logits[0, -1]))
            for text in VALIDATION[1]
        ]
        for mine, theirs in ((row.bypass, bypass), (row.induce, induce), (row.kl, kls)):
            assert mine == pytest.approx(sum(theirs) / len(theirs), rel=1e-3, abs=1e-4)
    kept = [row for row in found.candidates if not row.dropped]
    assert found.chosen == min(kept, key=lambda row: row.bypass)
    assert found.direction.site == f"blocks.{found.chosen.block}.resid_pre"
    assert found.direction.origin.detail["candidates"] == 6
    assert found.base[0] == pytest.approx(sum(score(gpt2, text) for text in VALIDATION[0]) / 2, rel=1e-4)


def score(subject: Subject, text: str, edits: Any = ()) -> float:
    p = float(subject.run(text, edits=edits).logits[0, -1].double().softmax(-1)[list(OPENERS)].sum())
    return float(torch.log(torch.tensor(p + 1e-8)) - torch.log(torch.tensor(1 - p + 1e-8)))


def test_means_are_float64_and_of_each_prompts_own_end(gpt2: Subject) -> None:
    found = mean_differences(gpt2, SHOWN, ABSENT, (-2,), (1,), batch=3)
    assert found.dtype == torch.float64
    each = [
        torch.stack([gpt2.run(t, capture="blocks.1.resid_pre")["blocks.1.resid_pre"][0, -2] for t in texts])
        for texts in (SHOWN, ABSENT)
    ]
    expected = each[0].double().mean(0) - each[1].double().mean(0)
    assert torch.allclose(found[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"bypass": float("nan")}, "not finite"),
        ({"induce": float("inf")}, "not finite"),
        ({"kl": 0.1001}, "kl > 0.1"),
        ({"kl": 0.1}, ""),
        ({"induce": -0.001}, "induce < 0"),
        ({"induce": 0.0}, ""),
        ({"block": 24}, "the last 20% of blocks"),
        ({"block": 23}, ""),
    ],
)
def test_the_filters_are_the_papers(changed: dict[str, Any], why: str) -> None:
    row = {"position": -1, "block": 3, "bypass": -1.0, "induce": 1.0, "kl": 0.01} | changed
    assert Filters().why(Candidate(**row), 30) == why


@pytest.mark.parametrize("n", [1, 5, 10, 12, 24, 30, 80])
def test_the_first_block_that_is_too_late(n: int) -> None:
    assert Filters().first_late(n) == (8 * n) // 10


def test_nothing_left_is_an_error_that_counts_why(gpt2: Subject) -> None:
    with pytest.raises(SpecError, match=r"no candidate survives: of 3, 2 by 'kl > 0', 1 by 'the last 20% of blocks'"):
        select_direction(
            gpt2,
            SHOWN,
            ABSENT,
            validation=VALIDATION,
            openers=OPENERS,
            filters=Filters(kl=0.0, induce=-1e9),
            only_clear=False,
        )


def planted(tiny_module: Callable[..., Any], tokenizer: Any) -> tuple[Subject, Tensor, int]:
    """A model where " drink" and " milk" write `r` into the stream, and `r` makes the token " Paris" likely."""
    module = tiny_module("gpt2", n_layer=5, tie_word_embeddings=False)
    opener = tokenizer(" Paris")["input_ids"][0]
    r = torch.randn(32, generator=torch.Generator().manual_seed(7))
    r = (r - r.mean()) / (r - r.mean()).norm()
    with torch.no_grad():
        for block in module.transformer.h:  # the layers whisper, and so the stream is what was put into it
            block.attn.c_proj.weight.mul_(0.1)
            block.mlp.c_proj.weight.mul_(0.1)
        module.transformer.ln_f.weight.fill_(1.0)
        wte, head = module.transformer.wte.weight, module.lm_head.weight
        wte -= (wte @ r)[:, None] * r
        head.mul_(0.25).sub_((head @ r)[:, None] * r)
        for word in (" drink", " milk"):
            wte[tokenizer(word)["input_ids"][0]] += 10 * r
        head[opener] = 2.5 * r
    return assay.load(module, tokenizer=tokenizer), r, opener


def test_a_planted_direction_is_found_and_carries_the_behaviour(
    tiny_module: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    subject, r, opener = planted(tiny_module, tiny_tokenizer)
    words = (
        "When Mary",
        "When John",
        "When Paris",
        "When France",
        "When store",
        "When capital",
        "When went",
        "When of",
    )
    shown = tuple(f"{word} {end}" for word in words for end in ("drink", "milk"))
    absent = tuple(f"{word} {end}" for word in words for end in ("gave", "to", "store"))
    found = select_direction(
        subject, shown[:10], absent[:12], validation=(shown[10:], absent[12:]), openers=[opener], only_clear=True
    )
    cosine = float(found.direction.unit @ r)
    assert cosine > 0.9
    assert found.base[0] > 2 and found.base[1] < -2
    assert found.chosen.bypass < -2 and found.chosen.induce > 0 and found.chosen.kl < 0.1


def test_prompts_that_the_subject_does_not_answer_so_are_left_out(
    tiny_module: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    subject, _, opener = planted(tiny_module, tiny_tokenizer)
    with pytest.raises(SpecError, match="of 1 prompts of the set 'shown' the subject answers none so"):
        select_direction(
            subject, ["When Mary gave"], ["When to"], validation=(["When milk"], ["When of"]), openers=[opener]
        )
    with pytest.raises(SpecError, match="is fitted on and chosen by"):
        select_direction(subject, ["When milk"], ["When to"], validation=(["When milk"], ["When of"]), openers=[opener])


def test_the_score_is_the_log_odds_of_the_openers() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    p = logits.double().softmax(-1)[0, [1, 3]].sum()
    assert float(opener_score(logits, [3, 1, 1])) == pytest.approx(float(torch.log(p / (1 - p))), abs=1e-6)
    assert torch.isfinite(opener_score(torch.tensor([[100.0, -100.0]]), [0])).all()
    for bad in ([], [4], [-1]):
        with pytest.raises(SpecError, match="openers are token ids between 0 and 3"):
            opener_score(logits, bad)


def test_prompts_of_different_length_are_scored_at_their_own_end(gpt2: Subject) -> None:
    texts = ["When Mary and John went", "When Mary"]
    each = torch.cat([behaves(gpt2, text, OPENERS) for text in texts])
    assert torch.allclose(behaves(gpt2, texts, OPENERS), each, atol=1e-4)
    right = gpt2.batch(texts, padding="right")
    assert torch.allclose(opener_score(Ends(right)(gpt2.run(right).logits), OPENERS), each, atol=1e-4)


def test_openers_and_answers_are_tokens_in_their_place(gpt2: Subject, tiny_tokenizer: Any) -> None:
    mary, john = (tiny_tokenizer(word)["input_ids"][0] for word in (" Mary", " John"))
    assert opener_ids(gpt2, [" Mary", " John", " Mary went"]) == (mary, john)
    assert answer_ids(gpt2, ["When", "the store"], [" Mary", " John went"]).tolist() == [mary, john]
    with pytest.raises(TokenError, match="does not begin with a token of its own"):
        answer_ids(gpt2, ["Wh"], ["en"])
    with pytest.raises(TokenError, match="has no tokens"):
        opener_ids(gpt2, [""])
