"""References: whole forward passes, one prompt at a time, with hooks that are not the package's."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from safesteer.chat import Chat
from safesteer.modeling import decoder_layers
from tiny_models import chatml_tokenizer, tiny_model

# Where each family keeps what writes to the residual stream.
WRITERS = {"gpt_neox": ("attention", "mlp"), "gpt2": ("attn", "mlp"), "bloom": ("self_attention", "mlp")}
ARCHITECTURES = ("qwen3", "gemma3", "gpt_neox", "qwen3_moe", "gpt2", "bloom", "gemma4")


def architecture(kind: str) -> PreTrainedModel:
    """Build a small random model that fits the ChatML tokenizer, of one of `KINDS` or a few odder ones."""
    vocab_size = len(chatml_tokenizer())
    common = {"vocab_size": vocab_size, "hidden_size": 32, "initializer_range": 0.15}
    if kind == "bloom":  # its layers return tuples, its positions are ALiBi's
        return transformers.BloomForCausalLM(transformers.BloomConfig(n_layer=4, n_head=4, **common)).eval()
    if kind == "gemma4":  # its last two layers read keys and values of earlier ones
        config = transformers.Gemma4TextConfig(
            **common,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            head_dim=8,
            global_head_dim=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=vocab_size,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return transformers.Gemma4ForCausalLM(config).eval()
    if kind == "gpt2":  # it adds a learned embedding of each position, which left padding must not shift
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=4, n_head=4, **common, **ids)
        ).eval()
    return tiny_model(kind, vocab_size)


@contextlib.contextmanager
def edited(module: nn.Module, edit: Callable[[Tensor], Tensor], *, inputs: bool) -> Iterator[None]:
    """Reference hooks, written without the package's."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple, output: object) -> object:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if inputs
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def ablated(model: PreTrainedModel, kind: str, direction: Tensor) -> Iterator[None]:
    unit = direction / direction.norm()

    def project(hidden: Tensor) -> Tensor:
        return hidden - (hidden @ unit)[..., None] * unit

    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(edited(layer, project, inputs=True))
            for name in WRITERS.get(kind, ("self_attn", "mlp")):
                stack.enter_context(edited(getattr(layer, name), project, inputs=False))
        yield


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, prompts: tuple[str, ...]) -> Tensor:
    """The whole model on one prompt at a time, [n, V] float64."""
    rows = Chat(chatml_tokenizer()).encode(prompts)
    return torch.stack([model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1) for row in rows])


class BruteForceDirection:
    """Method §1 word for word: three whole passes per candidate and prompt, without padding."""

    def __init__(self, model: PreTrainedModel, kind: str, openers: tuple[int, ...], samples: dict) -> None:
        self.model, self.kind, self.openers, self.samples = model, kind, openers, samples
        self.layers = list(decoder_layers(model))
        positions = len(Chat(chatml_tokenizer()).post_instruction_ids)
        difference = self.mean("train_harmful", positions) - self.mean("train_harmless", positions)
        base = log_probabilities(model, samples["validation_harmless"])
        self.vectors, self.scores = {}, {}
        for layer in range(int(0.8 * len(self.layers))):
            for position in range(-positions, 0):
                vector = difference[layer, position].float()
                if vector.norm() < 1e-6:
                    continue  # what layer 0 reads of the template is the same after every prompt
                self.vectors[layer, position] = vector
                with edited(self.layers[layer], lambda hidden, vector=vector: hidden + vector, inputs=True):
                    induction = self.score("validation_harmless").mean().item()
                with ablated(model, kind, vector):
                    after = log_probabilities(model, samples["validation_harmless"])
                    ablation = self.score("validation_harmful").mean().item()
                kl = (base.exp() * (base - after)).sum(-1).mean().item()
                self.scores[layer, position] = (induction, kl, ablation)

    @torch.no_grad()
    def mean(self, name: str, positions: int) -> torch.Tensor:
        rows = Chat(chatml_tokenizer()).encode(self.samples[name])
        streams = [self.model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows]
        return torch.stack(
            [torch.stack([hidden[0, -positions:].double() for hidden in s]) for s in streams]
        ).mean(0)

    def score(self, name: str) -> torch.Tensor:
        p = log_probabilities(self.model, self.samples[name]).exp()[:, list(self.openers)].sum(-1)
        return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)

    def choice(self, max_kl: float, min_induction: float) -> tuple[int, int]:
        passing = [
            c for c, (induction, kl, _) in self.scores.items() if kl <= max_kl and induction >= min_induction
        ]
        return min(passing, key=lambda candidate: self.scores[candidate][2])
