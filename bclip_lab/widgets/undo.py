"""`Undoable`: a state whose changes can be taken back and made again."""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["Undoable"]

State = TypeVar("State")


class Undoable(Generic[State]):
    """Keeps all that `_state` has been; a child changes it through `_become` only, never in place."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._past: list[State] = []
        self._future: list[State] = []
        self._latest: object = None  # what the latest change was of

    def undo(self) -> bool:
        """Take the latest change back; False where there is none."""
        return self._step(self._past, self._future)

    def redo(self) -> bool:
        """Make the change again that `undo` took back; False where there is none."""
        return self._step(self._future, self._past)

    @property
    def can_undo(self) -> bool:
        """Whether there is a change to take back."""
        return bool(self._past)

    @property
    def can_redo(self) -> bool:
        """Whether there is a change to make again."""
        return bool(self._future)

    def _become(self, state: State, of: object = None, merge: bool = True) -> None:
        """Change; with `merge` as one step with the change before, where that was of the same, which is not None."""
        if not (merge and of is not None and of == self._latest):
            self._past.append(self._state)
        self._state, self._latest = state, of
        self._future.clear()

    def _step(self, source: list[State], other: list[State]) -> bool:
        if not source:
            return False
        other.append(self._state)
        self._state, self._latest = source.pop(), None
        return True
