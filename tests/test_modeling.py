"""Parts of real architectures, and loading them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from safesteer.errors import SafeSteerError
from safesteer.modeling import (
    Head,
    attention_and_mlp,
    backbone,
    decoder_layers,
    hidden_size,
    language_head,
    model_fingerprint,
    unwrapped,
)
from tiny_models import KINDS, adapted, multimodal_model, tiny_model

_COMMON = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def _other(name: str, **config: Any) -> PreTrainedModel:
    model_class = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    model = model_class(getattr(transformers, f"{name}Config")(**config))
    model.eval()
    return model


_GQA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0}
_MPT = {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
# Architectures outside the tiny models' list: other names for the parts, other treatment of the logits.
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: _other("GPT2", vocab_size=160, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "opt": lambda: _other("OPT", **_COMMON, **_OPT),
    "falcon": lambda: _other("Falcon", **_COMMON),
    "bloom": lambda: _other("Bloom", vocab_size=160, hidden_size=32, n_layer=3, n_head=4),
    "mpt": lambda: _other("Mpt", vocab_size=160, **_MPT),
    "phi": lambda: _other("Phi", **_COMMON, intermediate_size=48),
    "cohere": lambda: _other("Cohere", **_GQA, logit_scale=0.0625),
    "granite": lambda: _other("Granite", **_GQA, logits_scaling=8.0),
    "gemma2": lambda: _other("Gemma2", **_GQA, head_dim=8, final_logit_softcapping=2.0),
    "olmo2": lambda: _other("Olmo2", **_COMMON, intermediate_size=48),
    "mixtral": lambda: _other("Mixtral", **_GQA, num_local_experts=3),
    "granitemoe": lambda: _other("GraniteMoe", **_GQA, num_local_experts=3),
    "stablelm": lambda: _other("StableLm", **_COMMON, intermediate_size=48, num_key_value_heads=4),
    "starcoder2": lambda: _other("Starcoder2", **_GQA),
}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    **{kind: (lambda kind=kind: tiny_model(kind)) for kind in KINDS},
    **OTHERS,
}


def _ids() -> Tensor:
    return torch.randint(3, 160, (2, 6))


@pytest.mark.parametrize("name", BUILDERS)
def test_head_of_backbone_is_the_model(name: str) -> None:
    model, ids = BUILDERS[name](), _ids()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = language_head(model).logits(hidden)
    assert hidden.shape == (2, 6, hidden_size(model))
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_are_those_that_run_in_turn(name: str) -> None:
    model = BUILDERS[name]()
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    order: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: order.append(index))
    with torch.no_grad():
        states = model(input_ids=_ids(), output_hidden_states=True, use_cache=False).hidden_states
    assert order == list(range(len(layers)))
    assert len(states) == len(layers) + 1


@pytest.mark.parametrize("name", BUILDERS)
def test_attention_mixes_positions_and_the_mlp_does_not(name: str) -> None:
    model = BUILDERS[name]()
    attention, mlp = attention_and_mlp(decoder_layers(model)[1])
    assert attention is not None
    assert "attention" in type(attention).__name__.casefold()
    if name == "opt":  # its MLP is two linear maps in the layer itself
        assert mlp is None
        return
    assert mlp is not None
    assert any(part in type(mlp).__name__.casefold() for part in ("mlp", "moe"))


def test_logit_scales_are_not_all_one() -> None:
    assert language_head(OTHERS["cohere"]()).logit_scale == 0.0625
    assert language_head(OTHERS["granite"]()).logit_scale == 0.125
    assert language_head(OTHERS["gemma2"]()).softcap == 2.0
    assert language_head(tiny_model("gemma3")).softcap == 5.0
    assert language_head(tiny_model("llama")).logit_scale == 1.0


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"logit_scale": None}, 1.0),
        ({"logit_scale": 0.0}, 0.0),
        ({"output_multiplier": 0.5}, 0.5),
        ({"lm_head_multiplier": 0.25}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "minicpm3"}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
    ],
)
def test_logit_scale_goes_by_many_names(config: dict[str, Any], scale: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 9)
            text = SimpleNamespace(**{"model_type": "x", **config})
            self.config = SimpleNamespace(get_text_config=lambda: text)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model, hidden = Model(), torch.randn(3, 4)
    head = language_head(model)
    assert head.logit_scale == scale
    torch.testing.assert_close(head.logits(hidden), model.head(hidden) * scale)


def test_head_scales_before_it_caps() -> None:
    weight, bias, hidden = torch.randn(5, 4), torch.randn(5), torch.randn(2, 3, 4)
    logits = Head(weight, bias, logit_scale=3.0, softcap=2.0).logits(hidden)
    expected = 2.0 * torch.tanh(3.0 * (hidden.double() @ weight.double().T + bias.double()) / 2.0)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_text_part_of_a_multimodal_model() -> None:
    model = multimodal_model()
    model.eval()
    ids = _ids()
    assert decoder_layers(model) is model.model.language_model.layers
    assert (len(decoder_layers(model)), hidden_size(model)) == (4, 32)
    with torch.no_grad():
        logits = language_head(model).logits(backbone(model)(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(logits, model(input_ids=ids).logits)


def test_a_layer_path_overrides() -> None:
    model = tiny_model("qwen2")
    assert decoder_layers(model, "model.layers") is model.model.layers
    assert decoder_layers(get_peft_model(tiny_model("qwen2"), LoraConfig()), "model.layers")[0] is not None
    for path in ("model.blocks", "model.norm", "lm_head.weight.x"):
        with pytest.raises(SafeSteerError, match=f"'{path}'.*try one of: model.layers"):
            decoder_layers(model, path)


def test_layers_are_told_from_experts() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    class Model(nn.Module):
        def __init__(self, lists: int) -> None:
            super().__init__()
            self.config = SimpleNamespace(num_hidden_layers=3)
            for index in range(lists):
                self.add_module(f"blocks{index}", nn.ModuleList(Layer() for _ in range(3)))

    model = Model(1)
    assert decoder_layers(model) is model.blocks0
    with pytest.raises(SafeSteerError, match="Model: found 0 lists of 3.*--layer-path, one of: none found"):
        decoder_layers(Model(0))
    with pytest.raises(SafeSteerError, match="found 2 lists of 3.*blocks0, blocks0.0.experts"):
        decoder_layers(Model(2))


def test_what_is_not_a_language_model_is_a_sentence() -> None:
    module = nn.Linear(2, 2)
    for function in (decoder_layers, hidden_size):
        with pytest.raises(SafeSteerError, match="the config of Linear has no"):
            function(module)
    with pytest.raises(SafeSteerError, match="Linear has no language-model head"):
        language_head(module)
    with pytest.raises(SafeSteerError, match="Linear does not tell its backbone"):
        backbone(module)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt_neox"])
def test_parts_under_an_adapter(kind: str) -> None:
    ids, plain = _ids(), tiny_model(kind)
    with torch.no_grad():
        without = backbone(plain)(input_ids=ids).last_hidden_state
    lora = adapted(tiny_model(kind))
    with torch.no_grad():
        expected = lora(input_ids=ids).logits
        hidden = backbone(lora)(input_ids=ids).last_hidden_state
        torch.testing.assert_close(language_head(lora).logits(hidden), expected)
        assert (hidden - without).abs().max() > 1e-3
        with lora.disable_adapter():
            torch.testing.assert_close(backbone(lora)(input_ids=ids).last_hidden_state, without)
    assert len(decoder_layers(lora)) == 4
    assert hidden_size(lora) == 32
    assert all(part is not None for part in attention_and_mlp(decoder_layers(lora)[0]))


def test_a_trained_copy_of_the_head_counts_while_the_adapter_is_on() -> None:
    model = tiny_model("qwen2", tie_word_embeddings=False)
    original = model.lm_head.weight.detach().clone()
    lora = adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        language_head(lora).weight.add_(1.0)
    assert torch.equal(language_head(lora).weight, original + 1.0)
    with lora.disable_adapter():
        assert torch.equal(language_head(lora).weight, original)


def test_an_adapter_on_the_head_is_refused_while_it_is_on() -> None:
    model = tiny_model("qwen2", tie_word_embeddings=False)
    original = model.lm_head.weight.detach().clone()
    lora = adapted(model, target_modules=["lm_head"])
    with pytest.raises(SafeSteerError, match="an adapter sits on the language-model head"):
        language_head(lora)
    with lora.disable_adapter():
        assert torch.equal(language_head(lora).weight, original)


def test_parts_under_wrappers() -> None:
    class Compiled(nn.Module):  # torch.compile's, without waiting for its compiler
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    model = tiny_model("qwen2")
    for wrapped in (Compiled(model), Compiled(adapted(model))):
        assert unwrapped(wrapped) is model
        assert decoder_layers(wrapped) is model.model.layers
        assert language_head(wrapped).weight is model.lm_head.weight
        assert model_fingerprint(wrapped) == model_fingerprint(model)


def test_fingerprint_identifies_the_base_model() -> None:
    plain = model_fingerprint(tiny_model("qwen3"))
    assert model_fingerprint(tiny_model("qwen3")) == plain
    others = {
        model_fingerprint(tiny_model("qwen3", seed=1)),
        model_fingerprint(tiny_model("qwen3").bfloat16()),
        model_fingerprint(tiny_model("qwen3", rope_theta=5e5)),
        model_fingerprint(tiny_model("qwen2")),
    }
    assert len(others | {plain}) == 5


def test_fingerprint_sees_every_weight_move() -> None:
    model = tiny_model("llama")
    prints = {model_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(1.001).add_(1e-6)
        prints.add(model_fingerprint(model))
    assert len(prints) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"trainable_token_indices": [3, 4], "target_modules": ["q_proj"]},
    ],
)
def test_fingerprint_is_blind_to_adapters(options: dict[str, Any]) -> None:
    plain = model_fingerprint(tiny_model("qwen3", tie_word_embeddings=False))
    lora = adapted(tiny_model("qwen3", tie_word_embeddings=False), **options)
    assert model_fingerprint(lora) == plain
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if parameter.requires_grad:
                assert "lora" in name or "modules_to_save" in name or "trainable_tokens" in name
                parameter.add_(1.0)
    assert model_fingerprint(lora) == plain
