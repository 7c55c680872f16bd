"""The head's product in the other order: equal to `linear`, and gone after the block."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from safesteer.few_rows import few_rows_linear, quick_head
from tiny_models import tiny_model


@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (6, 1, 8), (2, 4, 8), (65, 8), (0, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_linear(shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype) -> None:
    rows, weight = torch.randn(shape, dtype=dtype), torch.randn(10_000, 8, dtype=dtype)
    bias = torch.randn(10_000, dtype=dtype) if with_bias else None
    found = few_rows_linear(rows, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, nn.functional.linear(rows, weight, bias))


def test_generation_takes_it_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model: PreTrainedModel = tiny_model("qwen3")
    ids = torch.randint(3, 100, (5, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    seen: list[tuple[int, ...]] = []

    def counted(rows: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        seen.append(tuple(rows.shape[:-1]))
        return few_rows_linear(rows, *weights)  # type: ignore[arg-type]

    monkeypatch.setattr("safesteer.few_rows.few_rows_linear", counted)
    with quick_head(model):
        assert torch.equal(model.generate(ids, **options), plain)
    assert seen == [(5, 1)] * 4
    assert "forward" not in vars(model.get_output_embeddings())
    model.generate(ids, **options)
    assert len(seen) == 4


def test_other_heads_are_left_alone() -> None:
    model = tiny_model("qwen3")

    class Own(nn.Linear):
        pass

    own = Own(32, 160)
    model.set_output_embeddings(own)
    with quick_head(model):
        assert "forward" not in vars(own)
    with quick_head(nn.Linear(2, 2)):
        pass
