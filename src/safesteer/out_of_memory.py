"""When the device's memory is too small: how that is told from other failures, and the work done in less of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from safesteer.errors import SafeSteerError

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: a GPU's, Apple's, or what the CPU's allocator can get."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Accelerate knows the messages of the devices whose errors have no type of their own.
    return isinstance(error, RuntimeError) and bool(should_reduce_batch_size(error))


def free_memory() -> None:
    """Give back what nothing refers to any more.

    Outside the handler of the error: its traceback holds on to all the tensors of the work that failed.
    """
    clear_device_cache(garbage_collection=True)


def several_processes() -> bool:
    """Tell whether this is one of several processes, which have to do the same at the same time."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class InParts:
    """Does a batch's work in halves, quarters and so on when the whole does not fit into memory.

    From then on no more than that is tried. Several processes each do theirs whole, since one
    that needs more passes than the others would wait for them forever where weights are sharded.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    def __call__(
        self, work: Callable[[Sequence[Item]], Iterable[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """Return the results of all items, in their order.

        Args:
            work: Turns some of the items into as many results, and may be called again with fewer of them.
            items: The batch.

        Raises:
            torch.OutOfMemoryError: Or the like, if a single item does not fit.
        """
        results: list[Result] = []
        while len(results) < len(items):
            size = min(self._most or len(items), len(items) - len(results))
            try:
                results.extend(work(items[len(results) : len(results) + size]))
                continue
            except Exception as error:
                if size == 1 or several_processes() or not is_out_of_memory(error):
                    raise
            free_memory()
            self._most = size // 2
        return results


def with_smaller_batches(
    work: Callable[[int], Result],
    batch_size: int,
    *,
    what: str,
    note: Callable[[str], None],
    remedies: str,
    smaller: Callable[[int], int] = lambda size: size // 2,
) -> Result:
    """Do the work of a stage, with half the batch size whenever memory runs out.

    Args:
        work: Given the batch size; starts anew, or from where it was, each time it is called.
        batch_size: To begin with.
        what: The stage.
        note: Told of every change.
        remedies: What a user can do when not even one at a time fits.
        smaller: The next batch size.

    Raises:
        SafeSteerError: If memory runs out at a batch size of 1.
    """
    while True:
        try:
            return work(batch_size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise SafeSteerError(
                    f"{what}: the device's memory does not hold even one prompt at a time; {remedies}."
                ) from error
        free_memory()
        before, batch_size = batch_size, smaller(batch_size)
        note(f"{what}: out of memory with {before} prompts at a time; going on with {batch_size}.")
