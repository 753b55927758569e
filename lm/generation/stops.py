"""Stop texts, found across token borders."""

from __future__ import annotations


class StopFinder:
    """Gives out text up to the first stop text, and holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is now known to come before any stop text."""
        self._held += text
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            given, self._held = self._held[: min(hits)], ""
            return given
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                given, self._held = self._held[:-size], self._held[-size:]
                return given
        given, self._held = self._held, ""
        return given

    def end(self) -> str:
        """What was held back, when no more text comes."""
        given, self._held = self._held, ""
        return given
