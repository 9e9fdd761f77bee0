"""What is kept of a prepared model for the next process: compiled pieces, and the recipe that puts them together.

`artifacts` saves and loads. `request` makes the key: all that is known before anything is traced. `witness` holds what
only tracing finds, by `places` and `codes`, in words of `fingerprints`. `recipe` and `graph_json` write graphs as data.
`cache_files` trusts no file that somebody else could have written.
"""
