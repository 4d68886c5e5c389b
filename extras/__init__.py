"""A package of its own, so that no other package named extras on the path can take its place."""
