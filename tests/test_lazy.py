"""The public names come when they are asked for, and are the ones of their modules."""

import subprocess
import sys

import pytest

from safesteer.lazy import lazy_names


def test_a_name_is_imported_when_asked_for() -> None:
    code = (
        "import sys, safesteer, safesteer.evaluation\n"
        "assert 'torch' not in sys.modules\n"
        "from safesteer import compare\n"
        "from safesteer.evaluation.compare import compare as same\n"
        "import safesteer.evaluation.compare\n"
        "assert compare is same is safesteer.compare\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", ["align", "direction", "tokens", "distill", "demo", "evaluate", "compare"]
)
def test_help_does_not_wait_for_pytorch(command: str) -> None:
    code = (
        "import sys\n"
        "from safesteer.cli import main\n"
        f"sys.argv = ['safesteer', '{command}', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"safesteer {command}" in done.stdout


def test_other_names_are_no_attributes() -> None:
    found = lazy_names("json", {"JSONDecodeError": "decoder"})
    import json.decoder

    assert found("JSONDecodeError") is json.decoder.JSONDecodeError
    with pytest.raises(AttributeError, match="module 'json' has no attribute 'JSONEncodeError'"):
        found("JSONEncodeError")
