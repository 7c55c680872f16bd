"""Loading models, adapters and tokenizers from folders."""

import json
from pathlib import Path

import pytest
import torch

from safesteer.errors import SafeSteerError
from safesteer.loading import load_model, load_tokenizer
from safesteer.modeling import model_fingerprint
from tiny_models import adapted, chatml_tokenizer, tiny_model


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "smollm3"])
def test_a_saved_model_loads_as_itself(tmp_path: Path, kind: str) -> None:
    model, ids = tiny_model(kind), torch.randint(3, 160, (2, 6))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert model_fingerprint(loaded) == model_fingerprint(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dtype_auto_is_float32_on_the_cpu(tmp_path: Path) -> None:
    tiny_model("qwen2").bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").dtype == torch.float32
    assert load_model(str(tmp_path), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(SafeSteerError, match="dtype 'half' is unknown; choose one of: auto, float32"):
        load_model(str(tmp_path), dtype="half")
    with pytest.raises(SafeSteerError, match="device 'gpu' is unknown; give one such as cuda"):
        load_model(str(tmp_path), device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="device 'cuda:1': this machine has none"):
        load_model(str(tmp_path), device="cuda:1")


def test_an_adapter_folder_loads_with_its_base(tmp_path: Path) -> None:
    base, ids = tiny_model("qwen3"), torch.randint(3, 160, (2, 6))
    base.save_pretrained(tmp_path / "base")
    chatml_tokenizer().save_pretrained(tmp_path / "base")
    loaded_base = load_model(str(tmp_path / "base"), device="cpu")
    lora = adapted(loaded_base)
    lora.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, lora(input_ids=ids).logits)
    assert not loaded.training
    assert model_fingerprint(loaded) == model_fingerprint(base)
    tokenizer = load_tokenizer(str(tmp_path / "adapter"))
    assert tokenizer.get_vocab() == chatml_tokenizer().get_vocab()
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SafeSteerError, match="no adapter_model.safetensors, and pickled weights are never"):
        load_model(str(tmp_path / "adapter"), device="cpu")


def _fails(tmp_path: Path, message: str) -> None:
    with pytest.raises(SafeSteerError, match=message) as error:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_what_cannot_be_loaded_is_a_sentence(tmp_path: Path) -> None:
    _fails(tmp_path / "missing", "cannot be loaded as a causal language model")
    (tmp_path / "empty").mkdir()
    _fails(tmp_path / "empty", "cannot be loaded as a causal language model")
    pickled = tmp_path / "pickled"
    model = tiny_model("qwen2")
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    _fails(pickled, "cannot be loaded as a causal language model.*safetensors")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "no-such-architecture"}')
    _fails(unknown, "no-such-architecture")
    (unknown / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": "four"}')
    _fails(unknown, "num_hidden_layers")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    _fails(broken, "cannot be loaded as a causal language model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    _fails(tmp_path / "adapter", "its adapter_config.json cannot be read")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    _fails(tmp_path / "adapter", "names no base_model_name_or_path")


def test_tokenizers_are_left_padded_with_a_pad_token(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    config["padding_side"] = "right"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.padding_side == "left"
    assert loaded.pad_token == "<|endoftext|>"
    assert loaded.chat_template == tokenizer.chat_template


def test_a_chat_template_is_needed_and_can_be_given(tmp_path: Path) -> None:
    chatml_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(SafeSteerError, match="no chat template.*--chat-template"):
        load_tokenizer(str(tmp_path))
    template = "{{ messages[-1].content }}>"
    assert load_tokenizer(str(tmp_path), chat_template=template).chat_template == template
    (tmp_path / "mine.jinja").write_text(template)
    assert load_tokenizer(str(tmp_path), chat_template=tmp_path / "mine.jinja").chat_template == template
    assert load_tokenizer(str(tmp_path), chat_template=str(tmp_path / "mine.jinja")).chat_template == template
    with pytest.raises(SafeSteerError, match="chat template .*gone.jinja: cannot be read"):
        load_tokenizer(str(tmp_path), chat_template=str(tmp_path / "gone.jinja"))
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(SafeSteerError, match="binary.jinja: cannot be read"):
        load_tokenizer(str(tmp_path), chat_template=tmp_path / "binary.jinja")


def test_a_tokenizer_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(SafeSteerError, match="its tokenizer cannot be loaded"):
        load_tokenizer("safesteer-tests/does-not-exist")
