"""What brings fxpatch into other programs: serving engines' workers, transformers' `generate`, diffusers' pipelines.

`workers` is the plug-in that vLLM and SGLang load in each of their processes; `whole_module` and `decoding` put a
`PiecewiseRunner` into a model that somebody else calls. docs/engines.md tells how.
"""
