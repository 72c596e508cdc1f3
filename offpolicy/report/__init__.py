"""From many runs to numbers one can compare: finding runs, tables over tasks and seeds, and a page of all of them."""
