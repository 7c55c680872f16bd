"""The one exception that is meant for the person at the keyboard."""


class SafeSteerError(Exception):
    """A mistake the user can mend, told in one sentence.

    The sentence names the input, the rule it broke and the remedy. The command line prints it without a
    traceback and exits with code 2.
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """Quote another library's error inside a sentence: white space folded, at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
