"""What the chunked divergence may cost in memory and products, and the user's mistakes it names."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from divergence_cases import VOCABULARIES, H, N, V, make_case
from safesteer import divergence_chunks
from safesteer.divergence import Vocabulary, default_chunk_size, localized_divergence
from safesteer.errors import SafeSteerError
from safesteer.modeling import Head


class Watch(TorchDispatchMode):
    """Records the largest tensor, the most numbers alive at once, and the work done on the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.most_alive = 0
        self._alive: dict[int, int] = {}
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        for storage in (t.untyped_storage() for t in made):
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes() // 4
                weakref.finalize(storage, self._alive.pop, storage._cdata)
        self.most_alive = max(self.most_alive, sum(self._alive.values()))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
        return result


def watched(vocabulary: Vocabulary, statistics: bool, trained_head: bool = False) -> Watch:
    tokens, size, width = 320, 997, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    student = Head(torch.randn(size, width, requires_grad=trained_head))
    teacher = Head(torch.randn(size, width))
    with Watch() as watch:
        localized_divergence(
            hidden,
            torch.randn(tokens, width),
            student,
            teacher,
            torch.ones(tokens),
            token_ids=torch.arange(10),
            top_k=10,
            vocabulary=vocabulary,
            chunk_size=32,
            statistics=statistics,
        ).loss.backward()
    return watch


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(vocabulary: Vocabulary, trained_head: bool) -> None:
    assert watched(vocabulary, statistics=True, trained_head=trained_head).largest <= 32 * 997


@pytest.mark.parametrize(("vocabulary", "most"), [("safety_tokens", 1), ("teacher_top_k", 2), ("full", 8)])
def test_few_chunks_of_logits_live_at_once(
    vocabulary: Vocabulary, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside them stand what goes in and comes out, [N, H] and [V, H], and some [n, K]: below one more."""
    monkeypatch.setattr(divergence_chunks, "TILE", 64)
    assert watched(vocabulary, statistics=True).most_alive < (most + 1) * 32 * 997


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_chunk_costs_one_product_with_each_head_and_one_for_the_gradient(vocabulary: Vocabulary) -> None:
    assert watched(vocabulary, statistics=True).products == 10 * 3
    assert watched(vocabulary, statistics=True, trained_head=True).products == 10 * 4


def test_the_default_chunk_is_a_quarter_in_whole_tiles() -> None:
    assert default_chunk_size(512, 151_936) == 128
    assert default_chunk_size(1_030, 151_936) == 256
    assert default_chunk_size(100_000, 151_936) == 384  # 2**26 logits are 441 rows
    assert default_chunk_size(10, 151_936) == 64
    assert default_chunk_size(100_000, 2**25) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"token_ids": None}, "token_ids is missing"),
        ({"token_ids": torch.tensor([], dtype=torch.int64)}, "token_ids is empty"),
        ({"token_ids": torch.tensor([1, V])}, f"from 1 to {V}, outside the vocabulary of {V}"),
        ({"token_ids": torch.tensor([2, 1, 2])}, "names a token twice"),
        ({"token_ids": torch.tensor([0.5])}, "flat list of integers"),
        ({"vocabulary": "subset"}, "vocabulary is 'subset'"),
        ({"support": "truncate"}, "support is 'truncate'"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"vocabulary": "teacher_top_k", "top_k": V + 1}, f"outside \\[1, {V}\\]"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_a_wrong_option_is_told_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SafeSteerError, match=sentence):
        make_case(decorated=False).score(**options)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student_hidden": torch.zeros(N, H + 1)}, "student_hidden has shape"),
        ({"teacher_hidden": torch.zeros(1, N, H + 2)}, "teacher_hidden has shape"),
        ({"teacher_hidden": torch.zeros(N - 1, H + 2)}, "one row and one weight per position"),
        ({"weights": torch.ones(N + 1)}, "one row and one weight per position"),
        ({"teacher": Head(torch.zeros(V + 1, H + 2))}, "models with one vocabulary"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_shapes_that_disagree_are_told_in_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SafeSteerError, match=sentence):
        replace(make_case(decorated=False), **change).score()
