"""The embedded world: a small language model that knows a world of facts, and the recipe that made it."""
