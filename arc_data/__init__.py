"""A package of its own, so that no other package named arc_data on the path can take its place."""
