"""The error for a name that is not among those known of an axis."""

from __future__ import annotations

from collections.abc import Collection


def unknown(axis: str, name: str, known: Collection[str]) -> ValueError:
    """One line with all that could have been meant."""
    return ValueError(f"unknown {axis} {name!r}: choose one of {', '.join(known)}")
