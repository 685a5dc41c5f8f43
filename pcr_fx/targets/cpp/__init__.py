"""C++ for CPUs: printed, compiled by the user's own compiler, kept on disk, and called with addresses."""
