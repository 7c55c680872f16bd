"""Ablation against edited weights and against the projection by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from residual_streams import HIDDEN, final_hidden, random_ids
from safesteer.modeling import attention_and_mlp, decoder_layers
from safesteer.steering import ablate_direction
from tiny_models import KINDS, tiny_model


@torch.no_grad()
def _orthogonalized(model: PreTrainedModel, kind: str, direction: Tensor) -> PreTrainedModel:
    """Take r̂ out of every weight that writes to the residual stream (Arditi et al. 2024, equation 5)."""
    unit = direction / direction.norm()
    projection = torch.eye(HIDDEN) - torch.outer(unit, unit)
    embedding = model.get_input_embeddings().weight
    embedding.copy_(embedding @ projection)
    for layer in decoder_layers(model):
        if kind == "gpt_neox":
            writers = [layer.attention.dense, layer.mlp.dense_4h_to_h]
        else:
            writers = [layer.self_attn.o_proj]
            if kind == "qwen3_moe":
                layer.mlp.experts.down_proj.copy_(projection @ layer.mlp.experts.down_proj)
            else:
                writers.append(layer.mlp.down_proj)
        for writer in writers:
            writer.weight.copy_(projection @ writer.weight)
            if writer.bias is not None:
                writer.bias.copy_(projection @ writer.bias)
    return model


# Gemma normalises what attention and MLP wrote before it is added, so there no edit of weights is the same.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma3"])
def test_ablating_a_direction_is_orthogonalizing_the_weights(kind: str) -> None:
    ids, direction = random_ids(), torch.randn(HIDDEN)
    model = tiny_model(kind, tie_word_embeddings=False)
    plain = final_hidden(model, ids)
    with ablate_direction(decoder_layers(model), 3.0 * direction):
        ablated = final_hidden(model, ids)
    expected = final_hidden(_orthogonalized(model, kind, direction), ids)
    torch.testing.assert_close(ablated, expected, atol=2e-5, rtol=1e-4)
    assert (ablated - plain).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_by_hand_in_one_layer(kind: str) -> None:
    """What a layer reads and what its attention and MLP write are checked apart, in every architecture."""
    model, ids, direction = tiny_model(kind), random_ids(), torch.randn(HIDDEN)
    unit = direction / direction.norm()
    seen: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any = None) -> None:
        value = args[0] if output is None and args else output
        if value is not None:
            seen.append(value if isinstance(value, Tensor) else value[0])

    layers = decoder_layers(model)
    with ablate_direction(layers, direction):
        for layer in layers:
            layer.register_forward_pre_hook(record)
            for part in attention_and_mlp(layer):
                assert part is not None
                part.register_forward_hook(record)
        final_hidden(model, ids)
    assert len(seen) == 3 * len(layers)
    for value in seen:
        assert value.shape == (*ids.shape, HIDDEN)
        assert (value @ unit).abs().max() < 1e-5 * max(1.0, value.abs().max().item())
        assert value.abs().max() > 1e-3


def test_a_layer_without_an_mlp_module_has_its_output_ablated() -> None:
    config = OPTConfig(
        vocab_size=160, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN, init_std=0.15, dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    model.eval()
    ids, direction = random_ids(), torch.randn(HIDDEN)
    unit = direction / direction.norm()
    outputs: list[Tensor] = []
    layers = decoder_layers(model)
    assert attention_and_mlp(layers[0])[1] is None
    with ablate_direction(layers, direction):
        layers[-1].register_forward_hook(
            lambda _, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
        )
        final_hidden(model, ids)
    assert (outputs[0] @ unit).abs().max() < 1e-5
    assert outputs[0].abs().max() > 0.1


def test_ablation_in_bfloat16_rounds_once() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.mlp = nn.Identity(), nn.Identity()

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    layer, hidden = Layer(), torch.randn(2, 3, 64).bfloat16()
    unit = torch.randn(64)
    unit /= unit.norm()
    with ablate_direction([layer], unit):
        ablated = layer(hidden)
    assert ablated.dtype == torch.bfloat16
    exact = hidden.double() - (hidden.double() @ unit.double()).unsqueeze(-1) * unit.double()
    torch.testing.assert_close(ablated, exact.bfloat16(), atol=1e-6, rtol=2**-8)
