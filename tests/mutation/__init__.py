"""Mutation testing: are the tests of a module able to fail? Each mutant is one small change of its source, and some
test has to notice.

The changes are cosmic-ray's. Its own way of running them (write the file, start a process) would pay for the import of
torch a thousand times over; here a process that has imported it forks once for each mutant, and the child imports the
changed module in place of the one on disk, which nobody touches. `python -m mutation` prints the table.
"""
