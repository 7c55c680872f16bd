"""The model card of an aligned model: what was done to which model, with what, and what it is not."""

from typing import TYPE_CHECKING

import yaml

import safesteer
from safesteer.choices import from_steered_layer
from safesteer.direction import RefusalDirection
from safesteer.safety_tokens import SafetyTokens
from safesteer.workspace import Workspace

if TYPE_CHECKING:
    from safesteer.training_stage import AlignedModel

_LIMITS = """\
- It was trained to refuse direct harmful requests like those it was given. Whether it refuses others, or
  requests wrapped in a jailbreak, has to be measured; training does not show it.
- It may refuse harmless requests that sound harmful more often than its base model. Measure over-refusal
  beside refusal before use.
- A refusal direction and its safety tokens come from what the base model already refuses. What the base model
  does not recognise as harmful, the aligned model may not refuse either.
- The weights can be trained or steered back. Alignment by fine-tuning is no protection against whoever holds
  them.
"""


def model_card(
    work: Workspace, direction: RefusalDirection, tokens: SafetyTokens, aligned: "AlignedModel"
) -> str:
    """Write the model card in the hub's format, Markdown with YAML front matter.

    Args:
        work: The run.
        direction: The refusal direction that was used.
        tokens: The safety tokens that were used.
        aligned: The training.

    Returns:
        The card's text.
    """
    settings = work.settings
    base, distillation = settings.model, settings.distillation
    front = {
        "base_model": base.name,
        "library_name": "peft" if distillation.lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["safesteer", "safety", "alignment", *(["lora"] if distillation.lora else [])],
    }
    kind = f"a LoRA adapter (rank {distillation.lora_rank})" if distillation.lora else "all weights"
    sources = [
        ("harmful, trained on", work.harmful),
        ("harmful, for the direction", work.direction_harmful),
        ("harmless", work.harmless),
    ]
    prompts = "\n".join(
        f"| {role} | {len(prompts.prompts)} | `{prompts.fingerprint[:16]}` |" for role, prompts in sources
    )
    only_upper = from_steered_layer(
        distillation.train_layers, distillation.teacher, distillation.refresh_steps
    )
    layers = f"from {direction.layer} on" if only_upper else "all"
    words = ", ".join(f"`{token.text!r}`" for token in tokens.tokens[:20])
    revision = f", revision `{base.revision}`" if base.revision else ""
    flips = (
        f"{direction.flip_rate:.0%} of {direction.flip_answered} {direction.flip_prompts} validation prompts"
        if direction.flip_rate == direction.flip_rate
        else "not measured"
    )
    teacher = (
        "itself under a safety system prompt"
        if distillation.teacher == "system_prompt"
        else "a copy of itself that is steered towards refusal"
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {base.name}, aligned with SafeSteer

[`{base.name}`](#){revision} (fingerprint `{direction.model_fingerprint[:16]}`), trained to refuse harmful
requests by localized on-policy distillation from {teacher}. Trained: {kind}, over
{aligned.steps} optimizer steps. No general data and no reward model were used.

## How it was made

- **Refusal direction**: layer {direction.layer}, position {direction.position}, coefficient
  {direction.coefficient:g}; turned into refusals of what the base model answered: {flips}.
- **Safety tokens**: {len(tokens.tokens)}, first {words}.
- **Divergence**: `{distillation.support}` over `{distillation.vocabulary}`, beta {distillation.beta:g};
  harmless anchors {distillation.anchor_fraction:.0%} of each batch; layers trained: {layers}.

| prompts | number | fingerprint |
|---|---|---|
{prompts}

All settings; `safesteer align --recipe` takes them as they stand (safesteer {safesteer.__version__}, seed
{settings.run.seed}):

```yaml
{settings.yaml().strip()}
```

## Limits

{_LIMITS}"""
