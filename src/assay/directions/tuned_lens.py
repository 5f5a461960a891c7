"""The tuned lens: an affine map a layer, trained so that the final norm and unembedding read each layer's stream.

    lens_l(h) = U(h + A_l h + b_l),    U = final norm and unembedding,    A_l = 0, b_l = 0 at the start

trained by `KL(final || lens_l)`. At the start it is the logit lens, and weight decay pulls it back there. What it reads
is decodable by an affine map; a lens can learn what later layers compute, so this is no proof that the model has
computed it there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.activations.subject import Subject
from assay.base.artifacts import user_path, write_safetensors
from assay.base.errors import DamagedFile, NumericalError, SpecError
from assay.base.rng import numpy_stream
from assay.base.stats import Interval, bootstrap_interval
from assay.directions.data import several
from assay.directions.vectors import Origin
from assay.subjects.norms import read_norm

FORMAT = "assay.tuned-lens/1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TunedLens:
    """A trained lens.

    Args:
        sites: What it reads: the stream before the first block and after each block but the last.
        weight: A, `[layers, d, d]`.
        bias: b, `[layers, d]`.
        unembedding: The hash of the final norm and the unembedding it was trained for.
        losses: The mean KL over layers at each step of training, in nats.
        origin: Where it comes from.
    """

    sites: tuple[str, ...]
    weight: Float[Tensor, "layers d d"]
    bias: Float[Tensor, "layers d"]
    unembedding: str
    losses: tuple[float, ...] = ()
    origin: Origin = field(default_factory=lambda: Origin(method="given"))

    def __post_init__(self) -> None:
        if not len(self.sites) == len(self.weight) == len(self.bias):
            raise SpecError(f"a lens of {len(self.sites)} sites has {len(self.weight)} maps", "sites")

    def translated(self, site: str, stream: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """`h + A h + b`: the stream of a layer as the final layer would write it.

        Raises:
            SpecError: The lens has no map for the site, or the stream has another width.
        """
        if site not in self.sites:
            raise SpecError(f"the lens reads {self.sites[0]} to {self.sites[-1]}, not {site}", "site")
        if stream.shape[-1] != self.bias.shape[1]:
            raise SpecError(f"the lens reads {self.bias.shape[1]} numbers; got {tuple(stream.shape)}", "stream")
        i = self.sites.index(site)
        h = stream.float()
        out: Tensor = h + h @ self.weight[i].to(h).T + self.bias[i].to(h)
        return out

    def logits(self, subject: Subject, site: str, stream: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows vocab"]:
        """What the lens reads in a stream; the unembedding is hashed anew at every call, `translated` is for loops.

        Raises:
            SpecError: It was trained for another unembedding, or has no map for the site.
        """
        self.check(subject)
        out: Tensor = subject.parts.logits(self.translated(site, stream).to(stream.dtype)).float()
        return out

    def check(self, subject: Subject) -> None:
        """See that a subject has the unembedding that the lens was trained for.

        Raises:
            SpecError: It has another.
        """
        found = unembedding_hash(subject)
        if found != self.unembedding:
            raise SpecError(
                f"the lens was trained for the unembedding {self.unembedding[:12]}, and {subject.name} has "
                f"{found[:12]}: train one for it",
                "subject",
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """All that the lens is, as arrays: its numbers, and what it belongs to as the bytes of a JSON text."""
        about = {
            "format": FORMAT,
            "sites": list(self.sites),
            "unembedding": self.unembedding,
            "losses": list(self.losses),
            "origin": self.origin.to_dict(),
        }
        said = np.frombuffer(json.dumps(about).encode("utf-8"), dtype=np.uint8)
        return {"weight": self.weight.numpy(), "bias": self.bias.numpy(), "about": said}

    def save(self, path: str | Path) -> None:
        """Write the lens as one safetensors file."""
        arrays = self.arrays()
        about = arrays.pop("about").tobytes().decode("utf-8")
        write_safetensors(user_path(path), arrays, {"assay": about})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], source: str = "this") -> TunedLens:
        """The lens whose `arrays` these are.

        Args:
            arrays: Its arrays.
            source: What they were read from, for errors.

        Raises:
            DamagedFile: They are of no lens.
        """
        try:
            about: dict[str, Any] = json.loads(arrays["about"].tobytes() or b"{}")
            if about.get("format") != FORMAT:
                raise DamagedFile(f"{source} holds no lens that assay wrote")
            return cls(
                sites=tuple(about["sites"]),
                weight=torch.from_numpy(np.array(arrays["weight"])),
                bias=torch.from_numpy(np.array(arrays["bias"])),
                unembedding=about["unembedding"],
                losses=tuple(about["losses"]),
                origin=Origin.from_dict(about["origin"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{source} is no lens: {error}") from error

    @classmethod
    def load(cls, path: str | Path, subject: Subject | None = None) -> TunedLens:
        """Read back what `save` wrote, or a study's artifact, and check it against a subject where one is given.

        Raises:
            DamagedFile: It is no such file.
            SpecError: The subject has another unembedding.
        """
        from safetensors import SafetensorError, safe_open

        file = user_path(path)
        try:
            with safe_open(file, framework="np") as opened:
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}
                said = (opened.metadata() or {}).get("assay", "")
        except (SafetensorError, OSError, TypeError) as error:
            raise DamagedFile(f"{file} is no lens: {error}") from error
        if "about" not in arrays:
            arrays["about"] = np.frombuffer(said.encode("utf-8"), dtype=np.uint8)
        lens = cls.from_arrays(arrays, str(file))
        if subject is not None:
            lens.check(subject)
        return lens


@dataclass(frozen=True, slots=True, kw_only=True)
class LensDivergence:
    """How far a layer's readings are from the model's own output, in nats a token, on text that was not trained on.

    Args:
        site: The layer.
        logit_lens: `KL(final || logit lens)`.
        tuned_lens: `KL(final || tuned lens)`.
        gain: The bootstrap interval over texts of the first less the second; None for one text.
    """

    site: str
    logit_lens: float
    tuned_lens: float
    gain: Interval | None


def unembedding_hash(subject: Subject) -> str:
    """The hash of what a lens reads through: the final norm and the unembedding, in float32."""
    parts = subject.parts
    norm = read_norm(parts.final_norm, parts.d_model)
    weight, bias = parts.unembedding()
    sha = hashlib.sha256(f"{norm.kind} {norm.eps:.6g} {parts.softcap}".encode())
    for values in (norm.gain, norm.bias, weight, bias):
        if values is not None:
            sha.update(values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return sha.hexdigest()


def lens_sites(subject: Subject) -> tuple[str, ...]:
    """What a lens reads: the stream before the first block and after each block but the last, which is the output."""
    return ("blocks.0.resid_pre", *(f"blocks.{i}.resid_post" for i in range(subject.n_blocks - 1)))


def train_tuned_lens(
    subject: Subject,
    texts: Sequence[str] | Tensor,
    *,
    steps: int = 250,
    batch: int = 8,
    optimiser: Literal["sgd", "adam"] = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    decay: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> TunedLens:
    """Train a tuned lens.

    Args:
        subject: The subject; its parameters get no gradient.
        texts: Training text, or token ids `[rows, pos]`.
        steps: Optimiser steps. The published recipe has 250 steps of 2^18 tokens.
        batch: Texts a step.
        optimiser: "sgd" with Nesterov momentum, as published, or "adam", which needs fewer tokens.
        lr: 0.1 for "sgd" (a scale of 1 times `1 - momentum`) and 1e-3 for "adam" when None; it falls linearly to 0.
        momentum: Of "sgd".
        decay: Weight decay, towards the logit lens.
        seed: Seed of the order of texts.
        progress: Told how many steps are done, of how many.

    Raises:
        SpecError: There are no texts, or the model is not unembedded by a norm and one matrix.
        NumericalError: The loss is not finite.

    Source: Belrose et al. 2023, "Eliciting latent predictions from transformers with the tuned lens", section 3.
    """
    several(texts)
    if optimiser not in ("sgd", "adam"):
        raise SpecError(f"optimiser is {optimiser!r}; valid: 'sgd', 'adam'", "optimiser")
    if steps < 1 or batch < 1:
        raise SpecError("training a lens needs steps and batch of one or more", "steps")
    sites, d = lens_sites(subject), subject.parts.d_model
    weight = torch.zeros(len(sites), d, d, requires_grad=True)
    bias = torch.zeros(len(sites), d, requires_grad=True)
    rate = lr if lr is not None else (1 - momentum if optimiser == "sgd" else 1e-3)
    tuned: torch.optim.Optimizer = (
        torch.optim.SGD([weight, bias], lr=rate, momentum=momentum, nesterov=True, weight_decay=decay)
        if optimiser == "sgd"
        else torch.optim.AdamW([weight, bias], lr=rate, weight_decay=decay)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(tuned, lambda step: 1 - step / steps)
    order = _order(len(texts), steps * batch, seed)
    losses = []
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        piece: Any = texts[rows] if isinstance(texts, Tensor) else [texts[i] for i in rows]
        streams, final = _read(subject, piece, sites)
        tuned.zero_grad()
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        losses.append(_step(subject, streams, final, weight, bias))
        if not math.isfinite(losses[-1]):
            raise NumericalError(f"the loss is {losses[-1]} at step {step}; lower lr")
        torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        tuned.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    detail = {"steps": steps, "batch": batch, "optimiser": optimiser, "lr": rate, "decay": decay}
    return TunedLens(
        sites=sites,
        weight=weight.detach(),
        bias=bias.detach(),
        unembedding=unembedding_hash(subject),
        losses=tuple(losses),
        origin=Origin(method="tuned lens", subject=subject.fingerprint, seed=seed, detail=detail),
    )


def lens_divergence(
    subject: Subject, lens: TunedLens, texts: Sequence[str] | Tensor, *, batch: int = 8, seed: int = 0
) -> list[LensDivergence]:
    """Read each layer through the logit lens and the tuned lens, beside the model's own output.

    Args:
        subject: The subject.
        lens: The tuned lens.
        texts: Text that it was not trained on.
        batch: Texts that go through the model at once.
        seed: Seed of the bootstrap.

    Raises:
        SpecError: The lens was trained for another unembedding, or there are no texts.
    """
    lens.check(subject)
    several(texts)
    plain: list[list[float]] = [[] for _ in lens.sites]
    tuned: list[list[float]] = [[] for _ in lens.sites]
    for start in range(0, len(texts), batch):
        for row in range(start, min(start + batch, len(texts))):
            piece: Any = texts[row : row + 1]
            streams, final = _read(subject, piece, lens.sites)
            with torch.no_grad():
                for i, site in enumerate(lens.sites):
                    plain[i].append(float(_kl(final, subject.parts.logits(streams[i]).float())))
                    translated = lens.translated(site, streams[i]).to(streams[i].dtype)
                    tuned[i].append(float(_kl(final, subject.parts.logits(translated).float())))
    found = []
    for site, a, b in zip(lens.sites, plain, tuned, strict=True):
        gain = bootstrap_interval(np.subtract(a, b), seed=seed) if len(a) > 1 else None
        found.append(LensDivergence(site=site, logit_lens=float(np.mean(a)), tuned_lens=float(np.mean(b)), gain=gain))
    return found


def _order(n: int, wanted: int, seed: int) -> list[int]:
    rng = numpy_stream(seed, "tuned lens", "order")
    order: list[int] = []
    while len(order) < wanted:
        order += rng.permutation(n).tolist()
    return order


@torch.no_grad()
def _read(subject: Subject, piece: Any, sites: Sequence[str]) -> tuple[list[Tensor], Tensor]:
    """The streams of all real tokens of some texts, `[tokens, d]` a site, and the model's log-probabilities there."""
    run = subject.run(piece, capture=list(sites))
    spans = [(row, s, n) for row, (s, n) in enumerate(zip(run.batch.starts, run.batch.lengths, strict=True))]
    streams = [torch.cat([run[site][row, s : s + n] for row, s, n in spans]).detach() for site in sites]
    final = torch.cat([run.logits[row, s : s + n] for row, s, n in spans]).float().log_softmax(-1)
    return streams, final


def _kl(final: Tensor, logits: Tensor) -> Tensor:
    """`KL(final || logits)`, the mean over tokens."""
    kl: Tensor = (final.exp() * (final - logits.log_softmax(-1))).sum(-1).mean()
    return kl


def _step(subject: Subject, streams: list[Tensor], final: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Add the gradient of every layer's KL, one layer at a time so that one layer's logits are held; the mean KL."""
    total = 0.0
    assert weight.grad is not None and bias.grad is not None
    for i, stream in enumerate(streams):
        with torch.inference_mode(False), torch.enable_grad():
            a, b = weight[i].detach().requires_grad_(), bias[i].detach().requires_grad_()
            h = stream.float()
            loss = _kl(final, subject.parts.logits((h + h @ a.T + b).to(stream.dtype)).float())
            slope_a, slope_b = torch.autograd.grad(loss, [a, b])
        weight.grad[i], bias.grad[i] = slope_a, slope_b
        total += float(loss.detach())
    return total / len(streams)
