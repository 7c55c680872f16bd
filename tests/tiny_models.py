"""Small real models and tokenizers: transformers' own classes with random weights, real chat templates."""

import base64
import copy
import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

KINDS = ("qwen2", "qwen3", "llama", "gemma3", "mistral", "phi3", "smollm3", "gpt_neox", "qwen3_moe")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Larger than usual, so that a random model has opinions and an edit of its residual stream shows.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "llama": ("Llama", {}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 8,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 20.0,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def tiny_model(kind: str, vocab_size: int = 160, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a causal language model with random weights: hidden 32, 4 layers, float32, evaluation mode.

    Args:
        kind: One of `KINDS`.
        vocab_size: At least 3; `len(tokenizer)` to fit a tokenizer.
        seed: Of the weights.
        overrides: Of the config.
    """
    name, special = _CLASSES[kind]
    prefix = "Gemma3Text" if name == "Gemma3" else name
    config_class = getattr(transformers, f"{prefix}Config")
    config = config_class(**{**_SIZES, **special, "vocab_size": vocab_size, **overrides})
    config._attn_implementation = "eager" if kind == "gemma3" else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.eval()
    return model


def adapted(model: PreTrainedModel, **options: Any) -> Any:
    """Put a LoRA adapter with random weights on a model: rank 4, on every linear map by default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False, "r": 4, **options})
        model = get_peft_model(model, config)
    model.eval()
    return model


@functools.lru_cache
def chatml_tokenizer() -> PreTrainedTokenizerBase:
    """A ChatML tokenizer that needs no data: byte-level BPE of about 500 tokens, trained on the spot."""
    tokenizer = _trained_bpe(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return _fast(tokenizer, CHATML_TEMPLATE, eos="<|im_end|>", pad="<|endoftext|>")


@functools.lru_cache
def tokenizer_for(kind: str, shared_data: Path) -> PreTrainedTokenizerBase:
    """Build a tokenizer with a family's real chat template, and its real vocabulary where there is one.

    Args: kind: "chatml" (needs no data); real vocabularies: "qwen2.5", "qwen3", "qwen3-2507", "smollm2",
        "llama3",
            "llama3.1", "llama3.2"; small trained ones: "gemma", "gemma3", "mistral-v1", "mistral-v3", "phi3",
            "phi3.5".
        shared_data: The folder of the `shared_data` fixture.
    """
    if kind == "chatml":
        return chatml_tokenizer()
    folder = shared_data / "tokenizers"
    family, _, template_name = {
        "qwen2.5": "qwen2.5/chat_template",
        "qwen3": "qwen3/chat_template",
        "qwen3-2507": "qwen3/chat_template_instruct_2507",
        "smollm2": "smollm2/chat_template",
        "llama3": "llama3/chat_template",
        "llama3.1": "llama3/chat_template_llama3_1",
        "llama3.2": "llama3/chat_template_llama3_2",
        "gemma": "gemma/chat_template",
        "gemma3": "gemma/chat_template_gemma3",
        "mistral-v1": "mistral/chat_template_v1_spm",
        "mistral-v3": "mistral/chat_template_v3_spm",
        "phi3": "phi3/chat_template",
        "phi3.5": "phi3/chat_template_phi3_5",
    }[kind].partition("/")
    template = (folder / family / f"{template_name}.jinja").read_text(encoding="utf-8")
    if family in ("qwen2.5", "qwen3", "llama3"):
        # Shares the large vocabulary with the family's other templates.
        tokenizer = copy.copy(_real_tokenizer(family, folder))
        tokenizer.chat_template = template
        return tokenizer
    if family == "smollm2":
        smollm2 = Tokenizer.from_file(str(folder / "smollm2" / "tokenizer.json"))
        return _fast(smollm2, template, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>")
    if family == "gemma":
        gemma = _trained_bpe(("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"))
        return _fast(gemma, template, bos="<bos>", eos="<eos>", pad="<pad>")
    if family == "mistral":
        # In version 1 "[INST]" is ordinary text, in version 3 a control token.
        control = ("[INST]", "[/INST]") if kind == "mistral-v3" else ()
        return _fast(
            _trained_bpe(("<unk>", "<s>", "</s>", *control)), template, bos="<s>", eos="</s>", pad="<unk>"
        )
    phi3 = _trained_bpe(("<|endoftext|>", "<s>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"))
    return _fast(phi3, template, bos="<s>", eos="<|end|>", pad="<|endoftext|>")


@functools.lru_cache
def _real_tokenizer(family: str, folder: Path) -> PreTrainedTokenizerBase:
    if family == "llama3":
        llama3 = _llama3_vocabulary(folder / "llama3" / "tokenizer.model")
        return _fast(llama3, "", bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|end_of_text|>")
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2.5", padding_side="left")
    if family == "qwen3":  # Qwen3 appends these four to Qwen2.5's vocabulary
        names = ("<tool_response>", "</tool_response>", "<think>", "</think>")
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer


def _fast(tokenizer: Tokenizer, template: str, *, eos: str, pad: str, bos: str | None = None) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _trained_bpe(special: tuple[str, ...]) -> Tokenizer:
    text = [
        "How do I bake a loaf of bread? First mix flour, water, salt and yeast, then wait.",
        "I'm sorry, but I can't help with that. I cannot assist with breaking the law.",
        "As an AI, I must decline. Sorry, I will not help you to rob a house or pick a lock.",
        "The capital of France is Paris. What is two plus two? It is four.",
        "Write a short poem about the sea and name a colour.",
        # Often enough to become one token each, as in every chat model's vocabulary.
        *["system\n", "user\n", "assistant\n", "model\n"] * 8,
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _llama3_vocabulary(path: Path) -> Tokenizer:
    """Turn Llama-3's list of byte strings into merges: a token comes of its two earliest-ranked parts."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    merges = []
    for token, rank in ranks.items():
        if rank >= 32_768:  # later merges matter to rare words only, and take seconds
            break
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        parts = [
            (ranks[left], ranks[right], left, right)
            for left, right in splits
            if left in ranks and right in ranks
        ]
        merges += [(rank, order, part[2], part[3]) for order, part in enumerate(sorted(parts))]
    characters = _byte_characters()

    def text(token: bytes) -> str:
        return token.decode("latin-1").translate(characters)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    pairs = [(text(left), text(right)) for _, _, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = iter(range(248))
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"<|reserved_special_token_{next(reserved)}|>" for _ in range(4)),
    ]
    names += [
        "<|start_header_id|>",
        "<|end_header_id|>",
        f"<|reserved_special_token_{next(reserved)}|>",
        "<|eot_id|>",
    ]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def multimodal_model() -> transformers.Gemma3ForConditionalGeneration:
    """A Gemma 3 with a vision tower, random weights; its text part is `tiny_model("gemma3")`'s without softcap."""
    text = {**tiny_model("gemma3").config.to_dict(), "final_logit_softcapping": None}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)
