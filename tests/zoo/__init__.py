"""Models as other people write them, each with the chains that are to be found in it."""
