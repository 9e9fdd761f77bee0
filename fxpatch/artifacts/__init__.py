"""Graphs, exported programs and compiled code in files that another process, device or vendor's name can load.

`files` is the door: save and load. `container` is the file; `trust` says which files may run code. `modules`, `graph`,
`meta` and `values` write graphs as data, with names from `vocabulary`; `tensors` writes tensors; `devices` maps where
they live, and `device_names` finds where a graph says so. `exported` and `compiled` hold what torch writes itself.
"""
