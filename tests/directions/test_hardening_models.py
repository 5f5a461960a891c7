"""Models and prompts that do not fit: positions that are not there, one text for a list, facts that say it twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import assay
from assay.activations.subject import Subject
from assay.base.errors import NumericalError, SpecError
from assay.directions.data import read_sites
from assay.directions.editing import Fact, continuation, key_covariance, rome
from assay.directions.local import local_processing
from assay.directions.steering import InContextTask, function_vector
from assay.directions.steering.conditional import Condition
from assay.directions.steering.dose import dose_response
from assay.directions.subspaces import Interchanges, Subspace, boundless_das, das, interchange_accuracy
from assay.directions.tuned_lens import train_tuned_lens
from assay.directions.vectors import Direction, Origin

SITE = "blocks.2.resid_post"
IDS = torch.tensor([[5, 17, 40, 9, 77, 30], [8, 30, 21, 77, 6, 50], [3, 9, 60, 22, 71, 15]])
TEXTS = ["When Mary went the store", "When John gave Mary the store", "Mary and John went"]


@pytest.fixture(scope="module")
def subject(tiny_module, tiny_tokenizer) -> Subject:
    return assay.load(tiny_module("llama"), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def gpt2(tiny_module, tiny_tokenizer) -> Subject:
    return assay.load(tiny_module("gpt2"), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("positions", [50, -50, slice(40, 50), [], "first"])
def test_positions_that_a_text_does_not_have_are_refused(subject, positions):
    condition = Condition(direction=Direction(site=SITE, vector=torch.ones(32)), threshold=0.0, positions=positions)
    with pytest.raises(SpecError, match="position"):
        read_sites(subject, TEXTS, SITE, positions=positions)
    with pytest.raises(SpecError, match="position"):
        condition.similarity(subject, TEXTS)
    with pytest.raises(SpecError, match="position"):
        Interchanges(base=IDS, source=IDS, answer=(1, 2, 3), positions=positions).read(subject, SITE)


def test_one_text_is_not_a_list_of_letters(subject, gpt2):
    text = TEXTS[0]
    for wrong in (
        lambda: read_sites(subject, text, SITE),
        lambda: key_covariance(gpt2, text, 1),
        lambda: local_processing(subject, text, ks=(1,)),
        lambda: train_tuned_lens(subject, text, steps=1),
    ):
        with pytest.raises(SpecError, match="give a list"):
            wrong()
    for empty in (lambda: local_processing(subject, [], ks=(1,)), lambda: key_covariance(gpt2, [], 1)):
        with pytest.raises(SpecError, match="give a list"):
            empty()


@pytest.mark.parametrize("site", ["blocks.1.mlp.out", "blocks.1.attn.out", "embed", "blocks.1.resid_mid", SITE])
def test_a_direction_of_another_width_is_refused_wherever_the_stream_is_written(subject, site):
    Direction(site=site, vector=torch.ones(32)).check(subject)
    with pytest.raises(SpecError, match="has 35 numbers"):
        Direction(site=site, vector=torch.ones(35)).check(subject)


def test_a_semantic_control_of_another_model_is_refused(subject):
    other = Direction(site=SITE, vector=torch.ones(32), origin=Origin(method="given", subject="f" * 32))
    with pytest.raises(SpecError, match="fitted on the weights ffff"):
        dose_response(
            subject,
            Direction(site=SITE, vector=torch.ones(32), size=1.0),
            (0.5, 1.0),
            prompts=TEXTS,
            metric=lambda logits: logits[:, -1, 5],
            unrelated=TEXTS,
            semantic={"other": other},
        )


def test_a_dose_that_was_not_measured_has_no_numbers(subject):
    found = dose_response(
        subject,
        Direction(site=SITE, vector=torch.ones(32), size=1.0),
        (0.0, 1.0),
        prompts=TEXTS,
        metric=lambda logits: logits[:, -1, 5],
        unrelated=TEXTS,
        controls={"isotropic": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))},
    )
    for ask in (
        lambda: found.curve.interval(0.7),
        lambda: found.null("isotropic", 0.7),
        lambda: found.p("isotropic", 0.7),
        lambda: found.percentile("isotropic", 0.7),
    ):
        with pytest.raises(SpecError, match=r"0\.7 was not measured; measured: 0\.0, 1\.0"):
            ask()


def test_a_function_vector_is_made_of_effects_of_its_own_heads(subject):
    blocks, heads = subject.n_blocks, subject.parts.n_heads
    means = torch.randn(blocks, heads, 8, generator=torch.Generator().manual_seed(0))
    for part in (means[:, :2], means[:2]):  # of a model with fewer heads, or blocks
        with pytest.raises(SpecError, match="effects have the shape"):
            function_vector(subject, part, torch.ones(part.shape[:2]), n_heads=2)


def test_a_task_asks_for_items_that_it_has():
    task = InContextTask(items=(("a", "b"), ("c", "d"), ("e", "f")))
    for wrong in (
        lambda: task.prompts((9,)),
        lambda: task.prompts((0,), shots=-1),
        lambda: task.prompts((0,), pool=(7,)),
    ):
        with pytest.raises(SpecError, match="there are items 0 to 2"):
            wrong()
    with pytest.raises(SpecError, match="cannot be split"):
        InContextTask(items=(("a", "b"),)).split()


def test_interchanges_are_of_the_vocabulary_and_the_subspace_of_the_model(subject):
    swap = Interchanges(base=IDS, source=IDS.flip(0), answer=(5, 6, 7))
    for answer in ((10**5, 1, 2), (-1, 1, 2)):
        with pytest.raises(SpecError, match="outside the vocabulary"):
            das(subject, SITE, Interchanges(base=IDS, source=IDS, answer=answer), 2)
    with pytest.raises(SpecError, match="not all in the vocabulary"):
        outside = Interchanges(base=IDS, source=IDS, answer=(1, 2, 2), choices=(1, 2, 10**5))
        interchange_accuracy(subject, Subspace.random(SITE, 2, 32), outside)
    with pytest.raises(SpecError, match="lies in 16 dimensions"):
        interchange_accuracy(subject, Subspace.random(SITE, 2, 16), swap)
    other = Subspace(site=SITE, basis=torch.eye(32)[:2], origin=Origin(method="DAS", subject="f" * 32))
    with pytest.raises(SpecError, match="fitted on the weights ffff"):
        interchange_accuracy(subject, other, swap)
    with pytest.raises(SpecError, match="both ends are above 0"):
        boundless_das(subject, SITE, swap, temperature=(1.0, 0.0))
    with pytest.raises(SpecError, match="at least one of each"):
        das(subject, SITE, swap, 2, batch=0)


def test_a_lens_reads_streams_of_its_width(subject):
    lens = train_tuned_lens(subject, IDS, steps=1, batch=2)
    with pytest.raises(SpecError, match="reads 32 numbers"):
        lens.translated(SITE.replace("2", "1"), torch.ones(2, 16))


def fact(**changed) -> Fact:
    given = {"prompt": "When {} went the", "subject": "Mary", "target": " store", "original": " John"}
    return Fact(**{**given, **changed})


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("When {} went the", "When"), ("Mary and {} gave the", "Mary"), ("When {} went the", "Mary Zebra")],
)
def test_the_key_is_read_where_the_prompt_has_the_subject(gpt2, prompt, name):
    # A subject that the prompt says before is not the one that is asked for; of several tokens it is the last.
    asked = fact(prompt=prompt, subject=name)
    found = rome(gpt2, asked, 1, key_covariance(gpt2, TEXTS, 1), prefixes=("",), steps=1)
    held = gpt2.run(asked.asked(prompt), capture="blocks.1.mlp.post")["blocks.1.mlp.post"][0]
    column = len(gpt2.batch(prompt.partition("{}")[0] + name).prompt(0)) - 1
    assert torch.allclose(found.key, held[column], atol=1e-5)


def test_a_covariance_of_nothing_is_refused(gpt2):
    cov = key_covariance(gpt2, TEXTS, 1)
    with pytest.raises(NumericalError, match="singular"):
        rome(gpt2, fact(), 1, torch.zeros_like(cov), prefixes=("",), steps=1)


def test_a_continuation_is_scored_on_its_own_tokens(gpt2):
    ids = gpt2.batch("When Mary went the store").ids
    with torch.no_grad():
        logs = gpt2.module(ids).logits.log_softmax(-1)[0]
    start = len(gpt2.batch("When Mary went").prompt(0))
    wanted = sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
    assert continuation(gpt2, ["When Mary went"], " the store") == pytest.approx([wanted], abs=1e-4)


def test_a_continuation_that_changes_the_prompts_tokens_is_refused(gpt2):
    # "When z" and "ebra Mary went" share a word: its tokens are others than those of "When z".
    prompts = [("When M", "ary went the"), ("When Jo", "hn went the store")]
    for prompt, text in prompts:
        before, after = gpt2.batch(prompt).prompt(0), gpt2.batch(prompt + text).prompt(0)
        assert len(after) > len(before) and list(after[: len(before)]) != list(before)
        with pytest.raises(SpecError, match="changes the tokens"):
            continuation(gpt2, [prompt], text)


def test_numbers_are_those_of_plain_hooks(gpt2):
    """Mean and single positions of padded batches against one forward a text."""
    found = read_sites(gpt2, TEXTS, SITE, positions=slice(1, None), batch=3)[SITE]
    for row, text in enumerate(TEXTS):
        held = {}
        hook = gpt2.module.transformer.h[2].register_forward_hook(
            lambda module, given, out, held=held: held.update(x=out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            gpt2.module(gpt2.batch(text).ids)
        hook.remove()
        assert np.allclose(found[row], held["x"].reshape(-1, 32)[1:].mean(0).numpy(), atol=1e-5)
