"""A captioned world of rendered images whose attributes are known: its words, its looks, and a data set of it."""
