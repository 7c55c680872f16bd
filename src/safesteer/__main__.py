"""`python -m safesteer`, e.g. for `accelerate launch -m safesteer align …`."""

from safesteer.cli import main

main()
