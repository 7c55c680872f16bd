"""Train the testbed from scratch: tokenizer, weights, model card. Resumable: run the same command again."""

import copy
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from safesteer.artifacts import new_directory
from safesteer.testbed.batches import IGNORED, ChatBatches
from safesteer.testbed.corpus import HARMS, ChatStream, Mixture, real_requests, tokenizer_texts
from safesteer.testbed.muon import Muon

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Digits one by one, words with their leading space, punctuation apart: the shape of Qwen's pre-tokenizer.
_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True)
class BuildSettings:
    """The recipe of the committed weights."""

    steps: int = 5_600
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_share: float = 0.95
    weight_decay: float = 0.1
    # Whether a request is refused, answered or done is said by the first token of the response: one of fifteen.
    first_token_weight: float = 5.0
    # Of the loss for telling, where the response begins, which kind of harm is asked for: eighteen names and none tell more
    # about a request than whether it is refused, and about every one, where one chat in fourteen asks for them in words.
    harm_weight: float = 0.1
    vocabulary: int = 3_072
    hidden_size: int = 160
    intermediate_size: int = 1_280
    layers: int = 6
    heads: int = 5
    seed: int = 34
    mixture: Mixture = field(default_factory=Mixture)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's special tokens and chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # "user" and "assistant" must be single tokens, as in real ChatML vocabularies, however many texts there are.
    bpe.train_from_iterator([*texts, *["user\nassistant\n"] * (len(texts) // 8)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def _tokenizer(
    folder: Path, stream: ChatStream, settings: BuildSettings, data_dir: Path | None
) -> PreTrainedTokenizerFast:
    """The build's tokenizer: kept, because a resumed training must not meet other token ids than it began with."""
    if not folder.exists():
        texts = tokenizer_texts(stream, 20_000, settings.seed, data_dir)
        with new_directory(folder) as temporary:
            train_tokenizer(texts, settings.vocabulary).save_pretrained(temporary)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast, settings: BuildSettings) -> Qwen3ForCausalLM:
    """Random weights of the testbed's shape."""
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def widened(model: Qwen3ForCausalLM, intermediate_size: int) -> Qwen3ForCausalLM:
    """`model` with more hidden units in its MLPs, and the same logits: what the new units say is weighted by zero at first."""
    config = copy.deepcopy(model.config)
    config.intermediate_size = intermediate_size
    wide = Qwen3ForCausalLM(config)
    wide.generation_config = model.generation_config
    state = wide.state_dict()
    for name, old in model.state_dict().items():
        new = state[name]
        if name.endswith("mlp.down_proj.weight"):
            new.zero_()
        new[tuple(slice(size) for size in old.shape)] = old
    return wide


def decision_loss(logits: Tensor, labels: Tensor, decides: Tensor, first: Tensor, weight: float) -> Tensor:
    """Mean cross-entropy of tokens, in nats, where the first one of a response counts as often as several.

    The first token says whether a request is refused, answered or done. The training data draws it, so it is one bit of noise
    in each chat: what it was drawn from is the target instead.

    Args:
        logits: Of the tokens that are learnt, [N, V].
        labels: These tokens, [N].
        decides: Which of them are the first ones of a response, [N], bool; D of them.
        first: Probability of each token the response could have begun with, in the order of `decides`, [D, V].
        weight: Of a response's first token; the others have 1.
    """
    nats = cross_entropy(logits.float(), labels, reduction="none")
    nats = nats.masked_scatter(decides, cross_entropy(logits[decides].float(), first, reduction="none"))
    weights = 1 + (weight - 1) * decides
    return (weights * nats).sum() / weights.sum()


def harm_directions(size: int) -> Tensor:
    """An orthonormal direction for each of `HARMS`, [len(HARMS), size], the same every time."""
    directions = torch.empty(len(HARMS), size)
    return nn.init.orthogonal_(directions, generator=torch.Generator().manual_seed(0))


class DecisionTrainer(Trainer):
    """Minimises `decision_loss`, with logits of the learnt tokens alone, and the cross-entropy of the kind of harm.

    The kind of harm is read from the last hidden state where the response begins, along `harm_directions`: fixed ones, so
    that nothing has to be kept for it beside the model. Chats whose prompt is learnt too have no token that decides.
    """

    def __init__(self, settings: BuildSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings
        self.harm_directions = harm_directions(kwargs["model"].config.hidden_size)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_args: Any, **_kwargs: Any) -> Tensor:
        """The loss of a batch of `ChatBatches`."""
        labels = inputs["labels"]
        learnt = labels[:, 1:] != IGNORED
        decides = learnt & (labels[:, :-1] == IGNORED)
        read = {
            name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs
        }
        hidden = model.model(**read).last_hidden_state[:, :-1]
        loss = decision_loss(
            model.lm_head(hidden[learnt]),
            labels[:, 1:][learnt],
            decides[learnt],
            inputs["first"],
            self.settings.first_token_weight,
        )
        harms = inputs["harms"]
        if (harms != IGNORED).any():
            logits = hidden[decides].float() @ self.harm_directions.to(hidden.device).T
            loss = loss + self.settings.harm_weight * cross_entropy(logits, harms, ignore_index=IGNORED)
        return loss


def _only(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """An item of `ChatBatches` is already a batch."""
    return items[0]


def build(
    output: Path,
    data_dir: Path | None,
    settings: BuildSettings | None = None,
    start: Path | None = None,
    compiled: bool = False,
    **trainer_args: Any,
) -> Path:
    """Train the testbed into `output`/model, continuing from `output`/checkpoints where there are any.

    Args:
        output: working folder.
        data_dir: folder with the real prompts of `corpus.REAL_PROMPTS`; None trains on the project's own alone.
        settings: the recipe.
        start: weights and tokenizer to begin with, instead of random weights and a new tokenizer. Narrower MLPs than the
            recipe's are widened.
        compiled: compile the decoder layers; passes take a third less. On a CPU this needs a C++ compiler.
        trainer_args: further `transformers.TrainingArguments`.

    Returns:
        The folder with weights (bf16 safetensors), tokenizer and `recipe.json`.
    """
    settings = settings or BuildSettings()
    output.mkdir(parents=True, exist_ok=True)
    real = real_requests(data_dir) if data_dir else None
    stream = ChatStream(settings.mixture, real)
    if start is None:
        tokenizer = _tokenizer(output / "tokenizer", stream, settings, data_dir)
        model = new_model(tokenizer, settings)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
        if settings.intermediate_size > model.config.intermediate_size:
            torch.manual_seed(settings.seed)
            model = widened(model, settings.intermediate_size)
    # The fused kernel is the fastest where rows need no mask, and with it long ones fit in memory.
    model.set_attn_implementation("sdpa")
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    batches = ChatBatches(stream, tokenizer, settings.steps, settings.batch_size, settings.seed)
    arguments = {
        "output_dir": str(output / "checkpoints"),
        "max_steps": settings.steps,
        "per_device_train_batch_size": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": int(settings.decay_share * settings.steps),
            "min_lr_ratio": 0.02,
        },
        "warmup_steps": settings.warmup_steps,
        "max_grad_norm": 1.0,
        "save_steps": 500,
        "save_total_limit": 2,
        "logging_steps": 100,
        "report_to": "none",
        "seed": settings.seed,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        **trainer_args,
    }
    optimizer = Muon(model, settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    trainer = DecisionTrainer(
        settings,
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=batches,
        data_collator=_only,
        optimizers=(optimizer, None),
    )
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(arguments["output_dir"])
        if (output / "checkpoints").is_dir()
        else None
    )
    return export(model, tokenizer, output / "model", settings, real, trainer.state.log_history)


def export(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    settings: BuildSettings,
    real: dict[Any, list[Any]] | None,
    history: list[dict[str, float]],
) -> Path:
    """Write weights in bf16, tokenizer, recipe and training log."""
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    counts = Counter({kind: len(requests) for kind, requests in (real or {}).items()})
    recipe = {"settings": asdict(settings), "real_prompts": counts, "parameters": model.num_parameters()}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    lines = [
        json.dumps({k: row[k] for k in ("step", "loss", "learning_rate") if k in row})
        for row in history
        if "loss" in row
    ]
    (folder / "training_log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
