"""What the commands do, one verb a file. None of them imports another."""
