"""Cases that showed a fault once, made small: they run first, forever."""

from fuzz.mutations import Json

FOUND: dict[str, Json] = {}
