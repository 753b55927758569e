"""Finds stop texts, across token boundaries.

    finder = StopFinder(("END", "\\n\\n"))
    finder.feed("abE")                          # "ab": "E" may begin "END"

Each character of a text is processed once, for any number of stop texts.

Source: Aho and Corasick 1975, "Efficient string matching: an aid to bibliographic search".
"""

from __future__ import annotations

import functools
from collections import deque


class StopTexts:
    """An automaton of stop texts. Its state is the longest suffix of the text that is a prefix of a stop text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Build the automaton; time and memory are linear in the characters of `stops`."""
        self.next: list[dict[str, int]] = [{}]
        """By state: the next state for each character that continues a stop text."""
        self.shorter = [0]
        """By state: the state of the longest proper suffix."""
        self.depth = [0]
        """By state: the length of the suffix, in characters."""
        self.found = [0]
        """By state: the length of the longest stop text at the end of the text; 0 for none."""
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
        # By depth: the states that a state refers to are complete before it.
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
    """The automaton of these stop texts, shared by the samples of a request."""
    return StopTexts(stops)


class StopFinder:
    """Returns text up to the first stop text; holds back text that may begin a stop text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stop_texts(stops)
        self._state = 0
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Add text; returns the text that is before any stop text."""
        stops, state = self._stops, self._state
        held = self._held + text
        cut = len(held)
        for end, char in enumerate(text, len(self._held) + 1):
            state = stops.step(state, char)
            if length := stops.found[state]:
                self.found = True
                # Several stop texts may end in this piece: the one that begins first counts.
                cut = min(cut, end - length)
        if not self.found:
            cut -= stops.depth[state]
        self._state, self._held = state, "" if self.found else held[cut:]
        return held[:cut]

    def end(self) -> str:
        """End the text; returns the text that was held back."""
        held, self._held, self._state = self._held, "", 0
        return held
