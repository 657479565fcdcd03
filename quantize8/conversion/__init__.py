"""Converting in steps that any process can take: what is asked for, a weight file at a time, and the end of it."""
