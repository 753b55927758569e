"""Stop texts, found across token borders.

    finder = StopFinder(("END", "\\n\\n"))
    finder.feed("abE")                          # "ab": "E" may begin "END"

Every character of a text is looked at once, however many stop texts there are and whatever they have in common.

Source: Aho and Corasick 1975, "Efficient string matching: an aid to bibliographic search".
"""

from __future__ import annotations

import functools
from collections import deque


class StopTexts:
    """Some stop texts as an automaton. Its state is the longest end of the text that begins a stop text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Time and memory are linear in the characters of `stops`."""
        self.next: list[dict[str, int]] = [{}]
        """By state: the state after a character that continues a stop text."""
        self.shorter = [0]
        """By state: the state of the longest shorter end that begins a stop text."""
        self.depth = [0]
        """By state: the characters of that end."""
        self.found = [0]
        """By state: the characters of the longest stop text that the text ends with; 0 for none."""
        for stop in stops:
            state = 0
            for char in stop:
                following = self.next[state].get(char)
                if following is None:
                    following = self.next[state][char] = len(self.next)
                    self.next.append({})
                    self.shorter.append(0)
                    self.depth.append(self.depth[state] + 1)
                    self.found.append(0)
                state = following
            self.found[state] = len(stop)
        # By growing depth: what a state refers to is complete before it.
        states = deque(self.next[0].values())
        while states:
            state = states.popleft()
            self.found[state] = self.found[state] or self.found[self.shorter[state]]
            for char, following in self.next[state].items():
                self.shorter[following] = self.step(self.shorter[state], char)
                states.append(following)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while (following := self.next[state].get(char)) is None:
            if not state:
                return 0
            state = self.shorter[state]
        return following


@functools.lru_cache(maxsize=8)
def stop_texts(stops: tuple[str, ...]) -> StopTexts:
    """The automaton of some stop texts, the same one for all samples and prompts of a request."""
    return StopTexts(stops)


class StopFinder:
    """Gives out text up to the first stop text, and holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stop_texts(stops)
        self._state = 0
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is now known to come before any stop text."""
        stops, state = self._stops, self._state
        held = self._held + text
        cut = len(held)
        for end, char in enumerate(text, len(self._held) + 1):
            state = stops.step(state, char)
            if length := stops.found[state]:
                self.found = True
                # Of the stop texts that end in this piece, the one that begins first.
                cut = min(cut, end - length)
        if not self.found:
            cut -= stops.depth[state]
        self._state, self._held = state, "" if self.found else held[cut:]
        return held[:cut]

    def end(self) -> str:
        """What was held back, when no more text comes."""
        given, self._held, self._state = self._held, "", 0
        return given
