"""Make an open-weights chat model refuse harmful requests without losing what it can do.

The public names are imported when first used, so that `import safesteer` does not wait for PyTorch.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from safesteer.lazy import lazy_names

if TYPE_CHECKING:
    from safesteer.chat import Chat
    from safesteer.direction import DirectionSettings, RefusalDirection, find_refusal_direction
    from safesteer.divergence import localized_divergence
    from safesteer.errors import SafeSteerError
    from safesteer.evaluation.compare import compare
    from safesteer.evaluation.runner import evaluate
    from safesteer.evaluation.subjects import subjects_of
    from safesteer.loading import load_model, load_tokenizer
    from safesteer.openers import RefusalOpeners, detect_refusal_openers
    from safesteer.pipeline import AlignmentRun, align
    from safesteer.prompts import PromptSet, load_prompts
    from safesteer.safety_tokens import SafetyTokens, SafetyTokenSettings, find_safety_tokens
    from safesteer.settings import Settings
    from safesteer.steering import Steering, ablate_direction, add_vector
    from safesteer.trainer import SafeSteerTrainer
    from safesteer.trainer_config import SafeSteerConfig

try:
    __version__ = version("safesteer")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

_MODULES = {
    "AlignmentRun": "pipeline",
    "Chat": "chat",
    "DirectionSettings": "direction",
    "PromptSet": "prompts",
    "RefusalDirection": "direction",
    "RefusalOpeners": "openers",
    "SafeSteerConfig": "trainer_config",
    "SafeSteerError": "errors",
    "SafeSteerTrainer": "trainer",
    "SafetyTokenSettings": "safety_tokens",
    "SafetyTokens": "safety_tokens",
    "Settings": "settings",
    "Steering": "steering",
    "ablate_direction": "steering",
    "add_vector": "steering",
    "align": "pipeline",
    "compare": "evaluation.compare",
    "detect_refusal_openers": "openers",
    "evaluate": "evaluation.runner",
    "find_refusal_direction": "direction",
    "find_safety_tokens": "safety_tokens",
    "load_model": "loading",
    "load_prompts": "prompts",
    "load_tokenizer": "loading",
    "localized_divergence": "divergence",
    "subjects_of": "evaluation.subjects",
}

__all__ = [
    "AlignmentRun",
    "Chat",
    "DirectionSettings",
    "PromptSet",
    "RefusalDirection",
    "RefusalOpeners",
    "SafeSteerConfig",
    "SafeSteerError",
    "SafeSteerTrainer",
    "SafetyTokenSettings",
    "SafetyTokens",
    "Settings",
    "Steering",
    "__version__",
    "ablate_direction",
    "add_vector",
    "align",
    "compare",
    "detect_refusal_openers",
    "evaluate",
    "find_refusal_direction",
    "find_safety_tokens",
    "load_model",
    "load_prompts",
    "load_tokenizer",
    "localized_divergence",
    "subjects_of",
]

__getattr__ = lazy_names(__name__, _MODULES)
