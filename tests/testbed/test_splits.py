"""Near-duplicates and splits without them."""

import itertools
from collections import Counter

from safesteer.testbed.splits import (
    NearDuplicates,
    content_words,
    similarity,
    split_without_near_duplicates,
)


def test_what_is_too_like_a_held_out_text_belongs_to_no_split() -> None:
    texts = [f"paint{n} {colour} fence{n}" for n in range(40) for colour in ("red", "blue")]
    assigned = split_without_near_duplicates(
        texts, ["x"] * len(texts), {"x": (10, 10)}, seed=0, occurrences=0
    )
    assert Counter(assigned) == {"train": 40, "validation": 10, "test": 10, None: 20}
    for (a, split_a), (b, split_b) in itertools.combinations(zip(texts, assigned, strict=True), 2):
        if similarity(content_words(a), content_words(b)) >= 0.5 and split_a != split_b:
            assert None in (split_a, split_b)


def test_only_eligible_texts_are_held_out() -> None:
    texts = [f"paint{n} fence{n}" for n in range(40)]
    eligible = [n % 4 == 0 for n in range(40)]
    assigned = split_without_near_duplicates(
        texts, ["x"] * 40, {"x": (5, 20)}, seed=0, eligible=eligible, occurrences=0
    )
    assert [split != "train" for split in assigned] == eligible


def test_near_duplicates_share_half_of_their_words() -> None:
    held_out = NearDuplicates(["steal a blue bicycle", "bake bread"])
    assert "steal a red bicycle" in held_out
    assert "steal a library book" not in held_out
    assert "steal a red bicycle" not in NearDuplicates(["steal a blue bicycle"], threshold=0.6)
    assert "bake bread" not in NearDuplicates([])
