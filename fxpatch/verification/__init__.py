"""`fxpatch.verify(model, inputs)`: whether compiled code computes what the model does, and where it first does not."""
