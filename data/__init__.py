"""A package of its own, so that no other package named data on the path can take its place."""
