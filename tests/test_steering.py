"""Steering against forwards written out by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from residual_streams import HIDDEN, final_hidden, random_ids, steered_by_hand
from safesteer.errors import SafeSteerError
from safesteer.modeling import decoder_layers
from safesteer.steering import Steering, ablate_direction, add_vector, last_occurrence
from tiny_models import KINDS, tiny_model


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 2])
def test_adding_a_vector_is_adding_it_by_hand(kind: str, layer: int) -> None:
    model, ids, vector = tiny_model(kind), random_ids(), torch.randn(HIDDEN)
    expected = steered_by_hand(model, ids, layer, 1.5 * vector)
    plain = final_hidden(model, ids)
    with add_vector(decoder_layers(model)[layer], vector, 1.5):
        steered = final_hidden(model, ids)
    torch.testing.assert_close(steered, expected)
    assert (steered - plain).abs().max() > 0.1
    assert torch.equal(final_hidden(model, ids), plain)


def test_one_coefficient_per_row_is_one_run_per_row() -> None:
    model, ids, vector = tiny_model("qwen3"), random_ids(4), torch.randn(HIDDEN)
    layer = decoder_layers(model)[1]
    coefficients = [0.0, 1.0, -2.0, 0.5]
    with add_vector(layer, vector, torch.tensor(coefficients)):
        together = final_hidden(model, ids)
    for row, coefficient in enumerate(coefficients):
        expected = steered_by_hand(model, ids[row : row + 1], 1, coefficient * vector)
        torch.testing.assert_close(together[row : row + 1], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_vector_per_row_is_one_run_per_row(kind: str) -> None:
    model, ids, vectors = tiny_model(kind), random_ids(3), torch.randn(3, HIDDEN)
    layers = decoder_layers(model)
    with add_vector(layers[1], vectors, torch.tensor([1.0, -2.0, 0.5])):
        added = final_hidden(model, ids)
    with ablate_direction(layers, vectors):
        ablated = final_hidden(model, ids)
    for row, coefficient in enumerate([1.0, -2.0, 0.5]):
        alone = slice(row, row + 1)
        expected = steered_by_hand(model, ids[alone], 1, coefficient * vectors[row])
        torch.testing.assert_close(added[alone], expected, atol=1e-5, rtol=1e-4)
        with ablate_direction(layers, vectors[row]):
            expected = final_hidden(model, ids[alone])
        torch.testing.assert_close(ablated[alone], expected, atol=1e-5, rtol=1e-4)


def test_steering_chooses_layer_strength_and_rows() -> None:
    model, ids, vector = tiny_model("llama"), random_ids(3), torch.randn(HIDDEN)
    steering = Steering(vector, layer=2, coefficient=2.0)
    expected = steered_by_hand(model, ids, 2, 2.0 * vector)
    plain = final_hidden(model, ids)
    with steering.applied(model):
        torch.testing.assert_close(final_hidden(model, ids), expected)
    rows = torch.tensor([True, False, True])
    with steering.applied(model, "model.layers", rows):
        mixed = final_hidden(model, ids)
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
    plain = final_hidden(model, ids)
    expected = steered_by_hand(model, ids, 1, 2.0 * vector * where)
    rows = torch.tensor([True, False, True])
    steering = Steering(vector, 1, 2.0, MARKER)
    with steering.applied(model):
        torch.testing.assert_close(final_hidden(model, ids), expected)
    with steering.applied(model, None, rows):
        mixed = final_hidden(model, ids)
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
        logits = model.lm_head(steered_by_hand(model, expected, 1, 2.0 * vector * where)[:, -1])
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
    model, ids = tiny_model("qwen2"), random_ids(3)
    layer = decoder_layers(model)[0]
    with (
        pytest.raises(SafeSteerError, match="31 components but .* has 32"),
        add_vector(layer, torch.ones(31)),
    ):
        final_hidden(model, ids)
    for short in (
        add_vector(layer, torch.ones(HIDDEN), torch.ones(2)),
        add_vector(layer, torch.ones(2, HIDDEN)),
        ablate_direction([layer], torch.ones(2, HIDDEN)),
    ):
        with pytest.raises(SafeSteerError, match=r"2 rows but the hidden states have shape \[3, "), short:
            final_hidden(model, ids)
    with pytest.raises(SafeSteerError, match="has shape"), add_vector(layer, torch.ones(2, 2, HIDDEN)):
        raise AssertionError
    with pytest.raises(SafeSteerError, match="31 components"), ablate_direction([layer], torch.ones(31)):
        final_hidden(model, ids)
    for direction in (torch.zeros(HIDDEN), torch.full((HIDDEN,), torch.nan), torch.ones(2, 2, HIDDEN)):
        with pytest.raises(SafeSteerError, match="other than zero"), ablate_direction([layer], direction):
            raise AssertionError


def test_nested_vectors_add_up() -> None:
    model, ids, first, second = tiny_model("qwen2"), random_ids(), torch.randn(HIDDEN), torch.randn(HIDDEN)
    layer = decoder_layers(model)[1]
    expected = steered_by_hand(model, ids, 1, first + 2 * second)
    with add_vector(layer, first), add_vector(layer, second, 2.0):
        torch.testing.assert_close(final_hidden(model, ids), expected)


def test_steering_works_under_an_adapter_on_and_off() -> None:
    model, ids, vector = tiny_model("qwen3"), random_ids(), torch.randn(HIDDEN)
    expected = steered_by_hand(model, ids, 1, vector)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4)
    adapted = get_peft_model(model, config)
    adapted.eval()
    with Steering(vector, 1).applied(adapted):
        on = final_hidden(adapted, ids)
        with adapted.disable_adapter():
            off = final_hidden(adapted, ids)
    torch.testing.assert_close(off, expected)
    assert (on - off).abs().max() > 0.01


def test_every_generated_position_is_steered() -> None:
    model, vector = tiny_model("llama"), torch.randn(HIDDEN)
    ids = random_ids(1, 5)
    with Steering(vector, 1, 2.0).applied(model):
        generated = model.generate(
            input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    expected = ids
    for _ in range(6):
        logits = model.lm_head(steered_by_hand(model, expected, 1, 2.0 * vector)[:, -1])
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, expected)


def test_gradients_survive_gradient_checkpointing() -> None:
    ids, vector = random_ids(), torch.randn(HIDDEN)
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
