"""What of the documentation is made from the source: patch pages, the reference, the command line, the pictures."""
