"""Which candidate becomes the refusal direction (method §1, with the stated fallback of §6.7)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from safesteer.direction_scores import Candidate, CandidateScorer
from safesteer.errors import SafeSteerError
from safesteer.next_token import Progress

RELAXED_SHARE_OF_RISE = 0.9
"""When induction is relaxed: the share of the best candidate's rise that a candidate must reach."""


@dataclass(frozen=True)
class CandidateScore:
    """One candidate, its scores (NaN where a cheaper test had discarded it) and what became of it.

    Attributes:
        position: Post-instruction token position, counted from the end: −1 is the last.
        layer: Index of the decoder layer at whose input it was read.
        ablation_refusal: Mean refusal score of harmful prompts with the direction ablated; lower is better.
        induction: Mean refusal score with the vector added, of harmless prompts or of those that the contrast names.
        kl: Mean KL(base ‖ ablated) on harmless prompts, nats.
        verdict: "selected", "eligible" (passed, but another ranks before it), or the test it
            failed.
    """

    position: int
    layer: int
    ablation_refusal: float
    induction: float
    kl: float
    verdict: str


@dataclass(frozen=True)
class Selection:
    """What the selection came to.

    Attributes:
        chosen: The selected candidate.
        scores: Of every candidate, by layer and position.
        relaxed: What was relaxed to find it; None if nothing was.
    """

    chosen: Candidate
    scores: tuple[CandidateScore, ...]
    relaxed: str | None


def select_candidate(
    scorer: CandidateScorer,
    vectors: Mapping[Candidate, Tensor],
    discarded: Mapping[Candidate, str],
    *,
    max_kl: float,
    min_induction: float,
    criterion: str,
    coefficient: float,
    relax: bool,
    progress: Progress,
) -> Selection:
    """Select the candidate with the lowest ablation score of those that pass the tests (method §1).

    Or, by `criterion="induction"`, the one that induces the most when it is added with `coefficient`, as the teacher adds it;
    no ablation score is computed for it.

    The tests discard scores that are not finite, induction < `min_induction` and KL > `max_kl`. Cheap tests
    come first: KL is computed only where induction passes, the ablation score only where both do, which
    changes no choice.

    The fallback, if nothing is left and `relax` is set: of the candidates with KL ≤ `max_kl`, those are taken
    whose induction reaches at least 90 % of the best one's rise over the unsteered refusal score,
    `induction ≥ unsteered + 0.9 · (best − unsteered)`, and the lowest ablation score among them is selected.
    The best must rise at all. What was relaxed is said in the result.

    Args:
        scorer: Scores candidates on the validation prompts.
        vectors: The candidates to score: `r[i,l]`, [H] each.
        discarded: Candidates that need no scores, and why.
        max_kl: In nats.
        min_induction: Log-odds.
        criterion: "ablation" or "induction".
        coefficient: `c`, used by the criterion "induction" alone; the tests add the bare vector (`c = 1`).
        relax: Whether the fallback may be used.
        progress: Told how many candidates each test has been through.

    Raises:
        SafeSteerError: If nothing is left, with the near-misses of each test.
    """
    induction = scorer.induction(vectors, progress)
    finite = [candidate for candidate in vectors if math.isfinite(induction[candidate])]
    kl: dict[Candidate, float] = {}

    def within_kl(candidates: Collection[Candidate]) -> list[Candidate]:
        kl.update(scorer.kl({candidate: vectors[candidate] for candidate in candidates}, progress))
        # A comparison with NaN is false, so what is not a number is discarded.
        return [candidate for candidate in candidates if kl[candidate] <= max_kl]

    threshold = min_induction
    relaxed = None
    passed = within_kl([candidate for candidate in finite if induction[candidate] >= threshold])
    if not passed:
        harmless = within_kl([candidate for candidate in finite if candidate not in kl])
        best = max((induction[candidate] for candidate in harmless), default=-math.inf)
        if not relax or best <= scorer.unsteered:
            raise SafeSteerError(_nothing_left(scorer, induction, kl, max_kl, min_induction, relax))
        threshold = scorer.unsteered + RELAXED_SHARE_OF_RISE * (best - scorer.unsteered)
        passed = [candidate for candidate in harmless if induction[candidate] >= threshold]
        relaxed = (
            f"no candidate with KL ≤ {max_kl:g} reaches induction ≥ {min_induction:g}, so induction ≥ "
            f"{threshold:.3f} was asked for: {RELAXED_SHARE_OF_RISE:.0%} of the best one's rise from "
            f"{scorer.unsteered:.3f} (unsteered) to {best:.3f}, which {len(passed)} of {len(harmless)} reach"
        )
    ablation: dict[Candidate, float] = {}
    # Lower is better: what is left of the refusals, or minus what has come of them.
    if criterion == "ablation":
        ablation = scorer.ablation_refusal({candidate: vectors[candidate] for candidate in passed}, progress)
        rank = ablation
    elif coefficient == 1:
        rank = {candidate: -induction[candidate] for candidate in passed}
    else:
        added = {candidate: coefficient * vectors[candidate] for candidate in passed}
        rank = {candidate: -score for candidate, score in scorer.induction(added, progress).items()}
    eligible = [candidate for candidate in passed if math.isfinite(rank[candidate])]
    if not eligible:
        raise SafeSteerError(
            f"the {criterion} score of all {len(passed)} candidate directions that pass induction and KL is not "
            "a number; load the model in bfloat16 or float32 (--dtype)."
        )
    chosen = min(eligible, key=lambda candidate: (rank[candidate], candidate))

    def verdict(candidate: Candidate) -> str:
        if candidate in discarded:
            return discarded[candidate]
        if candidate in eligible:
            return "selected" if candidate == chosen else "eligible"
        if kl.get(candidate, 0.0) > max_kl:
            return f"kl {kl[candidate]:.4g} > {max_kl:g}"
        if induction[candidate] < threshold:
            return f"induction {induction[candidate]:.4g} < {threshold:.4g}{' (relaxed)' if relaxed else ''}"
        return "not a number"

    scores = tuple(
        CandidateScore(
            position=candidate[1],
            layer=candidate[0],
            ablation_refusal=ablation.get(candidate, math.nan),
            induction=induction.get(candidate, math.nan),
            kl=kl.get(candidate, math.nan),
            verdict=verdict(candidate),
        )
        for candidate in sorted({*vectors, *discarded})
    )
    return Selection(chosen=chosen, scores=scores, relaxed=relaxed)


def _nothing_left(
    scorer: CandidateScorer,
    induction: Mapping[Candidate, float],
    kl: Mapping[Candidate, float],
    max_kl: float,
    min_induction: float,
    relax: bool,
) -> str:
    """Say which test each near-miss failed, and what may be relaxed."""

    def described(candidate: Candidate) -> str:
        where = f"layer {candidate[0]} position {candidate[1]}"
        return f"{where} with induction {induction[candidate]:.3f} and KL {kl[candidate]:.3f}"

    missing = len(induction) - sum(math.isfinite(kl.get(candidate, math.nan)) for candidate in induction)
    scored = [candidate for candidate in kl if math.isfinite(kl[candidate])]
    facts = []
    remedies = []
    inducing = [candidate for candidate in scored if induction[candidate] >= min_induction]
    sparing = [candidate for candidate in scored if kl[candidate] <= max_kl]
    if inducing:
        nearest = min(inducing, key=lambda candidate: kl[candidate])
        facts.append(f"{len(inducing)} fail only KL ≤ {max_kl:g}, the nearest being {described(nearest)}")
        remedies.append(f"raise --max-kl above {kl[nearest]:.3f}")
    if sparing:
        nearest = max(sparing, key=lambda candidate: induction[candidate])
        rises = induction[nearest] > scorer.unsteered
        facts.append(
            f"{len(sparing)} fail only induction ≥ {min_induction:g}, the nearest being {described(nearest)}"
            + ("" if rises else f", where adding nothing has induction {scorer.unsteered:.3f}")
        )
        if rises:
            remedies.append(f"lower --min-induction to {induction[nearest] - 0.001:.3f}")
            remedies.append("" if relax else "allow --fallback relax")
    if both := len(scored) - len(inducing) - len(sparing):
        facts.append(f"{both} fail both")
        if not inducing and not sparing:
            nearest = min(scored, key=lambda candidate: kl[candidate])
            facts.append(f"the nearest being {described(nearest)}")
            remedies.append(f"raise --max-kl above {kl[nearest]:.3f}")
    if missing:
        facts.append(f"{missing} are not a number")
    remedies.append("give harmful prompts that the model refuses clearly and harmless ones that it answers")
    return (
        f"no candidate refusal direction passes: of {len(induction)} scored, {'; '.join(facts) or 'none'}; "
        f"{', or '.join(filter(None, remedies))}."
    )
