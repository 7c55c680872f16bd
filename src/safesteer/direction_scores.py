"""What a candidate refusal direction does to the model: induction, KL and ablation scores (method §1)."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from safesteer.errors import SafeSteerError
from safesteer.next_token import Batch, NextTokenReader, Progress, float64
from safesteer.out_of_memory import InParts
from safesteer.steering import ablate_direction, add_vector, last_occurrence

Candidate = tuple[int, int]
"""Layer, and position counted from the end (−1 is the last)."""

_Edit = Callable[[Tensor, int], AbstractContextManager[None]]
"""Edits a model for a block, with a vector per row [copies · B, H], for so many copies of a batch."""

MOST_KEPT_BYTES = 4 * 2**30
"""Above it a batch's layer inputs are not kept on the CPU, and induction makes whole passes."""


def refusal_score(logits: Tensor, ids: Sequence[int], epsilon: float = 1e-8) -> Tensor:
    """Log-odds that the next token opens a refusal, `log(p + ε) − log(1 − p + ε)` (method §1).

    Args:
        logits: [B, V], any float dtype.
        ids: The refusal openers; `p` is their total probability.
        epsilon: Keeps the logarithms finite.

    Returns:
        [B] float64 log-odds: above 0 where the model rather refuses.
    """
    # In at least float32, summed in float64: the same terms are in both sums, so 1 − p loses nothing to rounding.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    terms = (wide - wide.amax(-1, keepdim=True)).exp()
    opening = float64(terms[:, list(dict.fromkeys(ids))]).sum(-1)
    total = _summed(terms)
    return torch.log(opening / total + epsilon) - torch.log((total - opening).clamp(min=0) / total + epsilon)


def _summed(terms: Tensor) -> Tensor:
    """Sum the last axis in float64, without a wide copy where the device has float64."""
    return float64(terms).sum(-1) if terms.device.type == "mps" else terms.sum(-1, dtype=torch.float64)


def refusal_scores(reader: NextTokenReader, prompts: Sequence[str], ids: Sequence[int]) -> Tensor:
    """Score prompts, in their order.

    Returns:
        [n] float64, on the CPU.
    """
    scores = torch.empty(len(prompts), dtype=torch.float64)
    for batch in reader.batches(prompts):
        scores[list(batch.rows)] = refusal_score(reader.logits(batch), ids).cpu()
    return scores


def mean_layer_inputs(
    reader: NextTokenReader, layers: Sequence[nn.Module], prompts: Sequence[str], positions: int
) -> Tensor:
    """Average the residual stream at the layers' inputs over prompts.

    Args:
        reader: Of the model.
        layers: Its decoder layers, or the first of them.
        prompts: Rendered with the reader's chat template.
        positions: How many of the last positions.

    Returns:
        [layers, positions, H] float64, on the CPU. Index −1 of the second axis is the last position.
    """
    total: Tensor | None = None
    for batch in reader.batches(prompts):
        with _recorded_inputs(layers, positions) as inputs:
            reader.hidden(batch)
        summed = torch.stack([float64(hidden_BPH).sum(0) for hidden_BPH in inputs])
        total = summed if total is None else total + summed
    assert total is not None, "callers check that there are prompts"
    return total / len(prompts)


class KLFrom:
    """KL of next-token distributions, `Σ_v p (log p − log q)`, in float64, from one `p` to many `q`.

    What depends on `p` alone is kept: `p` itself, [B, V] float64, and its entropy.

    Args:
        logits: Of `p`, [B, V].
    """

    def __init__(self, logits: Tensor) -> None:
        self._p = float64(logits).softmax(-1)
        self._negative_entropy: Tensor = -torch.special.entr(self._p).sum(-1)

    def to(self, logits: Tensor) -> Tensor:
        """Return the divergence to the `q` of these logits, [B, V]; [B] in nats."""
        wide = float64(logits)
        expected: Tensor = torch.einsum("bv,bv->b", self._p, wide)
        if expected.isnan().any():
            # A token that p rules out adds nothing, where 0 · −∞ makes the sum NaN.
            expected = torch.einsum("bv,bv->b", self._p, wide.masked_fill(self._p == 0, 0.0))
        return self._negative_entropy - expected + wide.logsumexp(-1)


class CandidateScorer:
    """Scores candidate directions on validation prompts.

    Every score needs one forward pass per prompt and candidate, of which the head sees the last position only. As many
    candidates as fill a pass go through it together. Adding a vector at layer `l` leaves the layers below unchanged, so
    for induction they are not run again: their outcome is kept from one unsteered pass (method §6.4). Where a model's
    layers are tied by more than the residual stream, so that resuming in the middle is not the same, whole passes are
    made.

    Args:
        reader: Of the model.
        layers: All its decoder layers.
        ids: The refusal openers.
        harmful: Validation prompts, for the ablation refusal score.
        harmless: Validation prompts, for KL.
        induced: Validation prompts that adding a candidate should make the model refuse; the harmless ones by default.
        at: The post-instruction tokens, if candidates are added only there; empty for every position.
    """

    def __init__(
        self,
        reader: NextTokenReader,
        layers: Sequence[nn.Module],
        ids: Sequence[int],
        harmful: Sequence[str],
        harmless: Sequence[str],
        induced: Sequence[str] | None = None,
        at: Sequence[int] = (),
    ) -> None:
        self._reader = reader
        self._layers = list(layers)
        self._ids = tuple(ids)
        self._at = tuple(at)
        self._harmful = reader.batches(harmful)
        self._harmless = reader.batches(harmless)
        self._to_induce = harmless if induced is None else induced
        self._induced = reader.batches(self._to_induce)
        self._in_parts = InParts()
        base = [reader.hidden(batch)[:, -1] for batch in self._harmless]
        self._kl_from = [KLFrom(logits) for logits in self._logits(base)]

    @functools.cached_property
    def unsteered(self) -> float:
        """Mean refusal score of the `induced` prompts, no vector added; few searches need it."""
        return refusal_scores(self._reader, self._to_induce, self._ids).mean().item()

    def induction(self, candidates: Mapping[Candidate, Tensor], progress: Progress) -> dict[Candidate, float]:
        """Mean refusal score of the `induced` prompts with `r[i,l]` added at layer `l`'s input, coefficient 1.

        Args:
            candidates: `r`, [H] each.
            progress: Told how many steered batches are done.
        """
        highest = max((layer for layer, _ in candidates), default=0)
        resume = _resume_or_none(self._reader, self._layers, highest, self._induced[0]) if highest else None
        hidden: dict[Candidate, list[Tensor]] = {candidate: [] for candidate in candidates}
        done = 0
        for batch in self._induced:
            inputs: list[Tensor] = []
            weight = self._reader.head.weight
            width = weight.shape[-1] * weight.element_size()
            if resume and batch.input_ids.numel() * width * (highest + 1) <= MOST_KEPT_BYTES:
                with _recorded_inputs(self._layers[: highest + 1]) as inputs:
                    self._reader.hidden(batch)
            for layer in sorted({layer for layer, _ in candidates}):
                alike = {
                    candidate: candidates[candidate] for candidate in candidates if candidate[0] == layer
                }
                below = (resume, inputs[layer]) if resume and inputs else None
                for candidate, last_BH in self._together(alike, batch, self._adding(layer, batch, below)):
                    hidden[candidate].append(last_BH)
                done += len(alike)
                progress("induction", done, len(candidates) * len(self._induced))
        return {candidate: self._refusal(parts) for candidate, parts in hidden.items()}

    def kl(self, candidates: Mapping[Candidate, Tensor], progress: Progress) -> dict[Candidate, float]:
        """Mean KL(base ‖ ablated) of the harmless prompts' next-token distributions, in nats.

        Args:
            candidates: `r`, [H] each.
            progress: Told how many ablated batches are done.
        """
        kl = {}
        for candidate, hidden in self._ablated(candidates, self._harmless, "KL", progress).items():
            parts = [p.to(logits) for p, logits in zip(self._kl_from, self._logits(hidden), strict=True)]
            kl[candidate] = torch.cat(parts).mean().item()
        return kl

    def ablation_refusal(
        self, candidates: Mapping[Candidate, Tensor], progress: Progress
    ) -> dict[Candidate, float]:
        """Mean refusal score of the harmful prompts with `r̂ r̂ᵀ` projected out of the residual stream.

        Args:
            candidates: `r`, [H] each.
            progress: Told how many ablated batches are done.
        """
        hidden = self._ablated(candidates, self._harmful, "ablation", progress)
        return {candidate: self._refusal(parts) for candidate, parts in hidden.items()}

    def _ablated(
        self, candidates: Mapping[Candidate, Tensor], batches: Sequence[Batch], doing: str, progress: Progress
    ) -> dict[Candidate, list[Tensor]]:
        """Return the last hidden states of each batch, [B, H], with each candidate ablated."""
        hidden: dict[Candidate, list[Tensor]] = {candidate: [] for candidate in candidates}
        done = 0

        def ablating(directions: Tensor, copies: int) -> AbstractContextManager[None]:
            return ablate_direction(self._layers, directions)

        for batch in batches:
            for candidate, last_BH in self._together(candidates, batch, ablating):
                hidden[candidate].append(last_BH)
                done += 1
                progress(doing, done, len(candidates) * len(batches))
        return hidden

    def _adding(self, layer: int, batch: Batch, below: "tuple[_Resume, Tensor] | None") -> _Edit:
        """Add vectors at a layer, without running those below where what they lead to is known, [B, T, H]."""
        where_BT = last_occurrence(batch.input_ids, self._at) if self._at else None

        @contextlib.contextmanager
        def adding(vectors: Tensor, copies: int) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                if below is not None:
                    resume, hidden_BTH = below
                    stack.enter_context(resume.at(layer, hidden_BTH.repeat(copies, 1, 1)))
                where = None if where_BT is None else functools.partial(where_BT.repeat, copies, 1)
                stack.enter_context(add_vector(self._layers[layer], vectors, where=where))
                yield

        return adding

    def _together(
        self, candidates: Mapping[Candidate, Tensor], batch: Batch, edit: _Edit
    ) -> Iterator[tuple[Candidate, Tensor]]:
        """Run a batch once per candidate, as many of them in one pass as fill it or as memory allows.

        Args:
            candidates: `r`, [H] each.
            batch: The prompts.
            edit: Edits the model.

        Yields:
            Each candidate, and the last hidden states with it, [B, H].
        """
        rows = len(batch.rows)

        def last_states(some: Sequence[Candidate]) -> Sequence[Tensor]:
            vectors = torch.stack([candidates[candidate] for candidate in some]).repeat_interleave(rows, 0)
            with edit(vectors, len(some)):
                return torch.split(self._reader.hidden(batch.repeated(len(some)))[:, -1], rows)

        everyone = list(candidates)
        most = self._reader.copies(batch)
        for start in range(0, len(everyone), most):
            some = everyone[start : start + most]
            yield from zip(some, self._in_parts(last_states, some), strict=True)

    def _refusal(self, hidden: Sequence[Tensor]) -> float:
        """Mean refusal score after these last hidden states, [B, H] each."""
        return torch.cat([refusal_score(part, self._ids) for part in self._logits(hidden)]).mean().item()

    def _logits(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """Next-token logits after these last hidden states, as many rows at a time as the batch size allows."""
        for rows in torch.split(torch.cat(list(hidden)), self._reader.batch_size):
            yield self._reader.head.logits(rows)


@dataclass(frozen=True)
class _Resume:
    """Runs a model from one of its layers on.

    Attributes:
        layers: All decoder layers.
        in_tuple: Whether they return their hidden states as the first of a tuple.
    """

    layers: Sequence[nn.Module]
    in_tuple: bool = False

    @contextlib.contextmanager
    def at(self, index: int, hidden_BTH: Tensor) -> Iterator[None]:
        """Leave out the layers below `index`, and give that layer `hidden_BTH` as its input."""
        skipped = self.layers[:index]
        hidden = hidden_BTH.to(next(self.layers[index].parameters()).device)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.in_tuple else hidden

        own = [layer.__dict__.get("forward") for layer in skipped]
        for layer in skipped:
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer, before in zip(skipped, own, strict=True):
                if before is None:
                    del layer.__dict__["forward"]
                else:  # accelerate replaces it too, when it spreads a model over devices
                    layer.__dict__["forward"] = before


def _resume_or_none(
    reader: NextTokenReader, layers: Sequence[nn.Module], highest: int, batch: Batch
) -> _Resume | None:
    """Try, on one prompt, whether resuming at each layer up to `highest` gives what a whole pass gives."""
    one = replace(batch, rows=batch.rows[:1], input_ids=batch.input_ids[:1], mask=batch.mask[:1])
    outputs: list[Any] = []
    handle = layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with _recorded_inputs(layers[: highest + 1]) as inputs:
            whole = reader.hidden(one)
    finally:
        handle.remove()
    resume = _Resume(layers, in_tuple=isinstance(outputs[0], tuple))
    for index in range(1, highest + 1):
        try:
            with resume.at(index, inputs[index]):
                resumed = reader.hidden(one)
            same = torch.allclose(resumed, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            # A later layer misses what a skipped one would have left for it, such as keys to share.
            return None
        if not same:
            return None
    return resume


@contextlib.contextmanager
def _recorded_inputs(layers: Sequence[nn.Module], positions: int | None = None) -> Iterator[list[Tensor]]:
    """Keep what the layers read from the residual stream, on the CPU: [B, T or the last of T, H] each."""
    recorded: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BTH = args[0] if args else kwargs["hidden_states"]
        if hidden_BTH.dim() != 3:
            raise SafeSteerError(
                f"{type(module).__name__} passes hidden states of shape {list(hidden_BTH.shape)} on, not "
                "[B, T, H], so there is no one residual stream to find a direction in; choose a model of "
                "another architecture."
            )
        kept = hidden_BTH if positions is None else hidden_BTH[:, -positions:]
        # A copy even on the CPU, because some layers add to their input in place.
        recorded.append(kept.detach().to("cpu", copy=True))

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield recorded
