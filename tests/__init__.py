"""The tests; a package, so that two of them may share a file name."""
