"""Responses of a model in this process: fixed batches of similar length, greedy or sampled, prefilled or not."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from safesteer.chat import Chat, generating, length_sorted_batches
from safesteer.console import ProgressCallback
from safesteer.errors import SafeSteerError
from safesteer.evaluation.records import EvaluationPrompt, Record, RecordFile
from safesteer.evaluation.subjects import Subject
from safesteer.modeling import unwrapped
from safesteer.out_of_memory import is_out_of_memory

# How thinking is marked: Qwen3, DeepSeek-R1 and others; Magistral; some fine-tuned models.
_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"))


@dataclass(frozen=True)
class Decoding:
    """How responses are generated.

    Attributes:
        max_new_tokens: Longest response.
        temperature: 0 is greedy; otherwise pure sampling at that temperature.
        seed: Every response's own sampling seed follows from it (see `record_seed`).
        batch_size: Prompts at a time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse what cannot be decoded with."""
        for flag, value, least in [
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--batch-size", self.batch_size, 1),
            ("--temperature", self.temperature, 0),
        ]:
            if not least <= value < float("inf"):
                raise SafeSteerError(f"{flag} is {value}; give a number of at least {least}.")


def encoded(chat: Chat, prompts: Sequence[EvaluationPrompt]) -> list[list[int]]:
    """Render and tokenise prompts and their prefills, unpadded."""
    return chat.encode([prompt.prompt for prompt in prompts], prefills=[prompt.prefill for prompt in prompts])


def that_fit(
    subject: Subject, prompts: Sequence[EvaluationPrompt], max_new_tokens: int
) -> tuple[EvaluationPrompt, ...]:
    """Leave out the prompts that leave the model no room for an answer.

    They are not shortened, because a shortened jailbreak template may have lost the request.

    Raises:
        SafeSteerError: If there is no room for an answer of `max_new_tokens` after any prompt.
    """
    config = unwrapped(subject.model).config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int):
        return tuple(prompts)
    rows = encoded(subject.chat, prompts)
    kept = tuple(p for p, row in zip(prompts, rows, strict=True) if len(row) + max_new_tokens <= context)
    if not kept and prompts:
        raise SafeSteerError(
            f"{subject.name}: its context of {context} tokens holds no prompt and {max_new_tokens} tokens of answer; "
            "give a smaller --max-new-tokens."
        )
    return kept


def generate_records(
    subject: Subject,
    benchmark: str,
    prompts: Sequence[EvaluationPrompt],
    decoding: Decoding,
    file: RecordFile[Record],
    progress: ProgressCallback | None = None,
) -> None:
    """Generate the responses that a record file lacks, and append them batch by batch.

    The batches are those of all prompts, whatever is in the file already: padding changes the last bits of a
    logit, so that an interrupted evaluation would otherwise not always end in the same records.

    Args:
        subject: Who is asked.
        benchmark: Its name in the records.
        prompts: All of them, those in the file included.
        decoding: How.
        file: Where the responses go.
        progress: Told how many there are.
    """
    done = set(file.load())
    if all(prompt.id in done for prompt in prompts):
        return
    ids = encoded(subject.chat, prompts)
    opened = [_opens_thinking(subject.chat, prompt) for prompt in prompts[:1]] == [True]
    length, temperature = decoding.max_new_tokens, decoding.temperature
    with (
        subject.steering(),
        generating(subject.model, subject.chat, max_new_tokens=length, temperature=temperature) as respond,
    ):
        for batch in length_sorted_batches(list(map(len, ids)), decoding.batch_size):
            if all(prompts[index].id in done for index in batch):
                continue
            seeds = [record_seed(decoding.seed, benchmark, prompts[index].id) for index in batch]
            try:
                responses = respond([ids[index] for index in batch], seeds)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise SafeSteerError(
                    f"{subject.name}: the device's memory does not hold even one prompt at a time; give a smaller "
                    "--max-new-tokens (what was generated so far is kept)."
                ) from None
            made = [
                record_of(benchmark, prompts[index], response.text, response.tokens, seed, opened=opened)
                for index, response, seed in zip(batch, responses, seeds, strict=True)
            ]
            file.append([record for record in made if record.id not in done])
            done.update(record.id for record in made)
            if progress is not None:
                progress(f"{subject.name} answers {benchmark}", len(done), len(prompts))


def record_of(
    benchmark: str, prompt: EvaluationPrompt, response: str, tokens: int, seed: int, *, opened: bool = False
) -> Record:
    """Make a record of a response."""
    return Record(
        benchmark=benchmark,
        id=prompt.id,
        prompt=prompt.prompt,
        kind=prompt.kind,
        category=prompt.category,
        prefill=prompt.prefill,
        response=response,
        answer=without_thinking(response, opened=opened),
        tokens=tokens,
        seed=seed,
    )


def record_seed(seed: int, benchmark: str, prompt_id: str) -> int:
    """Derive the sampling seed of one response, 31 bits: the same whatever else is evaluated."""
    digest = hashlib.sha256(f"{seed}/{benchmark}/{prompt_id}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def without_thinking(response: str, *, opened: bool = False) -> str:
    """Strip a response of its thinking.

    Args:
        response: As generated.
        opened: Whether the chat template had already opened the thinking, so that the response starts within it.

    Returns:
        What follows the thinking. Thinking that was cut off leaves nothing.
    """
    if opened:
        response = response.partition("</think>")[2]
    for start, end in _THINKING:
        response = re.sub(f"{re.escape(start)}.*?(?:{re.escape(end)}|\\Z)", "", response, flags=re.DOTALL)
    return response.strip()


def _opens_thinking(chat: Chat, prompt: EvaluationPrompt) -> bool:
    return not prompt.prefill and chat.render(prompt.prompt).rstrip().endswith("<think>")
