"""One runnable Python file per published recipe."""
