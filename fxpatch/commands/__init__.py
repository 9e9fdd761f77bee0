"""The commands of the command line, one module each: `add` gives its options to the parser, `run` its exit status.

Importing this package or a command's module imports no torch: the vendor's package would come with it, and whatever
that does to a process.
"""
