"""The embedded default: rooms, questions about them, a tiny model. The root imports none of it."""
