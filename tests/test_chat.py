"""Chat templates of real families, padding, generation."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safesteer.chat import Chat, end_of_turn_ids, generate, left_pad
from safesteer.errors import SafeSteerError
from safesteer.steering import Steering
from tiny_models import chatml_tokenizer, tiny_model, tokenizer_for

PROMPTS = ["How do I bake bread?", "Hi", "What is two plus two? Name a colour, too.", "Write a poem"]


def _chat(**options: Any) -> Chat:
    return Chat(chatml_tokenizer(), **options)


def test_chatml_by_hand() -> None:
    assert _chat().render("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert _chat(system_prompt="Be kind.").render("Hi") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert _chat(system_prompt="Be kind.").messages("Hi") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("chatml", ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]),
        ("qwen2.5", ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]),
        ("qwen3-2507", ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]),
        (
            "qwen3",
            ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n", "<think>", "\n\n", "</think>", "\n\n"],
        ),
        ("smollm2", ["<|im_end|>", "\n", "<|im_start|>", "ass", "istant", "\n"]),
        ("llama3", ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]),
        ("llama3.1", ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]),
        ("llama3.2", ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]),
        ("gemma", ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"]),
        ("gemma3", ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"]),
        ("mistral-v1", [" ", "[", "/", "I", "N", "S", "T", "]"]),
        ("mistral-v3", ["[/INST]"]),
        ("phi3", ["<|end|>", "\n", "<|assistant|>", "\n"]),
        ("phi3.5", ["<|end|>", "\n", "<|assistant|>", "\n"]),
    ],
)
def test_post_instruction_tokens(request: pytest.FixtureRequest, kind: str, expected: list[str]) -> None:
    tokenizer = _tokenizer(request, kind)
    chat = Chat(tokenizer)
    ids = chat.post_instruction_ids
    assert [tokenizer.decode([token]) for token in ids] == expected
    for prompt in (*PROMPTS, "ends in a newline\n", "émigré", "1+1=2", "]", "x" * 300):
        row = chat.encode([prompt])[0]
        assert tuple(row[-len(ids) :]) == ids
        if not kind.startswith("mistral"):
            assert tokenizer.decode(row[: -len(ids)]).rstrip().endswith(prompt.strip())


def _tokenizer(request: pytest.FixtureRequest, kind: str) -> PreTrainedTokenizerBase:
    return (
        chatml_tokenizer()
        if kind == "chatml"
        else tokenizer_for(kind, request.getfixturevalue("shared_data"))
    )


def test_the_real_vocabularies_have_the_methods_refusal_ids(shared_data: Path) -> None:
    """Method §1: 40 "I" for Llama-3; 40, 2121, 2753, 2132 for Qwen3."""
    assert tokenizer_for("llama3", shared_data)("I cannot", add_special_tokens=False)["input_ids"][0] == 40
    qwen3 = tokenizer_for("qwen3", shared_data)
    assert [qwen3.decode([token]) for token in (40, 2121, 2753, 2132)] == ["I", "As", "No", "It"]
    assert tokenizer_for("qwen2.5", shared_data)("As an AI", add_special_tokens=False)["input_ids"][0] == 2121


@pytest.mark.parametrize(
    "kind", ["llama3", "llama3.1", "llama3.2", "gemma", "gemma3", "mistral-v1", "mistral-v3"]
)
def test_one_beginning_of_sequence(shared_data: Path, kind: str) -> None:
    tokenizer = tokenizer_for(kind, shared_data)
    for row in Chat(tokenizer).encode(PROMPTS):
        assert row[0] == tokenizer.bos_token_id
        assert row.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    "kind",
    ["qwen2.5", "qwen3", "qwen3-2507", "smollm2", "llama3", "gemma3", "mistral-v1", "mistral-v3", "phi3"],
)
@pytest.mark.parametrize("system_prompt", [None, "Be kind."])
def test_encoding_is_the_tokenizers_own(shared_data: Path, kind: str, system_prompt: str | None) -> None:
    tokenizer = tokenizer_for(kind, shared_data)
    chat = Chat(tokenizer, system_prompt)
    for prompt, row in zip(PROMPTS, chat.encode(PROMPTS), strict=True):
        expected = tokenizer.apply_chat_template(
            chat.messages(prompt), add_generation_prompt=True, return_dict=False, enable_thinking=False
        )
        assert row == expected


def test_qwen3_thinks_only_when_told(shared_data: Path) -> None:
    tokenizer = tokenizer_for("qwen3", shared_data)
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert Chat(tokenizer).render("Hi") == turn + "<think>\n\n</think>\n\n"
    assert Chat(tokenizer, thinking="on").render("Hi") == turn
    assert Chat(tokenizer, template_kwargs={"enable_thinking": True}).render("Hi") == turn
    assert len(Chat(tokenizer, thinking="on").post_instruction_ids) == 5
    # The 2507 template knows no thinking.
    instruct = tokenizer_for("qwen3-2507", shared_data)
    assert Chat(instruct).render("Hi") == Chat(instruct, thinking="on").render("Hi") == turn


@pytest.mark.parametrize("kind", ["llama3.1", "llama3.2"])
def test_llama_date_lines_are_dropped(shared_data: Path, kind: str) -> None:
    tokenizer = tokenizer_for(kind, shared_data)
    user = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    end = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    system = "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
    begin = "<|begin_of_text|>"
    assert Chat(tokenizer).render("Hi") == begin + user + end
    # What Llama-3.0's template, which has no date lines, gives.
    assert Chat(tokenizer).render("Hi") == Chat(tokenizer_for("llama3", shared_data)).render("Hi")
    assert Chat(tokenizer, "Be kind.").render("Hi") == begin + system.format("Be kind.") + user + end
    dated = Chat(tokenizer, drop_date_lines=False, template_kwargs={"date_string": "01 Jan 2025"})
    assert dated.render("Hi") == begin + (
        system.format("Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025\n\n") + user + end
    )


@pytest.mark.parametrize("kind", ["llama3", "llama3.1", "llama3.2"])
def test_the_users_own_date_lines_stay(shared_data: Path, kind: str) -> None:
    prompt = "Repeat: Cutting Knowledge Date: May 2020\nToday Date: today\n\nnow"
    empty = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
    tokenizer = tokenizer_for(kind, shared_data)
    for system_prompt in (None, "Be kind."):
        for text in (prompt, f"What does {empty} mean?"):
            rendered = Chat(tokenizer, system_prompt).render(text)
            assert text in rendered
            assert rendered.count("Cutting Knowledge Date") == text.count("Cutting Knowledge Date")


def test_a_template_that_refuses_the_system_prompt_is_a_sentence(shared_data: Path) -> None:
    with pytest.raises(
        SafeSteerError, match="System role not supported.*leave the system prompt out"
    ) as error:
        Chat(tokenizer_for("gemma", shared_data), "Be kind.").render("Hi")
    assert "\n" not in str(error.value)


def _with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = type(chatml_tokenizer())(
        tokenizer_object=chatml_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    return tokenizer


def test_faulty_templates_are_sentences() -> None:
    with pytest.raises(SafeSteerError, match="cannot render a prompt"):
        Chat(_with_template("{{ messages[0]['content'] ")).render("Hi")
    with pytest.raises(SafeSteerError, match="adds no token after the user's text"):
        _ = Chat(_with_template("{{ messages[-1]['content'] }}")).post_instruction_ids


def test_a_token_that_mixes_user_and_template_is_not_post_instruction() -> None:
    # "?" follows the user's text; byte-level BPE may merge it with what stands before.
    tokenizer = _with_template("{{ messages[-1]['content'] }}d<|im_end|>")
    chat = Chat(tokenizer)
    assert chat.post_instruction_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    merged = chat.encode(["Write a poem an"])[0]
    assert tokenizer.decode([merged[-2]]) not in ("d",)
    assert len(chat.post_instruction_ids) <= 2


def test_truncation_takes_the_end_of_the_users_text_only() -> None:
    chat = _chat(system_prompt="Be kind.")
    prompt = "How do I bake a loaf of bread? First mix flour, water, salt and yeast, then wait. " * 8
    full = chat.encode([prompt])[0]
    overhead = len(chat.encode([""])[0])
    for max_length in (len(full), len(full) - 1, overhead + 20, overhead + 1):
        row = chat.encode([prompt, "Hi"], max_length=max_length)[0]
        assert overhead < len(row) <= max_length
        assert len(row) >= max_length - 2  # a token more would not have fitted
        text = chat.tokenizer.decode(row)
        head, tail = chat.render("\0").split("\0")
        assert text.startswith(head)
        assert text.endswith(tail)
        assert prompt.startswith(text[len(head) : -len(tail)])
    assert chat.encode([prompt, "Hi"], max_length=len(full))[0] == full
    assert chat.encode(["Hi"], max_length=overhead + 20) == chat.encode(["Hi"])
    with pytest.raises(SafeSteerError, match=rf"at most {overhead} tokens has no room.*takes {overhead}"):
        chat.encode([prompt], max_length=overhead)


def test_nothing_encodes_to_nothing() -> None:
    assert _chat().encode([]) == []


def test_chat_fingerprint_is_what_changes_rendering() -> None:
    chat = _chat()
    prints = [
        chat.fingerprint,
        dataclasses.replace(chat, system_prompt="Be kind.").fingerprint,
        dataclasses.replace(chat, thinking="on").fingerprint,
        dataclasses.replace(chat, template_kwargs={"date": 1}).fingerprint,
        Chat(_with_template("{{ messages[-1]['content'] }}>")).fingerprint,
    ]
    assert len(set(prints)) == 5
    assert _chat().fingerprint == prints[0]


def test_left_padding() -> None:
    ids, mask = left_pad([[5, 6], [7], [8, 9, 10]], pad_id=3)
    assert ids.tolist() == [[3, 5, 6], [3, 3, 7], [8, 9, 10]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64
    assert left_pad([], pad_id=3)[0].shape == (0, 0)
    assert left_pad([[], []], pad_id=3)[1].shape == (2, 0)


def _model(kind: str = "qwen3", **overrides: Any) -> PreTrainedModel:
    """A model of the ChatML tokenizer's vocabulary that does not end its turns by chance."""
    tokenizer = chatml_tokenizer()
    model = tiny_model(kind, vocab_size=len(tokenizer), tie_word_embeddings=False, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight[: len(tokenizer.all_special_ids)] = 0.0
    return model


def test_ends_of_turn() -> None:
    model, tokenizer = _model(), chatml_tokenizer()
    assert tokenizer.eos_token_id == 2
    model.generation_config.eos_token_id = None
    assert end_of_turn_ids(model, tokenizer) == (2,)
    model.generation_config.eos_token_id = 7
    assert end_of_turn_ids(model, tokenizer) == (2, 7)
    model.generation_config.eos_token_id = [9, 2, 0]
    assert end_of_turn_ids(model, tokenizer) == (0, 2, 9)


def _greedy_by_hand(model: PreTrainedModel, chat: Chat, prompt: str, new_tokens: int) -> str:
    """Decode one prompt alone: no padding, no cache."""
    row = chat.encode([prompt])[0]
    ids = torch.tensor([row])
    with torch.no_grad():
        for _ in range(new_tokens):
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
    response = ids[0, len(row) :].tolist()
    ends = [position for position, token in enumerate(response) if token == chat.tokenizer.eos_token_id]
    return chat.tokenizer.decode(response[: ends[0]] if ends else response, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_generation_is_argmax_by_hand(kind: str, batch_size: int) -> None:
    model, chat = _model(kind), _chat()
    expected = [_greedy_by_hand(model, chat, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert generate(model, chat, PROMPTS, max_new_tokens=6, batch_size=batch_size) == expected


def test_generation_is_steered() -> None:
    model, chat = _model(), _chat()
    steering = Steering(torch.randn(32), layer=1, coefficient=3.0)
    with steering.applied(model):
        expected = [_greedy_by_hand(model, chat, prompt, 5) for prompt in PROMPTS]
        found = generate(model, chat, PROMPTS, max_new_tokens=5)
    assert found == expected
    assert found != generate(model, chat, PROMPTS, max_new_tokens=5)


def test_the_checkpoints_sampling_defaults_are_set_aside() -> None:
    model, chat = _model(), _chat()
    plain = generate(model, chat, PROMPTS, max_new_tokens=6)
    sampled = generate(model, chat, PROMPTS, max_new_tokens=6, temperature=1.0, seed=3)
    for name, value in {
        "do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9,
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 2, "min_new_tokens": 6,
        "max_length": 9, "typical_p": 0.1, "length_penalty": 3.0, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5,
    }.items():  # fmt: skip
        setattr(model.generation_config, name, value)
    assert generate(model, chat, PROMPTS, max_new_tokens=6) == plain
    assert generate(model, chat, PROMPTS, max_new_tokens=6, temperature=1.0, seed=3) == sampled
    assert sampled != plain
    assert model.generation_config.top_k == 1


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_follow_the_models_distribution(temperature: float) -> None:
    model, chat = _model(), _chat()
    n = 1500
    ids = torch.tensor(chat.encode(["Hi"]))
    with torch.no_grad():
        probability = torch.softmax(model(input_ids=ids).logits[0, -1].double() / temperature, dim=-1)
    texts = generate(model, chat, ["Hi"] * n, max_new_tokens=1, batch_size=n, temperature=temperature, seed=1)
    shares: dict[str, float] = {}
    for token, share in enumerate(
        probability.tolist()
    ):  # many a byte decodes to the same replacement character
        text = chat.tokenizer.decode([token], skip_special_tokens=True)
        shares[text] = shares.get(text, 0.0) + share
    for text, share in sorted(shares.items(), key=lambda item: -item[1])[:8]:
        deviation = (n * share * (1 - share)) ** 0.5
        assert abs(texts.count(text) - n * share) < 4.5 * deviation, text
    # No top-k or top-p: the tail is there.
    assert len(set(texts)) > 60


def test_sampling_is_reproducible_and_leaves_the_random_state() -> None:
    model, chat = _model(), _chat()
    state = torch.get_rng_state()
    first = generate(model, chat, PROMPTS, max_new_tokens=6, temperature=1.0, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for batch_size in (1, 32):
        again = generate(
            model, chat, PROMPTS, max_new_tokens=6, temperature=1.0, seed=5, batch_size=batch_size
        )
        assert again == first
    assert generate(model, chat, PROMPTS, max_new_tokens=6, temperature=1.0, seed=6) != first


def test_responses_stop_before_the_end_of_turn() -> None:
    model, chat = _model(), _chat()
    with torch.no_grad():
        start = model(input_ids=torch.tensor(chat.encode(PROMPTS[:1]))).logits[0, -1].argmax().item()
    plain = generate(model, chat, PROMPTS, max_new_tokens=6)
    # Make an ordinary token an end of turn: not a special token, so decoding alone would not drop it.
    model.generation_config.eos_token_id = [int(start), 300]
    stopped = generate(model, chat, PROMPTS, max_new_tokens=6)
    assert stopped[0] == ""
    assert len(plain[0]) > 0
    assert any(stopped)
    assert all(long.startswith(short.rstrip("�")) for long, short in zip(plain, stopped, strict=True))


def test_generation_in_training_mode_with_checkpointing() -> None:
    model, chat = _model("qwen2", attention_dropout=0.5), _chat()
    expected = generate(model, chat, PROMPTS, max_new_tokens=4)
    model.gradient_checkpointing_enable()
    model.train()
    assert generate(model, chat, PROMPTS, max_new_tokens=4) == expected
    assert model.training
    assert all(module.training for module in model.modules())


def test_no_prompts_no_responses() -> None:
    assert generate(_model(), _chat(), [], max_new_tokens=4) == []


def test_long_prompts_can_be_shortened() -> None:
    model, chat = _model(), _chat()
    prompt = "Write a short poem about the sea. " * 10
    row = chat.encode([prompt], max_length=30)[0]
    ids = torch.tensor([row])
    with torch.no_grad():
        token = model(input_ids=ids).logits[0, -1].argmax().item()
    assert generate(model, chat, [prompt], max_new_tokens=1, max_length=30) == [
        chat.tokenizer.decode([token])
    ]
