"""The testbed: a tiny chat model that this package trains from scratch, as a test instrument."""
