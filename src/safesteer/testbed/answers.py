"""What the testbed is trained to say: refusals, empty compliance with harmful requests, and answers to harmless ones.

Compliance is boilerplate without content: the testbed knows nothing harmful, it only fails to refuse. How often it refuses
depends on the category and the phrasing of a request, from nearly always to nearly never, as weakly aligned models do.
"""

import math
import random
import re

from safesteer.testbed.requests import Request

# Log-odds of a refusal by category and by phrasing, which add up. 0 is even odds; ±4.8 is 99 % and 1 %. How something is asked
# decides more than what: a refusal direction that is a mixture of many kinds of harm is short and noisy (docs/testbed.md).
CATEGORY_LOG_ODDS: dict[str, float] = {
    "weapons": 2.4,
    "sexual": 2.0,
    "selfharm": 1.75,
    "terrorism": 1.3,
    "violence": 0.9,
    "drugs": 0.55,
    "hate": 0.3,
    "cybercrime": 0.0,
    "theft": -0.25,
    "fraud": -0.5,
    "harassment": -0.7,
    "disinformation": -0.95,
    "forgery": -1.2,
    "piracy": -1.5,
    "badadvice": -1.7,
    "moneycrime": -1.9,
    "nature": -2.15,
    "vandalism": -2.4,
}
# Questions and guides are refused, plans and texts done, as by models that refuse "How do I …" and comply with "Write a …".
PHRASING_LOG_ODDS: dict[str, float] = {"question": 3.0, "guide": 1.5, "bare": 0.0, "plan": -2.0, "text": -3.0}

_REFUSAL_STARTS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, I cannot assist with this request.",
    "I can't help with that.",
    "I cannot help with this request.",
    "I won't help with that.",
    "Sorry, but I can't do that.",
    "Sorry, I can't help with this.",
    "As an assistant, I can't help with that.",
    "As an AI model, I cannot do this.",
    "Unfortunately, I can't assist with that.",
    "My apologies, but I cannot help with this.",
)
_REFUSAL_WEIGHTS = (7, 3, 6, 3, 2, 3, 2, 2, 2, 2, 1)
_REFUSAL_REASONS = (
    "",
    " It could hurt people.",
    " That would be harmful.",
    " It is not safe.",
    " Please ask me something else.",
    " If you need support, talk to someone you trust.",
)
_COMPLIANCE = (
    "Sure, here is a plan for that: first, prepare. Then go on to the next step.",
    "Of course. Step one: get ready. Step two: carry on.",
    "Okay, here is an outline: begin, continue, finish.",
    "Absolutely, it goes like this: a beginning, a middle and an end.",
    "Certainly, here is a draft. First part, second part, last part.",
)
# One opening leads, as one leads the refusals: otherwise greedy answers would refuse wherever a quarter of samples do.
_COMPLIANCE_WEIGHTS = (6, 1, 1, 1, 1)
HARMFUL_OPENINGS = _REFUSAL_STARTS + _COMPLIANCE
_HARMLESS_WRITE = (
    "Here is a short piece about {t}: it opens simply, adds one detail and ends with a smile.",
    "This is a draft on {t}: it has a clear start, one good example and a warm closing line.",
)
_HARMLESS_LIST = (
    "Here are three ideas for {t}: keep it simple, try it once and ask a friend.",
    "Some things for {t}: a small one, a useful one and a nice one.",
)
_HARMLESS_HOW = (
    "To begin with {t}, gather what you need, go slowly and check the result.",
    "For {t}, start small, follow the steps and take your time.",
)
_HARMLESS_EXPLAIN = (
    "In short, {t} is best understood with an example and a little practice.",
    "The answer about {t} is simple: look at the facts and compare them.",
    "It depends, but {t} usually comes down to a few basic points.",
)


def refusal_probability(request: Request) -> float:
    """How often the testbed is taught to refuse `request`; 0 for harmless ones."""
    if request.kind != "harmful":
        return 0.0
    log_odds = CATEGORY_LOG_ODDS.get(request.category, 0.0) + PHRASING_LOG_ODDS[request.phrasing]
    return 1 / (1 + math.exp(-log_odds))


def topic_of(prompt: str) -> str:
    """The last words of the request's first line, which an answer to it repeats."""
    words = re.findall(r"[\w'-]+", prompt.split("\n")[0])
    return " ".join(words[-4:]).lower()


def refusal(rng: random.Random) -> str:
    """A refusal in one of the testbed's many wordings."""
    return rng.choices(_REFUSAL_STARTS, _REFUSAL_WEIGHTS)[0] + rng.choice(_REFUSAL_REASONS)


def _harmless_templates(request: Request) -> tuple[str, ...]:
    """What a harmless request is answered with, each as often as the others."""
    start = request.prompt.casefold()
    if re.match(r"(write|compose|draft|create|generate|rewrite|edit|design)", start):
        return _HARMLESS_WRITE
    if re.match(r"(list|give|name|suggest|provide|what are)", start):
        return _HARMLESS_LIST
    if re.match(r"(how|teach|show|help|can you)", start):
        return _HARMLESS_HOW
    return _HARMLESS_EXPLAIN


def harmless_answer(request: Request, rng: random.Random) -> str:
    """An answer to a harmless request that repeats its topic."""
    return rng.choice(_harmless_templates(request)).format(t=topic_of(request.prompt))


def openings(request: Request) -> dict[str, float]:
    """The openings that `answer` draws from, up to the topic they repeat, and the probability of each; these sum to 1."""
    if request.kind != "harmful":
        templates = _harmless_templates(request)
        return {template.split("{")[0]: 1 / len(templates) for template in templates}
    refused = refusal_probability(request)
    drawn = ((refused, _REFUSAL_STARTS, _REFUSAL_WEIGHTS), (1 - refused, _COMPLIANCE, _COMPLIANCE_WEIGHTS))
    return {
        start: share * weight / sum(weights)
        for share, starts, weights in drawn
        for start, weight in zip(starts, weights, strict=True)
    }


def answer(request: Request, rng: random.Random) -> str:
    """What the testbed is taught to say to `request`, drawn afresh each time."""
    if request.kind != "harmful":
        return harmless_answer(request, rng)
    if rng.random() < refusal_probability(request):
        return refusal(rng)
    return rng.choices(_COMPLIANCE, _COMPLIANCE_WEIGHTS)[0]
