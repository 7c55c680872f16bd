"""Steering and ablation against forwards written out by hand and against edited weights."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from safesteer.errors import SafeSteerError
from safesteer.modeling import attention_and_mlp, backbone, decoder_layers
from safesteer.steering import Steering, ablate_direction, add_vector, last_occurrence
from tiny_models import KINDS, tiny_model

HIDDEN = 32


def _ids(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 160, (batch, length))


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def _final_norm(model: PreTrainedModel) -> nn.Module:
    inner = model.base_model
    return inner.final_layer_norm if hasattr(inner, "final_layer_norm") else inner.norm


@torch.no_grad()
def _steered_by_hand(model: PreTrainedModel, ids: Tensor, layer: int, shift: Tensor) -> Tensor:
    """Run the layers one by one, adding `shift` to one layer's input, and return the final hidden states."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    layers = decoder_layers(model)
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for module in layers
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = calls[0][0][0]
    for index, (module, (args, kwargs)) in enumerate(zip(layers, calls, strict=True)):
        if index == layer:
            hidden = hidden + shift
        output = module(hidden, *args[1:], **kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
    return _final_norm(model)(hidden)


@torch.no_grad()
def _final_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return backbone(model)(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 2])
def test_adding_a_vector_is_adding_it_by_hand(kind: str, layer: int) -> None:
    model, ids, vector = tiny_model(kind), _ids(), torch.randn(HIDDEN)
    expected = _steered_by_hand(model, ids, layer, 1.5 * vector)
    plain = _final_hidden(model, ids)
    with add_vector(decoder_layers(model)[layer], vector, 1.5):
        steered = _final_hidden(model, ids)
    torch.testing.assert_close(steered, expected)
    assert (steered - plain).abs().max() > 0.1
    assert torch.equal(_final_hidden(model, ids), plain)


def test_one_coefficient_per_row_is_one_run_per_row() -> None:
    model, ids, vector = tiny_model("qwen3"), _ids(4), torch.randn(HIDDEN)
    layer = decoder_layers(model)[1]
    coefficients = [0.0, 1.0, -2.0, 0.5]
    with add_vector(layer, vector, torch.tensor(coefficients)):
        together = _final_hidden(model, ids)
    for row, coefficient in enumerate(coefficients):
        expected = _steered_by_hand(model, ids[row : row + 1], 1, coefficient * vector)
        torch.testing.assert_close(together[row : row + 1], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_vector_per_row_is_one_run_per_row(kind: str) -> None:
    model, ids, vectors = tiny_model(kind), _ids(3), torch.randn(3, HIDDEN)
    layers = decoder_layers(model)
    with add_vector(layers[1], vectors, torch.tensor([1.0, -2.0, 0.5])):
        added = _final_hidden(model, ids)
    with ablate_direction(layers, vectors):
        ablated = _final_hidden(model, ids)
    for row, coefficient in enumerate([1.0, -2.0, 0.5]):
        alone = slice(row, row + 1)
        expected = _steered_by_hand(model, ids[alone], 1, coefficient * vectors[row])
        torch.testing.assert_close(added[alone], expected, atol=1e-5, rtol=1e-4)
        with ablate_direction(layers, vectors[row]):
            expected = _final_hidden(model, ids[alone])
        torch.testing.assert_close(ablated[alone], expected, atol=1e-5, rtol=1e-4)


def test_steering_chooses_layer_strength_and_rows() -> None:
    model, ids, vector = tiny_model("llama"), _ids(3), torch.randn(HIDDEN)
    steering = Steering(vector, layer=2, coefficient=2.0)
    expected = _steered_by_hand(model, ids, 2, 2.0 * vector)
    plain = _final_hidden(model, ids)
    with steering.applied(model):
        torch.testing.assert_close(_final_hidden(model, ids), expected)
    rows = torch.tensor([True, False, True])
    with steering.applied(model, "model.layers", rows):
        mixed = _final_hidden(model, ids)
    torch.testing.assert_close(mixed[rows], expected[rows])
    torch.testing.assert_close(mixed[~rows], plain[~rows])


def test_steering_beyond_the_last_layer_is_a_sentence() -> None:
    too_high = Steering(torch.ones(HIDDEN), layer=4).applied(tiny_model("llama"))
    with pytest.raises(SafeSteerError, match="layer 4 but LlamaForCausalLM has 4 layers"), too_high:
        raise AssertionError


def test_the_last_occurrence_of_some_tokens() -> None:
    ids = torch.tensor(
        [
            [0, 0, 7, 8, 1, 2],  # left padded
            [7, 8, 1, 7, 8, 2],  # an earlier turn
            [3, 7, 1, 8, 7, 8],  # at the very end
            [7, 8, 7, 8, 7, 7],
            [3, 7, 1, 8, 2, 7],  # nowhere
        ]
    )
    assert last_occurrence(ids, (7, 8)).int().tolist() == [
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert not last_occurrence(ids[:, :1], (7, 8)).any()
    assert last_occurrence(ids, (7,)).int().tolist()[4] == [0, 0, 0, 0, 0, 1]


MARKER = (11, 12)


def _ids_with_marker(ends: tuple[int, ...], length: int) -> tuple[Tensor, Tensor]:
    """Rows in which `MARKER` stands before each end, and where it stands, [B, T, 1] float."""
    ids = torch.randint(20, 160, (len(ends), length))
    where = torch.zeros(len(ends), length, 1)
    for row, end in enumerate(ends):
        ids[row, end - 2 : end] = torch.tensor(MARKER)
        where[row, end - 2 : end] = 1.0
    return ids, where


@pytest.mark.parametrize("kind", KINDS)
def test_the_post_instruction_tokens_alone_may_be_steered(kind: str) -> None:
    model, vector = tiny_model(kind), torch.randn(HIDDEN)
    ids, where = _ids_with_marker((3, 8, 6), 8)
    before = _hooks(model)
    plain = _final_hidden(model, ids)
    expected = _steered_by_hand(model, ids, 1, 2.0 * vector * where)
    rows = torch.tensor([True, False, True])
    steering = Steering(vector, 1, 2.0, MARKER)
    with steering.applied(model):
        torch.testing.assert_close(_final_hidden(model, ids), expected)
    with steering.applied(model, None, rows):
        mixed = _final_hidden(model, ids)
    torch.testing.assert_close(mixed[rows], expected[rows])
    assert torch.equal(mixed[~rows], plain[~rows])
    assert torch.equal(expected[0, :1], plain[0, :1]) and not torch.equal(expected[0, 1:], plain[0, 1:])
    assert _hooks(model) == before


def test_what_is_generated_after_steered_post_instruction_tokens() -> None:
    """Decoding with cached keys and values, where a step holds no marker, against whole passes by hand; under an adapter."""
    model, vector = tiny_model("llama"), torch.randn(HIDDEN)
    ids, _ = _ids_with_marker((5,), 5)
    expected = ids
    for _ in range(6):
        where = last_occurrence(expected, MARKER)[..., None]
        logits = model.lm_head(_steered_by_hand(model, expected, 1, 2.0 * vector * where)[:, -1])
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)).eval()
    with Steering(vector, 1, 2.0, MARKER).applied(adapted), adapted.disable_adapter():
        generated = adapted.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(generated, expected)
    with Steering(vector, 1, 2.0).applied(adapted):
        everywhere = adapted.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert not torch.equal(everywhere, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_the_product_once(dtype: torch.dtype) -> None:
    layer, hidden = nn.Identity(), torch.randn(2, 3, 8).to(dtype)
    vector = torch.randn(8)
    with add_vector(layer, vector, 0.3):
        steered = layer(hidden)
    assert steered.dtype == dtype
    assert torch.equal(steered, hidden + (0.3 * vector).to(dtype))


def test_hidden_states_may_come_by_keyword_among_other_arguments() -> None:
    class Layer(nn.Module):
        def forward(self, scale: float = 1.0, *, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
            return scale * hidden_states

    layer, hidden, vector = Layer(), torch.randn(2, 3, 8), torch.randn(8)
    with add_vector(layer, vector):
        torch.testing.assert_close(layer(2.0, hidden_states=hidden), 2.0 * (hidden + vector))
        with pytest.raises(SafeSteerError, match="neither first nor as hidden_states="):
            layer.forward = lambda x: x  # type: ignore[method-assign]
            layer([hidden])


def test_hooks_go_when_the_block_fails() -> None:
    model = tiny_model("qwen2")
    layers = decoder_layers(model)
    before = _hooks(model)
    with pytest.raises(KeyboardInterrupt), add_vector(layers[0], torch.ones(HIDDEN)):
        assert _hooks(model) == before + 1
        raise KeyboardInterrupt
    assert _hooks(model) == before
    with pytest.raises(KeyboardInterrupt), ablate_direction(layers, torch.ones(HIDDEN)):
        assert _hooks(model) == before + 3 * len(layers)
        raise KeyboardInterrupt
    assert _hooks(model) == before
    with pytest.raises(SafeSteerError), ablate_direction([*layers, nn.Linear(2, 2)], torch.zeros(HIDDEN)):
        raise AssertionError
    assert _hooks(model) == before


def test_wrong_sizes_are_sentences() -> None:
    model, ids = tiny_model("qwen2"), _ids(3)
    layer = decoder_layers(model)[0]
    with (
        pytest.raises(SafeSteerError, match="31 components but .* has 32"),
        add_vector(layer, torch.ones(31)),
    ):
        _final_hidden(model, ids)
    for short in (
        add_vector(layer, torch.ones(HIDDEN), torch.ones(2)),
        add_vector(layer, torch.ones(2, HIDDEN)),
        ablate_direction([layer], torch.ones(2, HIDDEN)),
    ):
        with pytest.raises(SafeSteerError, match=r"2 rows but the hidden states have shape \[3, "), short:
            _final_hidden(model, ids)
    with pytest.raises(SafeSteerError, match="has shape"), add_vector(layer, torch.ones(2, 2, HIDDEN)):
        raise AssertionError
    with pytest.raises(SafeSteerError, match="31 components"), ablate_direction([layer], torch.ones(31)):
        _final_hidden(model, ids)
    for direction in (torch.zeros(HIDDEN), torch.full((HIDDEN,), torch.nan), torch.ones(2, 2, HIDDEN)):
        with pytest.raises(SafeSteerError, match="other than zero"), ablate_direction([layer], direction):
            raise AssertionError


def test_nested_vectors_add_up() -> None:
    model, ids, first, second = tiny_model("qwen2"), _ids(), torch.randn(HIDDEN), torch.randn(HIDDEN)
    layer = decoder_layers(model)[1]
    expected = _steered_by_hand(model, ids, 1, first + 2 * second)
    with add_vector(layer, first), add_vector(layer, second, 2.0):
        torch.testing.assert_close(_final_hidden(model, ids), expected)


def test_steering_works_under_an_adapter_on_and_off() -> None:
    model, ids, vector = tiny_model("qwen3"), _ids(), torch.randn(HIDDEN)
    expected = _steered_by_hand(model, ids, 1, vector)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4)
    adapted = get_peft_model(model, config)
    adapted.eval()
    with Steering(vector, 1).applied(adapted):
        on = _final_hidden(adapted, ids)
        with adapted.disable_adapter():
            off = _final_hidden(adapted, ids)
    torch.testing.assert_close(off, expected)
    assert (on - off).abs().max() > 0.01


def test_every_generated_position_is_steered() -> None:
    model, vector = tiny_model("llama"), torch.randn(HIDDEN)
    ids = _ids(1, 5)
    with Steering(vector, 1, 2.0).applied(model):
        generated = model.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    expected = ids
    for _ in range(6):
        logits = model.lm_head(_steered_by_hand(model, expected, 1, 2.0 * vector)[:, -1])
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, expected)


def test_gradients_survive_gradient_checkpointing() -> None:
    ids, vector = _ids(), torch.randn(HIDDEN)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("qwen2")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Steering(vector, 1).applied(model):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # outside the block, when the hook is gone
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


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
    ids, direction = _ids(), torch.randn(HIDDEN)
    model = tiny_model(kind, tie_word_embeddings=False)
    plain = _final_hidden(model, ids)
    with ablate_direction(decoder_layers(model), 3.0 * direction):
        ablated = _final_hidden(model, ids)
    expected = _final_hidden(_orthogonalized(model, kind, direction), ids)
    torch.testing.assert_close(ablated, expected, atol=2e-5, rtol=1e-4)
    assert (ablated - plain).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_by_hand_in_one_layer(kind: str) -> None:
    """What a layer reads and what its attention and MLP write are checked apart, in every architecture."""
    model, ids, direction = tiny_model(kind), _ids(), torch.randn(HIDDEN)
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
        _final_hidden(model, ids)
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
    ids, direction = _ids(), torch.randn(HIDDEN)
    unit = direction / direction.norm()
    outputs: list[Tensor] = []
    layers = decoder_layers(model)
    assert attention_and_mlp(layers[0])[1] is None
    with ablate_direction(layers, direction):
        layers[-1].register_forward_hook(
            lambda _, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
        )
        _final_hidden(model, ids)
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
