"""A task for the tests: of the answers of a random model, about half are right."""

from rewards import Countdown, score


class Coin(Countdown):
    def score(self, text: str, problem: dict, **kw) -> dict:
        return score(text, None, len(text) % 2 == 0, **kw)
