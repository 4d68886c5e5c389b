"""A package of its own, so that no other package named tools on the path can take its place."""
